"""Backend on ``torch.nn.functional.grouped_mm``: one call for all experts' rows.

On CUDA of compute capability 9 and up in bfloat16 it is one kernel without a host sync, and fp8
weights meet fp8 rows (`scaled`); elsewhere torch runs a loop of products. Other packed weights are
unpacked first, a layer at a time: a scratch of the layer's size in the rows' dtype.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor

from llama4_lab.experts import loop
from llama4_lab.packed import Packed

FP8 = torch.float8_e4m3fn
_DTYPES = (torch.float32, torch.bfloat16)
_ALIGN = 16  # bytes; torch refuses operands whose rows do not start at such a boundary


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: Float[Tensor, "e f2 d"] | Packed,
    down: Float[Tensor, "e d f"] | Packed,
) -> Float[Tensor, "n d"]:
    """Equal `loop.apply`; falls back to it for dtypes and widths that grouped_mm refuses."""
    if not can_run(gate_up, x) or not can_run(down, x):
        return loop.apply(x, order, offsets, score, gate_up, down)
    topk = score.shape[1]
    ends = offsets[1:].int()
    rows = x[order // topk] * score.flatten()[order, None]
    out = product(gated(rows, gate_up, ends), down, ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return out[place] if topk == 1 else out[place].unflatten(0, (-1, topk)).sum(1)


def gated(
    rows: Float[Tensor, "m d"], gate_up: Float[Tensor, "e f2 d"] | Packed, ends: Int[Tensor, " e"]
) -> Float[Tensor, "m f"]:
    """Return ``silu(gate) * up`` of rows sorted by expert."""
    if isinstance(gate_up, Packed) and gate_up.kind == "fp8" and has_fast_kernels(rows):
        gate, up = scaled(rows, gate_up, ends).chunk(2, dim=-1)
    else:  # two products leave what elementwise kernels read fastest
        whole = gate_up.unpack(rows.dtype) if isinstance(gate_up, Packed) else gate_up
        gate, up = (product(rows, half, ends) for half in whole.chunk(2, dim=1))
    return F.silu(gate) * up


def product(
    rows: Float[Tensor, "m k"], weights: Float[Tensor, "e out k"] | Packed, ends: Int[Tensor, " e"]
) -> Float[Tensor, "m out"]:
    """Multiply the rows up to ``ends[e]``, from where the expert before ended, by expert e's."""
    if isinstance(weights, Packed):
        if weights.kind == "fp8" and has_fast_kernels(rows):
            return scaled(rows, weights, ends)
        weights = weights.unpack(rows.dtype)
    return F.grouped_mm(rows, weights.mT, offs=ends)


def scaled(
    rows: Float[Tensor, "m k"], weights: Packed, ends: Int[Tensor, " e"]
) -> Float[Tensor, "m out"]:
    """`product` in fp8: rows are rounded too, each with a scale of its own."""
    codes, scales = in_fp8(rows)
    # The public scaled_grouped_mm cannot be traced: torch 2.13 has no fake kernel for it.
    return torch._scaled_grouped_mm(  # pyright: ignore[reportPrivateImportUsage]
        codes,
        weights.codes.mT,
        scales,
        weights.scales.flatten(1),
        offs=ends,
        out_dtype=rows.dtype,
    )


def in_fp8(
    rows: Float[Tensor, "m k"],
) -> tuple[Float8e4m3fn[Tensor, "m k"], Float32[Tensor, " m"]]:
    """Round rows to float8_e4m3fn, each number by a sixteenth at most: codes, and a row's scale."""
    largest = rows.float().abs().amax(dim=1, keepdim=True)
    scales = largest.clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(FP8).max
    return (rows.float() / scales).to(FP8), scales[:, 0]


def has_fast_kernels(x: Tensor) -> bool:
    """Whether x is where torch has grouped kernels of its own: bfloat16 on Hopper and later."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def can_run(weights: Float[Tensor, "e out in"] | Packed, x: Tensor) -> bool:
    """Whether grouped_mm takes these: float32 or bfloat16, rows of whole 16-byte units."""
    size = x.element_size()
    if isinstance(weights, Packed):
        suits = not (torch.is_grad_enabled() and x.requires_grad)  # `loop` then keeps only codes
        if weights.kind == "fp8" and has_fast_kernels(x):
            size = 1
    else:
        suits = weights.dtype == x.dtype
    return suits and x.dtype in _DTYPES and all(n * size % _ALIGN == 0 for n in weights.shape[1:])
