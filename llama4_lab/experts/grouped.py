"""Backend on ``torch.nn.functional.grouped_mm``: one call for all experts' rows.

On CUDA of compute capability 9 and up in bfloat16 it is one kernel without a host sync; elsewhere
torch runs a loop of products.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import loop

_ALIGN = 16  # bytes; torch refuses operands whose rows do not start at such a boundary


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: Float[Tensor, "e f2 d"],
    down: Float[Tensor, "e d f"],
) -> Float[Tensor, "n d"]:
    """Equal `loop.apply`; falls back to it for dtypes and widths that grouped_mm refuses."""
    if not can_run(gate_up) or not can_run(down):
        return loop.apply(x, order, offsets, score, gate_up, down)
    token = order // score.shape[1]
    ends = offsets[1:].int()
    rows = x[token] * score.flatten()[order, None]
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    return x.new_zeros(x.shape).index_add_(0, token, out)


def can_run(weights: Float[Tensor, "e out in"]) -> bool:
    """Whether grouped_mm takes these weights: float32 or bfloat16, rows of whole 16-byte units."""
    size = weights.element_size()
    return size in (2, 4) and all(n * size % _ALIGN == 0 for n in weights.shape[1:])
