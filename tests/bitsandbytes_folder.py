"""Write a model's weights as transformers does with bitsandbytes: linears in blocks of codes.

Spelled out from ``bitsandbytes.functional``, so that it shares nothing with the reader.
"""

import json
from functools import partial
from pathlib import Path

import torch
from compressed_folder import one_by_one
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK, OF_BLOCKS = 64, 256
# The middles of 16 equally likely slices of a normal distribution, as of QLoRA's nf4.
NORMAL = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 16))


def write_bitsandbytes(plain: Path, folder: Path, kind: str, experts: bool = True) -> Path:
    """Quantise the linears of transformers' folder but the router, the read-out and the projector.

    `experts` puts routed experts one by one, and quantises them; else they stay. Kinds are "nf4",
    "nf4 twice" and "int8". Returns a folder in transformers' layout with the weights that the codes
    stand for.
    """
    folder.mkdir()
    rounded = folder.with_name(f"{folder.name}_rounded")
    rounded.mkdir()
    written, meant = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if ".experts." in name and experts:
            tensors, meant[name] = one_by_one(name, weight, partial(_coded, kind=kind))
            written |= tensors
        elif name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")):
            tensors, meant[name] = _coded(name, weight, kind)
            written |= tensors
        else:
            written[name] = meant[name] = weight
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    save_file(meant, rounded / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": kind != "int8",
        "_load_in_8bit": kind == "int8",
        "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "router"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return rounded


def _coded(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return what is stored of a weight, and the weight that it stands for."""
    if kind == "int8":
        largest = weight.abs().amax(-1)
        codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
        tensors = {name: codes.contiguous(), f"{name.removesuffix('weight')}SCB": largest}
        tensors[f"{name.removesuffix('.weight')}.weight_format"] = torch.tensor(0).byte()
        return tensors, codes.float() * largest[:, None] * (1 / 127)
    numbers = NORMAL / NORMAL.max()
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(-1)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32"}
    tensors = {f"{name}.quant_map": numbers, f"{name}.absmax": absmax}
    if kind == "nf4 twice":
        table, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        rest = absmax - offset
        largest = torch.stack([block.abs().max() for block in rest.split(OF_BLOCKS)])
        each = largest[:, None].expand(-1, OF_BLOCKS).flatten()[: len(rest)]
        codes = ((rest / each)[:, None] - table).abs().argmin(-1)
        absmax = table[codes] * each + offset
        state |= {"nested_blocksize": OF_BLOCKS, "nested_dtype": "float32"}
        state |= {"nested_offset": offset}
        tensors[f"{name}.absmax"] = codes.byte()
        tensors |= {f"{name}.nested_absmax": largest, f"{name}.nested_quant_map": table}
    each = absmax[:, None].expand(-1, BLOCK).flatten()[: len(flat)]
    codes = ((flat / each)[:, None] - numbers).abs().argmin(-1)
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    tensors[name] = (pairs[:, 0] * 16 + pairs[:, 1]).byte()[:, None]
    state |= {"shape": list(weight.shape)}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = text
    return tensors, (numbers[codes] * each).view(weight.shape)
