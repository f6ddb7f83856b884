"""int8 and int4 codes to numbers in one pass over a GPU's memory; `llama4_lab.packed` calls it.

The same in torch's own steps writes each weight a dozen times, and needs some ten times the memory
of what comes out.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingImports=false
# (triton is not in every environment, and its decorators hide what they return)

from typing import no_type_check  # annotations here tell Triton what to compile in

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Integer
from torch import Tensor

_WEIGHTS = 8192  # of a program


@triton.jit
@no_type_check
def unpack_groups(
    codes, scales, out, COUNT, IS_INT4: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Write the weights of a block of groups; a weight's groups lie one behind the other."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    ok = (group < COUNT)[:, None]
    scale = tl.load(scales + group, mask=group < COUNT, other=0.0).to(tl.float32)[:, None]
    if IS_INT4:
        HALF: tl.constexpr = GROUP // 2
        j = tl.arange(0, HALF)[None, :]
        byte = tl.load(codes + group[:, None] * HALF + j, mask=ok, other=0)
        at = group[:, None] * GROUP + j
        low, high = (byte & 15).to(tl.float32) - 8.0, (byte >> 4).to(tl.float32) - 8.0
        tl.store(out + at, low * scale, mask=ok)
        tl.store(out + at + HALF, high * scale, mask=ok)
    else:
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        code = tl.load(codes + at, mask=ok, other=0).to(tl.float32)
        tl.store(out + at, code * scale, mask=ok)


def can_unpack(kind: str, group: int) -> bool:
    """Whether `unpack` takes such codes: int8 or int4, in groups of 2^i."""
    return kind in ("int8", "int4") and 2 <= group <= _WEIGHTS and group & (group - 1) == 0


def unpack(
    codes: Integer[Tensor, "*rows width"],
    scales: Float[Tensor, "*rows groups"],
    group: int,
    dtype: torch.dtype,
) -> Float[Tensor, "*rows k"]:
    """Return what `Packed.unpack` does, bit for bit."""
    count, is_int4 = scales.numel(), codes.dtype == torch.uint8
    out = torch.empty(
        *scales.shape[:-1], scales.shape[-1] * group, dtype=dtype, device=codes.device
    )
    groups = _WEIGHTS // group
    unpack_groups[triton.cdiv(count, groups),](
        codes.contiguous(), scales.contiguous(), out, count, is_int4, group, groups
    )
    return out
