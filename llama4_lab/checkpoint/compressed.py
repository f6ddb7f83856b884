"""Checkpoints of compressed-tensors, such as the published FP8 Maverick, read as plain weights.

A weight is stored as codes beside its ``weight_scale``, and stands for ``scale · code``: fp8 or
int8, with a scale for each row or one for all; or 4 or 8 bits, several packed into an int32, the
first in its lowest bits, with a scale for each row and group of neighbours. Routed experts lie one
by one, gate and up apart (github.com/vllm-project/compressed-tensors, `compressors`). Programs that
serve such weights may round activations too; here these stay as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import Stored, describing
from llama4_lab.checkpoint.parts import Format, Layout, Rows, unpack

METHOD = "compressed-tensors"
_PACKED = "pack-quantized"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", _PACKED)
_UNUSED = (".input_scale", ".output_scale", ".weight_shape")


@dataclass(frozen=True)
class Scaled(Rows):
    """Codes with their scales."""

    bits: int | None  # of each of several codes that an int32 holds

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, scales = held
        groups = scales.shape[1] if scales.ndim == 2 else 1
        numbers = (codes if self.bits is None else unpack(codes, self.bits)).float()
        if self.bits is not None:
            numbers -= 1 << self.bits - 1
        numbers = numbers.unflatten(-1, (groups, -1))
        return numbers.mul_(scales.float().reshape(-1, groups, 1)).flatten(-2)

    def layout(self, rows: int, k: int) -> Layout:
        codes, scales = self.held[0], self.held[1].shape
        is_grouped = len(scales) == 2 and scales[0] == rows and not k % scales[1]
        is_known = is_grouped or math.prod(scales) in (1, rows)
        if self.bits is not None:
            held = (rows, k * self.bits // 32), torch.int32
        else:
            held = (rows, k), torch.int8 if codes.dtype == "I8" else torch.float8_e4m3fn
        return [held, (scales if is_known else (rows, 1), None)]


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
    bits = None
    if found == _PACKED:
        with describing(path):
            sizes = {group["weights"]["num_bits"] for group in layout["config_groups"].values()}
        if sizes not in ({4}, {8}):
            raise ValueError(
                f"{path}: packed weights of {sorted(sizes)} bits: only 4 or 8 are read"
            )
        bits = sizes.pop()

    def coded(name: str, tensors: Mapping[str, Stored]) -> Rows | None:
        plain, scales = tensors.get(name), tensors.get(f"{name}_scale")
        codes = plain or tensors.get(f"{name}_packed")
        if codes is None or scales is None:
            return None
        return Scaled((codes, scales), None if plain else bits)

    return Format(coded, _UNUSED)
