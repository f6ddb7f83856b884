"""A model larger than its memory: what stays resident, what is read, and whether it is the same.

``python benchmarks/larger_than_memory.py`` writes a seeded checkpoint in Scout's proportions (16
experts in every layer, 1.6 times as wide as the stream; 9 GB), runs it with its experts in the file
and whole in memory, each in a process of its own, prints one table, and deletes it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import llama4_lab as l4
from llama4_lab.checkpoint.huggingface import is_transposed, their_name
from llama4_lab.checkpoint.saving import config_as_json, in_shards, write_listings
from llama4_lab.generate import tokens as each_token

VARIANTS = 32
WRITTEN = 16  # tokens, one after the other


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=2560, help="of the stream (default 2560)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--run", choices=("file", "memory"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.folder, options.run == "file", options.tokens)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        start = time.monotonic()
        size = generate(folder, config_of(options.width, options.layers))
        print(f"wrote {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s", flush=True)
        found = {}
        for run in ("file", "memory"):
            command = [sys.executable, __file__, "--run", run, "--folder", name]
            command += ["--tokens", str(options.tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[run] = json.loads(done.stdout)
        same = {
            what: torch.equal(*(torch.load(folder / f"{what}.{run}.pt") for run in found))
            for what in ("clean", "edited")
        }
    report(found["file"], found["memory"], same)


def config_of(width: int, layers: int) -> l4.Llama4Config:
    return l4.SCOUT.replace(
        vocab_size=16384,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 640),
        intermediate_size=width * 8 // 5,
        intermediate_size_mlp=width * 16 // 5,
        no_rope_layers=None,
        vision_config=None,
    )


def generate(folder: Path, config: l4.Llama4Config) -> int:
    """Write a bfloat16 checkpoint a layer at a time; return its bytes."""
    with torch.device("meta"):
        weights = dict(l4.Llama4(config).named_parameters())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).bfloat16()
    sizes = {name: 2 * weight.numel() for name, weight in weights.items()}
    weight_map = {}
    for file, names in in_shards(sizes, 1_500_000_000).items():
        content = {
            their_name(name, False): seeded(name, weights[name], noise, generator) for name in names
        }
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, file)
    write_listings(
        folder, sum(sizes.values()), weight_map, config_as_json(config, torch.bfloat16, None)
    )
    return sum(sizes.values())


def seeded(name: str, weight: nn.Parameter, noise: Tensor, generator: torch.Generator) -> Tensor:
    """Return a weight as the file holds it, cut from the noise at another place for each expert."""
    shape = (*weight.shape[:-2], *weight.shape[:-3:-1]) if is_transposed(name) else weight.shape
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if name == "embed_tokens.weight" else weight.shape[-1] ** -0.5
    out = torch.empty(shape, dtype=torch.bfloat16)
    for matrix in out if out.ndim == 3 else [out]:
        place = int(torch.randint(len(noise), (), generator=generator))
        rest, begin = matrix.view(-1), place
        while len(rest):
            part = noise[begin : begin + len(rest)]
            rest[: len(part)] = part * scale
            rest, begin = rest[len(part) :], 0
    return out


def measure(folder: Path, in_file: bool, tokens: int) -> dict[str, float]:
    """Run clean and edited passes; return bytes and seconds, and leave the logits in the folder."""
    run = "file" if in_file else "memory"
    _ = torch.ones(512, 512).bfloat16() @ torch.ones(512, 512).bfloat16()
    before = resident("VmRSS")
    if in_file:
        limit = 16 * expert_bytes(folder)  # those of one layer
        model = l4.load(folder, experts="mmap", memory_limit=limit)
    else:
        model = l4.load(folder)
        model.backend = "loop"  # what experts in a file are computed with
    ids = torch.randint(16384, (1, tokens), generator=torch.Generator().manual_seed(1))
    start = time.monotonic()
    replay = l4.Replay(model, {"input_ids": ids}, max_tokens=VARIANTS * tokens)
    clean, seconds = replay.logits, time.monotonic() - start
    memory = model.expert_memory
    once = memory.bytes_read if memory else 0
    start = time.monotonic()
    edits = [[l4.edits.Scale("embed", 1 + (i + 1) / 100)] for i in range(VARIANTS)]
    edited = torch.stack([found.logits_of(slice(-1, None)) for found in replay.many(edits)])
    edited_seconds = time.monotonic() - start
    all_read = memory.bytes_read if memory else 0
    steps = each_token(model, {"input_ids": ids}, 1 + WRITTEN, seed=0, stop=())
    next(steps)  # the prompt's
    start = time.monotonic()
    assert len(list(steps)) == WRITTEN
    written_seconds = time.monotonic() - start
    torch.save(clean, folder / f"clean.{run}.pt")
    torch.save(edited, folder / f"edited.{run}.pt")
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    if in_file:
        layer += 16 * expert_bytes(folder)
    return {
        "peak": resident("VmHWM") - before,
        "layer": layer,
        "weights": 2 * model.config.parameter_counts()["total"],
        "once": once,
        "edited": all_read - once,
        "clean_seconds": seconds,
        "edited_seconds": edited_seconds,
        "written_seconds": written_seconds,
    }


def expert_bytes(folder: Path) -> int:
    config = l4.Llama4Config.from_dict(json.loads((folder / "config.json").read_text()))
    return 3 * config.hidden_size * config.intermediate_size * 2


def resident(key: str) -> int:
    """Return bytes of all kinds of pages: our own, mapped and shared."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def report(file: dict[str, float], memory: dict[str, float], same: dict[str, bool]) -> None:
    two_layers, beside = 2 * file["layer"], memory["peak"] - memory["weights"]
    rows = [
        ("weights", f"{file['weights'] / 1e9:.2f} GB"),
        ("resident with all in memory, most", f"{memory['peak'] / 1e9:.2f} GB"),
        ("resident with experts in the file, most", f"{file['peak'] / 1e9:.2f} GB"),
        ("two layers (goal: no more, but activations)", f"{two_layers / 1e9:.2f} GB"),
        ("activations: what all in memory takes beside weights", f"{beside / 1e9:.2f} GB"),
        ("read in one pass", f"{file['once'] / 1e9:.2f} GB"),
        (f"read for {VARIANTS} edited runs", f"{file['edited'] / 1e9:.2f} GB"),
        ("in units of one pass (goal: below 1.5)", f"{file['edited'] / file['once']:.2f}"),
        ("clean logits equal to the bit", "yes" if same["clean"] else "NO"),
        ("edited logits equal to the bit", "yes" if same["edited"] else "NO"),
    ]
    for key, what in {
        "clean": "clean",
        "edited": "edited",
        "written": f"{WRITTEN} tokens one after the other",
    }.items():
        seconds = (run[f"{key}_seconds"] for run in (file, memory))
        rows.append((f"seconds, {what}: file and memory", "{:.1f} and {:.1f}".format(*seconds)))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
