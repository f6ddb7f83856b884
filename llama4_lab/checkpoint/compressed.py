"""Checkpoints of compressed-tensors, such as the published FP8 Maverick, read as plain weights.

A weight is stored as codes beside its ``weight_scale``, and stands for ``scale · code``: fp8 or
int8, with a scale for each row or one for all; or 4 or 8 bits, several packed into an int32, the
first in its lowest bits, with a scale for each row and group of neighbours. Routed experts lie one
by one, gate and up apart (github.com/vllm-project/compressed-tensors, `compressors`). Programs that
serve such weights may round activations too; here these stay as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import CODES, Stored, check, describing, first_of, map_tensor
from llama4_lab.config import Llama4Config

METHOD = "compressed-tensors"
_PACKED = "pack-quantized"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", _PACKED)
_OF_ACTIVATIONS = (".input_scale", ".output_scale")
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Part:
    """Some rows of a weight: codes with their scales, or plain numbers."""

    codes: Stored
    scales: Stored | None
    bits: int | None  # of each of several codes that an int32 holds

    def read(self) -> Float[Tensor, "rows k"]:
        codes = map_tensor(self.codes)
        if self.scales is None:
            return codes
        if self.bits is not None:
            places = torch.arange(0, 32, self.bits)
            codes = (codes[..., None] >> places & (1 << self.bits) - 1).flatten(-2)
            codes = codes - (1 << self.bits - 1)
        groups = self.scales.shape[1] if len(self.scales.shape) == 2 else 1
        scales = map_tensor(self.scales).float().reshape(-1, groups, 1)
        return (codes.float().unflatten(-1, (groups, -1)) * scales).flatten(-2)

    @property
    def nbytes(self) -> int:
        held = [self.codes] if self.scales is None else [self.codes, self.scales]
        dtypes = [CODES.get(str(stored.dtype), stored.dtype) for stored in held]
        sizes = [dtype.itemsize for dtype in dtypes if isinstance(dtype, torch.dtype)]
        return sum(math.prod(one.shape) * size for one, size in zip(held, sizes, strict=True))


def packed_bits(layout: dict[str, Any], path: Path) -> int | None:
    """Return how many bits a code has where an int32 holds several, and None elsewhere.

    Raises:
        ValueError: another format, or codes of other sizes.
    """
    if (found := layout.get("format")) not in _FORMATS:
        raise ValueError(
            f"{path}: weights of {METHOD} in the format {found!r}: only {', '.join(_FORMATS)} are "
            "read; convert the bfloat16 checkpoint with `llama4-lab convert --quantize`"
        )
    if found != _PACKED:
        return None
    with describing(path):
        bits = {group["weights"]["num_bits"] for group in layout["config_groups"].values()}
    if bits not in ({4}, {8}):
        raise ValueError(f"{path}: packed weights of {sorted(bits)} bits: only 4 or 8 are read")
    return bits.pop()


def take_parts(
    tensors: dict[str, Stored], config: Llama4Config, bits: int | None, listing: Path
) -> dict[str, list[Part]]:
    """Take out of `tensors`, which are under our names, those that stand for weights of ours.

    The parts of a weight follow each other along its rows; a stack's are those of expert after
    expert.

    Raises:
        ValueError: an expert that is missing.
    """
    for name in [name for name in tensors if name.endswith(_OF_ACTIVATIONS)]:
        del tensors[name]
    names: dict[str, list[str]] = {}
    for i in config.routed_layers:
        experts = f"layers.{i}.feed_forward.experts"
        for ours, halves in _HALVES.items():
            if f"{experts}.{ours}" not in tensors:
                each = range(config.num_local_experts)
                names[f"{experts}.{ours}"] = [
                    f"{experts}.{e}.{half}.weight" for e in each for half in halves
                ]

    def part(name: str) -> Part:
        plain, scales = tensors.pop(name, None), tensors.pop(f"{name}_scale", None)
        tensors.pop(f"{name}_shape", None)
        return Part(plain or tensors.pop(f"{name}_packed"), scales, None if plain else bits)

    known = {name.removesuffix("_packed") for name in tensors}
    if missing := [name for theirs in names.values() for name in theirs if name not in known]:
        raise ValueError(f"{listing} lacks {first_of(missing)}, which config.json asks for")
    parts = {ours: [part(name) for name in theirs] for ours, theirs in names.items()}
    scaled = [n.removesuffix("_scale") for n in tensors if n.endswith(".weight_scale")]
    return parts | {name: [part(name)] for name in scaled if name in known}


def check_parts(
    parts: Sequence[Part], shape: tuple[int, ...], *, listing: Path, config: str
) -> None:
    """Compare what stands for a weight with the weight's shape.

    Raises:
        ValueError: as `llama4_lab.checkpoint.files.check`.
    """
    rows, k = math.prod(shape[:-1]) // len(parts), shape[-1]
    found, expected, dtypes = {}, {}, {}
    for part in parts:
        codes, scales = part.codes, part.scales
        found[codes.name] = codes
        expected[codes.name] = rows, k if part.bits is None else k * part.bits // 32
        if scales is None:
            continue
        is_grouped = len(scales.shape) == 2 and scales.shape[0] == rows and not k % scales.shape[1]
        is_known = is_grouped or math.prod(scales.shape) in (1, rows)
        found[scales.name] = scales
        expected[scales.name] = scales.shape if is_known else (rows, 1)
        whole = torch.int8 if codes.dtype == "I8" else torch.float8_e4m3fn
        dtypes[codes.name] = whole if part.bits is None else torch.int32
    check(found, expected, listing=listing, config=config, dtypes=dtypes)
