"""Checkpoints that mlx-lm and mlx-vlm wrote for Apple's MLX, read as plain weights.

Of experts, the gates, ups and downs of all lie in three stacks ``[e, out, in]``, not transposed. A
quantised module has codes in ``weight``, several in an uint32 from its lowest bits on (of 3, 5 and
6 bits also across two), and in ``scales`` a number for each row and group of neighbours. In the
mode "affine" there is one in ``biases`` too, and a weight is ``scale · code + bias``; in the others
codes and scales are floats of 4 or 8 bits. Embeddings and routers may be quantised as well.
config.json's ``quantization`` says how, for all modules and for some of them (``quantize`` in the
documentation of ``mlx.core``; github.com/ml-explore/mlx-lm, ``models/llama4.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import Stored, describing
from llama4_lab.checkpoint.parts import Format, Layout, Rows, check_groups, e2m1, unpack

AFFINE = "affine"
_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits of a code, group
_ENDS = ("weight", "scales", "biases", "global_scale")  # of the names of a module's tensors
_OF_TEXT = "language_model."
_LARGEST = 448.0 * 6.0  # that a code of nvfp4 times its scale can be


@dataclass(frozen=True)
class Coded(Rows):
    """Codes, scales of groups, and in the affine mode biases, or in nvfp4 a scale for all."""

    mode: str
    bits: int
    group: int

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, scales, *others = held
        if self.mode == "mxfp8":
            numbers = codes.contiguous().view(torch.float8_e4m3fn).float()
        else:
            whole = unpack(codes, self.bits)
            numbers = whole.float() if self.mode == AFFINE else e2m1(whole)
        numbers = numbers.unflatten(-1, (-1, self.group))
        if self.mode == "nvfp4":
            scales = scales.view(torch.float8_e4m3fn).float()
            for largest in others:
                scales = scales * (largest / _LARGEST)
        elif self.mode != AFFINE:
            scales = scales.view(torch.float8_e8m0fnu)
        numbers *= scales[..., None].float()
        if self.mode == AFFINE:
            (biases,) = others
            numbers += biases[..., None].float()
        return numbers.flatten(-2)

    def layout(self, rows: int, k: int) -> Layout:
        check_groups(self.held[0], self.group, k)
        groups = rows, k // self.group
        codes = (rows, k * self.bits // 32), torch.uint32
        if self.mode == AFFINE:
            return [codes, (groups, None), (groups, None)]
        return [codes, (groups, torch.uint8), ((), torch.float32)][: len(self.held)]


def is_layout(layout: Mapping[str, Any]) -> bool:
    """Whether config.json's ``quantization`` is one of MLX."""
    return {"bits", "group_size"} <= layout.keys() and "quant_method" not in layout


def format_of(layout: Mapping[str, Any], path: Path) -> Format:
    """Return how weights are found and turned back, as config.json describes it.

    Raises:
        ValueError: codes of other modes or sizes.
    """
    known = {None: _setting(layout, path)} | {
        name: _setting(value, path) for name, value in layout.items() if isinstance(value, dict)
    }

    def coded(name: str, tensors: Mapping[str, Stored]) -> Rows | None:
        module = name.removesuffix(".weight")
        held = {end: tensors.get(f"{module}.{end}") for end in _ENDS}
        if (codes := held["weight"]) is None or held["scales"] is None:
            return None
        theirs = codes.name.removesuffix(".weight")
        setting = known.get(theirs) or known.get(theirs.removeprefix(_OF_TEXT)) or known[None]
        if setting[0] == AFFINE and held["biases"] is None:
            raise ValueError(f"{codes.file} lacks {theirs}.biases, which {path.name} asks for")
        return Coded(tuple(stored for stored in held.values() if stored), *setting)

    return Format(coded)


def _setting(raw: Mapping[str, Any], path: Path) -> tuple[str, int, int]:
    """Return mode, bits and group size."""
    with describing(path):
        mode, bits, group = raw.get("mode", AFFINE), raw["bits"], raw["group_size"]
        if mode == AFFINE and bits in (*range(1, 7), 8) and group in (32, 64, 128):
            return mode, bits, group
        if _FLOATS.get(mode) == (bits, group):
            return mode, bits, group
    raise ValueError(
        f"{path}: MLX's mode {mode!r} with {bits!r} bits in groups of {group!r}: only affine codes "
        f"of 1 to 6 or 8 bits in groups of 32, 64 or 128, and {', '.join(_FLOATS)} are read"
    )
