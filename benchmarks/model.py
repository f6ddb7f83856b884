"""What the whole model costs on one CPU thread beside transformers, and how soon it is there.

``python benchmarks/model.py`` prints a table; the README here says how to read it.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from clock import Cell, check_equal, ratios
from table import layout, verdict
from torch import Tensor

import llama4_lab as l4
from llama4_lab.experts import probe
from llama4_lab.model import attention, one_token
from llama4_lab.model.attention import attend, visible

CONFIG = l4.Llama4Config(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=512,
    intermediate_size_mlp=512,
    attention_chunk_size=128,
    floor_scale=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
EXPERTS = (16, 128)
PROMPT, STEPS = 96, 16  # tokens before the first one decoded, and tokens decoded in one call
CHUNKS, CHUNK = 8, 256  # of the attention row's prompt


class Row(NamedTuple):
    what: str
    unit: str
    target: dict[int, float]  # by number of experts
    is_most: bool = False  # the target is the most that it may be, else the least


def both(target: float) -> dict[int, float]:
    return dict.fromkeys(EXPERTS, target)


ROWS = {
    "decode": Row("decode a token: transformers / ours", "×", {16: 18, 128: 90}),
    "decode_time": Row("… ours", "ms", {}),
    "decode_floor": Row("… ours / adding up the weights that it reads", "×", {}),
    "prefill": Row("prefill: transformers / ours", "×", {16: 12, 128: 60}),
    "prefill_time": Row("… ours", "ms", {}),
    "routers": Row("prefill with every router traced / without", "×", both(1.01), True),
    "decode_routers": Row("decode with every router traced / without", "×", both(1.01), True),
    "attention": Row("attention under a mask / in chunks", "×", both(0.9 * CHUNKS)),
    "causal": Row("attention to all before: PyTorch's / ours", "×", both(1.0)),
    "load": Row("load, our own float32 folder, file cache warm", "ms", both(30), True),
    "load_int8": Row("load, int8 folder, file cache warm", "ms", both(30), True),
    "load_theirs": Row("load, Hugging Face's float32 folder, file cache warm", "ms", {}),
    "import": Row("import llama4_lab, torch being there", "s", both(0.3), True),
}


@dataclass(frozen=True)
class Bench:
    """One model, ours and transformers' of the same weights. Each method checks, then times."""

    folder: Path
    config: l4.Llama4Config
    ids: Tensor
    repeats: int

    @cached_property
    def ours(self) -> l4.Llama4:
        return l4.load(self.folder)

    @cached_property
    def theirs(self) -> Any:
        from transformers import Llama4ForCausalLM

        return Llama4ForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    # ---- rows

    def decode(self) -> dict[str, Cell]:
        expected = self.theirs(self.ids[:, : PROMPT + STEPS]).logits[:, PROMPT:]
        check_equal("decode of transformers", Decoder.of_theirs(self).step(), expected, 1e-5)
        check_equal("decode", Decoder.of_ours(self).step(), expected, 1e-5)
        mine, theirs = Decoder.of_ours(self), Decoder.of_theirs(self)
        calls = {"decode": theirs.step, "read": self.read}
        cells = ratios(mine.step, calls, min(self.repeats, self.most_steps))
        read = cells["read"].value
        assert read is not None
        return {
            "decode": cells["decode"],
            "decode_time": milliseconds(cells["plain"], STEPS),
            "decode_floor": Cell(f"{1 / read:.2f}", 1 / read),
        }

    @cached_property
    def stacks(self) -> list[Tensor]:
        """Every matrix that a token reads, those of routed experts in stacks."""
        matrices = [x.detach() for x in self.ours.parameters() if x.ndim > 1]
        return matrices[1:]  # without the embedding, of which it reads a row

    def read(self) -> None:
        """Add up as many weights as the decoded tokens read, of as many experts."""
        for step in range(STEPS):
            for i, stack in enumerate(self.stacks):
                (stack[(step + i) % len(stack)] if stack.ndim > 2 else stack).sum()

    def prefill(self) -> dict[str, Cell]:
        check_equal("prefill", self.ours(self.ids), self.theirs(self.ids).logits, 1e-5)
        calls = {"prefill": lambda: self.theirs(self.ids)}
        cells = ratios(lambda: self.ours(self.ids), calls, self.repeats)
        return {"prefill": cells["prefill"], "prefill_time": milliseconds(cells["plain"])}

    def routers(self) -> dict[str, Cell]:
        with l4.trace(self.ours, "layers.*.router.*"):
            tap = self.ours.tap  # one trace for all calls, as around a generation

        def traced(call: Callable[[], Tensor]) -> Tensor:
            self.ours.tap, before = tap, self.ours.tap
            try:
                return call()
            finally:
                self.ours.tap = before

        def plain() -> Tensor:
            return self.ours(self.ids)

        check_equal("prefill traced", traced(plain), plain(), 0.0)
        mine, watched = Decoder.of_ours(self), Decoder.of_ours(self)
        check_equal("decode traced", traced(watched.step), mine.step(), 0.0)
        calls = {"routers": lambda: traced(plain)}
        found = ratios(plain, calls, 3 * self.repeats)
        calls = {"decode_routers": lambda: traced(watched.step)}
        found |= ratios(mine.step, calls, self.most_steps - 1)
        return {name: found[name] for name in ("routers", "decode_routers")}

    def attention(self) -> dict[str, Cell]:
        """Time one layer's attention to a longer prompt, which no number of experts changes."""
        shape = 1, self.config.num_attention_heads, CHUNKS * CHUNK, self.config.head_dim
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        position = torch.arange(shape[2])[None]
        mask = visible(position, position, CHUNK)[:, None]
        none = k[:, :, :0]

        def masked() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        def folded() -> Tensor:
            return attend(q, k, v, none, none, CHUNK)

        def theirs() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def whole() -> Tensor:
            return attend(q, k, v, none, none)

        check_equal("attention in chunks", folded(), masked(), 1e-5)
        check_equal("attention to all before", whole(), theirs(), 1e-5)
        cells = ratios(folded, {"attention": masked}, 2 * self.repeats)
        cells |= ratios(whole, {"causal": theirs}, 2 * self.repeats)
        return {name: cells[name] for name in ("attention", "causal")}

    def load(self) -> dict[str, Cell]:
        found = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folders = {"load": Path(name) / "own", "load_int8": Path(name) / "int8"}
            l4.convert(self.folder, folders["load"])
            l4.convert(self.folder, folders["load_int8"], quantize="int8")
            expected = self.ours(self.ids)
            check_equal("our own folder", l4.load(folders["load"])(self.ids), expected, 0.0)
            for row, folder in (folders | {"load_theirs": self.folder}).items():
                times = [clocked(partial(l4.load, folder)) for _ in range(2 * self.repeats)]
                found[row] = Cell(f"{min(times) * 1e3:.1f}", min(times) * 1e3)
        return found

    def imports(self) -> dict[str, Cell]:
        code = (
            "import time, torch; start = time.process_time(); import llama4_lab; "
            "print(time.process_time() - start)"
        )
        runs = [
            subprocess.check_output([sys.executable, "-c", code])
            for _ in range(min(5, self.repeats))
        ]
        seconds = min(map(float, runs))
        return {"import": Cell(f"{seconds:.2f}", seconds)}

    @property
    def most_steps(self) -> int:
        """How often a decoder can step, besides a first time."""
        return (self.ids.shape[1] - PROMPT) // STEPS - 1


class Decoder:
    """Goes on from a prompt, one token at a time; a step is `STEPS` of them."""

    def __init__(self, ids: Tensor, forward: Callable[[Tensor], Tensor]):
        self.ids, self.forward, self.position = ids, forward, PROMPT
        forward(ids[:, :PROMPT])

    @classmethod
    def of_ours(cls, bench: Bench) -> "Decoder":
        cache = bench.ours.new_cache()
        return cls(bench.ids, lambda ids: bench.ours(ids, cache=cache))

    @classmethod
    def of_theirs(cls, bench: Bench) -> "Decoder":
        from transformers import DynamicCache

        cache = DynamicCache(config=bench.theirs.config)
        return cls(bench.ids, lambda ids: bench.theirs(ids, past_key_values=cache).logits)

    def step(self) -> Tensor:
        start, self.position = self.position, self.position + STEPS
        return torch.cat(
            [self.forward(self.ids[:, i : i + 1]) for i in range(start, self.position)], dim=1
        )


def milliseconds(cell: Cell, per: float = 1.0) -> Cell:
    assert cell.value is not None
    return Cell(f"{cell.value * 1e3 / per:.2f}", cell.value * 1e3 / per)


def clocked(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


# ---- the table


def table(found: dict[int, dict[str, Cell]]) -> str:
    """Lay out the rows that were measured, a column for each number of experts."""
    lines = [["what", *(f"{experts} experts" for experts in found), "target"]]
    for name, row in ROWS.items():
        if not any(name in cells for cells in found.values()):
            continue
        texts = []
        for experts, cells in found.items():
            cell = cells.get(name, Cell("–"))
            target = row.target.get(experts)
            text = f"{cell.text} {row.unit}" if cell.value is not None else cell.text
            if cell.value is not None and target is not None:
                text += verdict(cell.value <= target if row.is_most else cell.value >= target)
            texts.append(text)
        targets = dict.fromkeys(f"{row.target[e]:g}" for e in found if e in row.target)
        sign = "≤ " if row.is_most else "≥ "
        lines.append([row.what, *texts, sign + ", ".join(targets) if targets else ""])
    return layout(lines)


def head(config: l4.Llama4Config, tokens: int) -> str:
    names = ("llama4-lab", "torch", "numba", "transformers")
    return f"""\
{date.today()}: {", ".join(f"{name} {version(name)}" for name in names)}
Python {platform.python_version()}, one thread, float32, load {os.getloadavg()[0]:.1f}
{config.num_hidden_layers} layers, width {config.hidden_size}, experts of \
{config.intermediate_size}, {config.num_attention_heads} heads, chunks of \
{config.attention_chunk_size}; prompts of {tokens} tokens
CPU times; ratios are those of minima (of medians)
"""


def prepare(config: l4.Llama4Config, tokens: int, folder: Path, repeats: int) -> Bench:
    """Write seeded weights to a folder that both libraries open."""
    l4.save(l4.random(config), folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, tokens), generator=generator)
    return Bench(folder, config, ids, repeats)


MEASURES = ("decode", "prefill", "routers", "attention", "load", "imports")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(MEASURES), help="rows, with commas")
    parser.add_argument("--experts", default=",".join(map(str, EXPERTS)), help="with commas")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := [row for row in only if row not in MEASURES]:
        parser.error(f"unknown row {unknown[0]!r}; choose from {', '.join(MEASURES)}")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for part in (probe, attention, one_token):
        part.LOADING.wait()
    found: dict[int, dict[str, Cell]] = {}
    for experts in map(int, given.experts.split(",")):
        cells = found[experts] = {}
        with tempfile.TemporaryDirectory() as folder:
            config = CONFIG.replace(num_local_experts=experts)
            bench = prepare(config, given.tokens, Path(folder), given.repeats)
            for row in only:
                cells |= getattr(bench, row)()
    print(head(CONFIG, given.tokens), table(found), sep="\n")


if __name__ == "__main__":
    main()
