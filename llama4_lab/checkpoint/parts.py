"""Weights that lie in files otherwise than the model holds them, and are made when they are read.

A weight of ours is a list of `Rows` then, which follow each other along its rows; those of a stack
are of expert after expert. `llama4_lab.checkpoint.compressed`, `.modelopt`, `.bitsandbytes` and
`.mlx` say what the codes of those programs stand for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from llama4_lab.checkpoint.files import (
    CODES,
    PIECE,
    PartReader,
    Stored,
    check,
    first_of,
    map_tensors,
)
from llama4_lab.config import Llama4Config

# The halves of a stack, which lie apart: one expert's ``gate_proj.weight``, or those of all.
HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

Layout = list[tuple[tuple[int, ...], torch.dtype | None]]
"""Shapes and dtypes of the tensors that hold some rows; None is the dtype of a weight."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight, and the tensors that hold them: one of plain numbers, here.

    Of stacks, whose first axis counts experts, `expert` says whose rows are meant.
    """

    held: tuple[Stored, ...]
    expert: int | None = field(default=None, kw_only=True)

    def turn_back(self, *held: Tensor) -> Float[Tensor, "rows k"]:
        """Return the numbers that tensors stand for."""
        (plain,) = held
        return plain

    def layout(self, rows: int, k: int) -> Layout:
        """Return how the tensors of so many rows of k weights should be.

        Raises:
            ValueError: they cannot lie so.
        """
        return [((rows, k), None)]

    def read(self) -> Float[Tensor, "rows k"]:
        return self.turn_back(*self._tensors())

    def pieces(self, rows: int, k: int) -> Iterator[Float[Tensor, "piece k"]]:
        """Yield the rows in order, an expert's or some 64 million weights at a time."""
        step = max(1, PIECE // k) if self.expert is None else rows
        for start in range(0, rows, step):
            held = self._tensors()
            yield self.turn_back(
                *(t[start : start + step] if t.ndim and len(t) == rows else t for t in held)
            )

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        sizes = []
        for stored in self.held:
            dtype = CODES.get(str(stored.dtype), stored.dtype)
            assert isinstance(dtype, torch.dtype)
            shape = stored.shape[self.expert is not None :]
            sizes.append(math.prod(shape) * dtype.itemsize)
        return sum(sizes)

    def _tensors(self) -> list[Tensor]:
        tensors = map_tensors(self.held)
        if self.expert is None:
            return tensors
        return [tensor[self.expert] if tensor.ndim else tensor for tensor in tensors]


@dataclass(frozen=True)
class Opened:
    """Rows that are read again and again, from files that stay open."""

    rows: Rows
    readers: tuple[PartReader, ...]

    @classmethod
    def of(cls, rows: Rows) -> "Opened":
        return cls(rows, tuple(map(PartReader, rows.held)))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def read(self) -> Float[Tensor, "rows k"]:
        expert = self.rows.expert
        return self.rows.turn_back(
            *(read(expert if read.stored.shape else None) for read in self.readers)
        )


@dataclass(frozen=True)
class Format:
    """How a program's codes are found; by default, of plain numbers, there are none."""

    coded: Callable[[str, Mapping[str, Stored]], Rows | None] = lambda name, tensors: None
    unused: tuple[str, ...] = ()  # endings of tensors without which weights are turned back


def take_parts(
    tensors: dict[str, Stored], config: Llama4Config, form: Format, listing: Path
) -> dict[str, list[Rows]]:
    """Take out of `tensors`, which are under our names, those that stand for weights of ours.

    Raises:
        ValueError: an expert that is missing.
    """

    def found(name: str) -> Rows | None:
        return form.coded(name, tensors) or (Rows((tensors[name],)) if name in tensors else None)

    for name in [name for name in tensors if form.unused and name.endswith(form.unused)]:
        del tensors[name]
    parts: dict[str, list[Rows]] = {}
    experts = range(config.num_local_experts)
    for i in config.routed_layers:
        base = f"layers.{i}.feed_forward.experts"
        for ours, halves in HALVES.items():
            if f"{base}.{ours}" in tensors:  # transformers' stack, and plain if nothing tells
                if (stack := form.coded(f"{base}.{ours}", tensors)) is not None:
                    parts[f"{base}.{ours}"] = [replace(stack, expert=e) for e in experts]
                continue
            names = [f"{base}.{half}.weight" for half in halves]
            stacks = {name: found(name) for name in names}
            if any(stacks.values()):
                rows = [one and replace(one, expert=e) for e in experts for one in stacks.values()]
            else:
                names = [f"{base}.{e}.{half}.weight" for e in experts for half in halves]
                rows = [found(name) for name in names]
            if not any(rows):
                continue  # which is told by whoever asks for the whole
            if missing := [name for name, one in zip(names, rows, strict=False) if one is None]:
                raise ValueError(f"{listing} lacks {first_of(missing)}, which config.json asks for")
            parts[f"{base}.{ours}"] = [one for one in rows if one]
    taken = {stored for rows in parts.values() for one in rows for stored in one.held}
    for name in {name.removesuffix("_packed") for name, t in tensors.items() if t not in taken}:
        if name.endswith(".weight") and (rows := form.coded(name, tensors)):
            parts[name] = [rows]
            taken.update(rows.held)
    for name in [name for name, stored in tensors.items() if stored in taken]:
        del tensors[name]
    return parts


def check_parts(
    parts: Sequence[Rows], shape: tuple[int, ...], *, listing: Path, config: str
) -> None:
    """Compare what stands for a weight with the weight's shape.

    Raises:
        ValueError: as `llama4_lab.checkpoint.files.check`.
    """
    rows, k = math.prod(shape[:-1]) // len(parts), shape[-1]
    found, expected, dtypes = {}, {}, {}
    for part in parts:
        for stored, (each, dtype) in zip(part.held, part.layout(rows, k), strict=True):
            found[stored.name] = stored
            is_stack = part.expert is not None and stored.shape  # and no number for all experts
            expected[stored.name] = (shape[0], *each) if is_stack else each
            if dtype is not None:
                dtypes[stored.name] = dtype
    check(found, expected, listing=listing, config=config, dtypes=dtypes)


def check_groups(codes: Stored, group: int, k: int) -> None:
    """Refuse groups of neighbours that do not divide rows.

    Raises:
        ValueError: with the sizes.
    """
    if k % group:
        raise ValueError(
            f"{codes.file}: {codes.name} has groups of {group} weights, which do not divide its "
            f"rows of {k}"
        )


def unpack(packed: Integer[Tensor, "rows w"], bits: int) -> UInt8[Tensor, "rows k"]:
    """Return codes of 1 to 8 bits that follow each other, each from its lowest bit on.

    Behind the last of a row may be codes of the bits that are left.

    >>> unpack(torch.tensor([[0x21, 0x43, 0x65, 0x87]], dtype=torch.uint8), 4)
    tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    """
    # Eight codes fill as many bytes as a code has bits; each lies in one byte or in two.
    of_rows = packed.flatten().view(torch.uint8).view(len(packed), -1)
    if missing := -of_rows.shape[1] % bits:
        of_rows = torch.nn.functional.pad(of_rows, (0, missing))
    eights = of_rows.unflatten(-1, (-1, bits))
    codes = eights.new_empty(*eights.shape[:-1], 8)
    for i in range(8):
        byte, start = divmod(i * bits, 8)
        code = eights[..., byte] >> start
        if start + bits > 8:
            code |= eights[..., byte + 1] << (8 - start)
        codes[..., i] = code & ((1 << bits) - 1)
    return codes.flatten(-2)


def e2m1(codes: UInt8[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
    """Return floats of 4 bits: a sign, two of an exponent, and one after the point.

    >>> e2m1(torch.tensor([[1, 2, 7, 9]], dtype=torch.uint8))
    tensor([[ 0.5000,  1.0000,  6.0000, -0.5000]])
    """
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat([sizes, -sizes])[codes.int()]
