"""Checkpoints of compressed-tensors, such as the published FP8 Maverick, read as plain weights.

A weight is stored as codes beside its ``weight_scale``, and stands for ``scale · code``: fp8 or
int8, with a scale for each row, one for all, or one for each block of a matrix; or 1 to 8 bits,
which follow each other through a row's int32s from the lowest bit on, with a scale for each row and
group of neighbours. With a ``weight_zero_point``, which is packed down the rows, it is
``scale · (code - zero)``. In NVFP4, floats of 4 bits, two in a byte, have a scale in fp8 for each
row and 16 neighbours, divided by a ``weight_global_scale``. Routed experts lie one by one, gate and
up apart (github.com/vllm-project/compressed-tensors, `compressors`). Programs that serve such
weights may round activations too; here these stay as they are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import Stored, describing
from llama4_lab.checkpoint.parts import Format, Layout, Rows, check_groups, e2m1, unpack

METHOD = "compressed-tensors"
_PACKED = "pack-quantized"
_NVFP4 = "nvfp4-pack-quantized"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", _PACKED, _NVFP4)
_GROUP = 16  # of NVFP4
_UNUSED = (  # of activations, which q, k and v of the attention are, too
    *(".weight_shape", ".input_global_scale"),
    *(f".{of}_{end}" for of in ("input", "output", *"qkv") for end in ("scale", "zero_point")),
)


@dataclass(frozen=True)
class Scaled(Rows):
    """Codes with their scales, and packed ones also with their zero points."""

    bits: int | None  # of each of several codes that an int32 holds
    block: tuple[int, int] | None  # rows and columns that share a scale

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, scales, *zeros = held
        if self.block is not None:
            down, across = self.block
            numbers, scales = codes.float(), scales.float().repeat_interleave(across, 1)
            for rows, its in zip(numbers.split(down), scales, strict=True):
                rows.mul_(its[: numbers.shape[1]])
            return numbers
        groups = scales.shape[1] if scales.ndim == 2 else 1
        if self.bits is not None:
            codes = unpack(codes, self.bits)[:, : codes.shape[1] * 32 // self.bits]
        numbers = codes.float().unflatten(-1, (groups, -1))
        if self.bits is not None and zeros:
            (packed,) = zeros
            numbers -= unpack(packed.mT, self.bits).mT[: len(codes), :, None].float()
        elif self.bits is not None:
            numbers -= 1 << self.bits - 1
        return numbers.mul_(scales.float().reshape(-1, groups, 1)).flatten(-2)

    def pieces(self, rows: int, k: int) -> Iterator[Float[Tensor, "piece k"]]:
        if self.block is not None or len(self.held) == 3:
            yield self.read()  # what some rows share is not cut
        else:
            yield from super().pieces(rows, k)

    def layout(self, rows: int, k: int) -> Layout:
        codes, scales = self.held[0], self.held[1].shape
        is_grouped = len(scales) == 2 and scales[0] == rows and not k % scales[1]
        is_known = is_grouped or math.prod(scales) in (1, rows)
        if self.bits is not None:
            if codes.shape == (rows, -(-k // (32 // self.bits))) and 32 % self.bits:
                raise ValueError(
                    f"{codes.file}: {codes.name} holds codes of {self.bits} bits with gaps, as "
                    f"{METHOD} 0.17 wrote them: write the checkpoint with a newer version"
                )
            held = (rows, k * self.bits // 32), torch.int32
        else:
            held = (rows, k), torch.int8 if codes.dtype == "I8" else torch.float8_e4m3fn
        if self.block is not None:
            down, across = self.block
            return [held, ((-(-rows // down), -(-k // across)), None)]
        layout: Layout = [held, (scales if is_known else (rows, 1), None)]
        if self.bits is not None and len(self.held) == 3:
            layout.append(((-(-rows * self.bits // 32), math.prod(scales) // rows), torch.int32))
        return layout


@dataclass(frozen=True)
class Nvfp4(Rows):
    """Floats of 4 bits, the scales of their groups, and what those are divided by."""

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, scales, of_all = held
        numbers = e2m1(unpack(codes, 4)).unflatten(-1, (-1, _GROUP))
        return numbers.mul_((scales.float() / of_all)[..., None]).flatten(-2)

    def layout(self, rows: int, k: int) -> Layout:
        check_groups(self.held[0], _GROUP, k)
        scales = (rows, k // _GROUP), torch.float8_e4m3fn
        return [((rows, k // 2), torch.uint8), scales, ((1,), None)]


def format_of(layout: Mapping[str, Any], path: Path) -> Format:
    """Return how weights are found and turned back, as config.json describes it.

    Raises:
        ValueError: another format, or codes of other sizes.
    """
    if (found := layout.get("format")) not in _FORMATS:
        raise ValueError(
            f"{path}: weights of {METHOD} in the format {found!r}: only {', '.join(_FORMATS)} are "
            "read; convert the bfloat16 checkpoint with `llama4-lab convert --quantize`"
        )
    with describing(path):
        groups = [group["weights"] for group in layout.get("config_groups", {}).values()]
        block = _block([weights.get("block_structure") for weights in groups])
        sizes = {weights["num_bits"] for weights in groups} if found == _PACKED else set()
    if found == _PACKED and sizes not in [{bits} for bits in range(1, 9)]:
        raise ValueError(
            f"{path}: packed weights of {sorted(sizes)} bits: only one size of 1 to 8 is read"
        )
    bits = sizes.pop() if sizes else None

    def coded(name: str, tensors: Mapping[str, Stored]) -> Rows | None:
        plain, scales = tensors.get(name), tensors.get(f"{name}_scale")
        codes = plain or tensors.get(f"{name}_packed")
        if codes is None or scales is None:
            return None
        if of_all := tensors.get(f"{name}_global_scale"):
            return Nvfp4((codes, scales, of_all))
        zeros = None if plain else tensors.get(f"{name}_zero_point")
        held = (codes, scales, zeros) if zeros else (codes, scales)
        return Scaled(held, None if plain else bits, block)

    return Format(coded, _UNUSED)


def _block(blocks: Sequence[Sequence[int] | None]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None where no blocks do.

    Raises:
        ValueError: blocks of several sizes.
    """
    if any(block != blocks[0] for block in blocks):
        raise ValueError(f"blocks of weights are {blocks}: only one size is read")
    if not blocks or blocks[0] is None:
        return None
    down, across = blocks[0]
    return down, across
