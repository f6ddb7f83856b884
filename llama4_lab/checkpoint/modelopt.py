"""Checkpoints of NVIDIA's ModelOpt in FP8 and NVFP4, read as plain weights.

Codes lie where weights would, in transformers' stacks as well, beside a ``weight_scale``: of FP8
one for all, and of NVFP4, whose codes are two in a byte, the first in its lower half, one in fp8
for each row and 16 neighbours, times a ``weight_scale_2`` for all. In stacks, which hold experts
transposed, neighbours lie below each other (github.com/NVIDIA/Model-Optimizer,
``torch/export/unified_export_hf.py``). Programs that serve such weights round activations too; here
these stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import Stored
from llama4_lab.checkpoint.parts import Format, Layout, Rows, check_groups, e2m1, unpack

METHOD = "modelopt"
LISTING = "hf_quant_config.json"  # says it where config.json does not
_GROUP = 16
_SCALES = {"FP8": ("_scale",), "NVFP4": ("_scale", "_scale_2")}
_UNUSED = ("input_scale", ".k_scale", ".v_scale")  # of activations, and of cached keys and values


@dataclass(frozen=True)
class Scaled(Rows):
    """Codes with the scales of `_SCALES`."""

    algorithm: str
    is_transposed: bool

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, scales, *of_all = held
        if self.is_transposed:
            codes, scales = codes.mT, scales.mT if scales.ndim else scales
        if self.algorithm == "FP8":
            return codes.float().mul_(scales)
        (of_all,) = of_all
        numbers = e2m1(unpack(codes, 4)).unflatten(-1, (-1, _GROUP))
        return numbers.mul_((scales.float() * of_all)[..., None]).flatten(-2)

    def layout(self, rows: int, k: int) -> Layout:
        one: Layout = [((), None)]
        if self.algorithm == "FP8":
            held: Layout = [((rows, k), torch.float8_e4m3fn)]
        else:
            check_groups(self.held[0], _GROUP, k)
            held = [((rows, k // 2), torch.uint8), ((rows, k // _GROUP), torch.float8_e4m3fn)]
        if self.is_transposed:
            held = [((shape[1], shape[0]), dtype) for shape, dtype in held]
        return held + one


def format_of(layout: Mapping[str, Any], path: Path) -> Format:
    """Return how weights are found and turned back, as config.json describes it.

    Raises:
        ValueError: another algorithm.
    """
    algorithm = layout.get("quant_algo")
    if algorithm not in _SCALES:
        raise ValueError(
            f"{path}: weights of {METHOD} by {algorithm!r}: only {' and '.join(_SCALES)} are read; "
            "convert the bfloat16 checkpoint with `llama4-lab convert --quantize`"
        )

    def coded(name: str, tensors: Mapping[str, Stored]) -> Rows | None:
        stem = name if name.endswith(".weight") else f"{name}_weight"
        held = [tensors.get(each) for each in (name, *(stem + end for end in _SCALES[algorithm]))]
        known = [stored for stored in held if stored]
        if len(known) < len(held):
            return None
        return Scaled(tuple(known), algorithm, is_transposed=stem != name)

    return Format(coded, _UNUSED)
