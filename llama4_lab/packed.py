"""Weights in few bits: int8, int4 and fp8 codes with scales, in one layout for every kernel.

Codes are symmetric, ``weight ≈ scale · code``, along the last axis, which is the one that a product
contracts:

- int8: a scale for every `group` neighbours; codes −127 … 127.
- int4: likewise with codes −7 … 7, two to a byte: byte j of a group holds code j in its low four
  bits and code ``j + group / 2`` in its high ones, each plus 8. Both halves of a group then meet
  neighbouring inputs.
- fp8: a scale for a whole row, codes in float8_e4m3fn: what scaled matrix products take.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

KINDS = ("int8", "int4", "fp8")
GROUP = 128
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight ``[*rows, k]`` in few bits; an index picks along the first axis, as on a tensor."""

    kind: str
    codes: Tensor  # int8 or float8_e4m3fn [*rows, k]; int4: uint8 [*rows, k / 2]
    scales: Float[Tensor, "*rows groups"]  # bfloat16, of fp8 float32 with one group

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that this stands for."""
        width = self.codes.shape[-1] * (2 if self.kind == "int4" else 1)
        return torch.Size([*self.codes.shape[:-1], width])

    @property
    def group(self) -> int:
        """How many neighbours along the last axis share a scale."""
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int | slice) -> "Packed":
        return Packed(self.kind, self.codes[index], self.scales[index])

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(self.kind, self.codes.to(device), self.scales.to(device))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*rows k"]:
        """Return the weight that the codes stand for; the product is taken in float32."""
        codes = unpack_nibbles(self.codes, self.group) if self.kind == "int4" else self.codes
        grouped = codes.float().unflatten(-1, (-1, self.group))
        return (grouped * self.scales.float()[..., None]).flatten(-2).to(dtype)


def pack(weight: Float[Tensor, "*rows k"], kind: str, group: int | None = None) -> Packed:
    """Round a weight to the nearest codes; the largest of each group keeps its value.

    Each number is off by at most half a scale, which is its group's largest over 127 (int8) or 7
    (int4), and by what the scale itself is rounded; fp8 is off by a sixteenth at most.

    Args:
        group: None takes 128, or the largest power of two below it that divides k.

    Raises:
        ValueError: an unknown kind, or a group that does not divide the row.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of packed weights; choose {', '.join(KINDS)}")
    k = weight.shape[-1]
    if kind == "fp8":
        group = k
    elif group is None:
        group = min(GROUP, k & -k)
    if group < 1 or k % group or (kind == "int4" and group % 2):
        raise ValueError(
            f"rows of {k} weights cannot be cut into groups of {group} for {kind}: give a divisor"
            + (" that is even" if kind == "int4" else "")
        )
    grouped = weight.detach().float().unflatten(-1, (-1, group))
    scales = grouped.abs().amax(dim=-1) / _LARGEST[kind]
    scales = scales if kind == "fp8" else scales.bfloat16()
    scaled = grouped / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if kind == "fp8":
        return Packed(kind, scaled.flatten(-2).to(torch.float8_e4m3fn), scales)
    codes = scaled.round().clamp(-_LARGEST[kind], _LARGEST[kind]).to(torch.int8).flatten(-2)
    return Packed(kind, pack_nibbles(codes, group) if kind == "int4" else codes, scales)


def pack_nibbles(codes: Tensor, group: int) -> UInt8[Tensor, "*rows half"]:
    """Put two codes of −8 … 7 into each byte, as the module's first lines say."""
    low, high = (
        (x + 8).to(torch.uint8)
        for x in rearrange(codes, "... (n two j) -> two ... (n j)", two=2, j=group // 2)
    )
    return low | high << 4


def unpack_nibbles(packed: UInt8[Tensor, "*rows half"], group: int) -> Tensor:
    """Undo `pack_nibbles`: int8 codes ``[*rows, k]``."""
    both = torch.stack([packed & 15, packed >> 4]).to(torch.int8) - 8
    return rearrange(both, "two ... (n j) -> ... (n two j)", j=group // 2)
