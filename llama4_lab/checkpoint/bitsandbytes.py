"""Checkpoints of bitsandbytes, in its 4-bit kinds (nf4, fp4) and LLM.int8, read as plain weights.

Of 4 bits, two codes of neighbours lie in a byte, the first in its upper half, rows after each
other; a code is a number of ``quant_map``, times the ``absmax`` of its block of neighbours. With
double quantisation those are codes of 8 bits, with blocks and an offset of their own. Block sizes
and the weight's shape are JSON in ``quant_state.bitsandbytes__nf4``. Of 8 bits, each row has its
largest size in ``SCB``. The router and routed experts are plain, or these lie one by one
(`bitsandbytes.functional.QuantState`, `bitsandbytes.nn.Linear8bitLt`, and
`SequentialLlama4TextExperts` of transformers).
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from llama4_lab.checkpoint.files import Stored, describing
from llama4_lab.checkpoint.parts import Format, Layout, Rows

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_BLOCKED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_UNUSED = (".weight_format",)


@dataclass(frozen=True)
class Blocks(Rows):
    """Codes of 4 bits: the codes, their state, and the tensors of `_BLOCKED`."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]  # of blocks of codes, and of blocks of the blocks' absmax
    offset: float

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, _, absmax, numbers, *nested = held
        if nested:
            of_blocks, table = nested
            absmax = _scaled(table[absmax.int()], of_blocks, self.sizes[1]) + self.offset
        pairs = torch.stack([codes >> 4, codes & 15], dim=-1).flatten()  # an odd last one is padded
        values = numbers[pairs[: math.prod(self.shape)].int()]
        return _scaled(values, absmax, self.sizes[0]).view(self.shape)

    def pieces(self, rows: int, k: int) -> Iterator[Float[Tensor, "piece k"]]:
        yield self.read()  # blocks may go on from one row to the next

    def layout(self, rows: int, k: int) -> Layout:
        codes, state = self.held[:2]
        stands_for = f"{codes.file}: {codes.name} stands for {list(self.shape)}"
        if self.expert is not None:
            raise ValueError(
                f"{stands_for}; of routed experts only those that lie one by one are read"
            )
        if self.shape != (rows, k):
            raise ValueError(f"{stands_for} where config.json asks for {[rows, k]}")
        counts = [rows * k]
        for size in self.sizes:
            counts.append(-(-counts[-1] // size))
        layout: Layout = [(((counts[0] + 1) // 2, 1), torch.uint8), (state.shape, torch.uint8)]
        if len(self.sizes) == 1:
            return [*layout, ((counts[1],), None), ((16,), None)]
        nested: Layout = [((counts[2],), None), ((256,), None)]
        return [*layout, ((counts[1],), torch.uint8), ((16,), None), *nested]


@dataclass(frozen=True)
class Int8(Rows):
    """Codes of 8 bits and the largest size of each row, which the code 127 stands for."""

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        codes, largest = held
        return codes.float().mul_(largest[:, None]).mul_(1 / 127)

    def layout(self, rows: int, k: int) -> Layout:
        return [((rows, k), torch.int8), ((rows,), None)]


def format_of() -> Format:
    """Return how weights are found and turned back."""

    @cache
    def states(file: Path) -> dict[str, dict[str, Any]]:
        with safe_open(file, "pt") as held:
            named = {name: held.get_tensor(name) for name in held.keys() if _STATE in name}  # noqa: SIM118
        with describing(file):
            return {name: json.loads(bytes(state.tolist())) for name, state in named.items()}

    def coded(name: str, tensors: Mapping[str, Stored]) -> Rows | None:
        if (codes := tensors.get(name)) is None:
            return None
        if largest := tensors.get(f"{name.removesuffix('.weight')}.SCB"):
            return Int8((codes, largest))
        kinds = (tensors.get(f"{name}{_STATE}{kind}") for kind in _KINDS)
        if (state := next(filter(None, kinds), None)) is None:
            return None
        said = states(state.file)[state.name]
        nested = "nested_blocksize" in said
        parts = [f"{name}.{part}" for part in (_BLOCKED if nested else _BLOCKED[:2])]
        if missing := [part for part in parts if part not in tensors]:
            raise ValueError(f"{codes.file} lacks {missing[0]}, which {state.name} asks for")
        with describing(state.file):
            sizes = [int(said[size]) for size in ("blocksize", "nested_blocksize")[: 1 + nested]]
            offset = float(said["nested_offset"]) if nested else 0.0
            shape = tuple(int(size) for size in said["shape"])
        return Blocks(
            (codes, state, *(tensors[part] for part in parts)), shape, tuple(sizes), offset
        )

    return Format(coded, _UNUSED)


def _scaled(numbers: Float[Tensor, " n"], scales: Tensor, size: int) -> Float[Tensor, " n"]:
    """Multiply each block of so many numbers with its scale; the last may be shorter."""
    return numbers.mul_(scales.float().repeat_interleave(size)[: len(numbers)])
