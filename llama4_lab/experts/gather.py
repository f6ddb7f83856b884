"""Backend for few tokens in plain torch: each slot picks its expert's weights and multiplies.

Written as products and sums, not as a matrix product: ``torch.compile`` then fuses the pick into
the sum, and every chosen weight is read once and never copied. Nothing depends on the routing but
an index on the device: no host sync, static shapes, one graph.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import grouped
from llama4_lab.packed import Packed

_MOST = 16  # slots; each reads, and uncompiled copies, the weights of an expert of its own


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: Float[Tensor, "e f2 d"] | Packed,
    down: Float[Tensor, "e d f"] | Packed,
) -> Float[Tensor, "n d"]:
    """Equal `loop.apply`; hands more than 16 slots to `grouped`."""
    if len(order) > _MOST:
        return grouped.apply(x, order, offsets, score, gate_up, down)
    place = torch.arange(len(order), device=x.device)
    expert = (offsets[1:, None] <= place).sum(0)
    token = order // score.shape[1]
    rows = x[token] * score.flatten()[order, None]
    gate, up = (pick(gate_up, expert, x.dtype) * rows[:, None]).sum(-1).chunk(2, dim=-1)
    out = (pick(down, expert, x.dtype) * (F.silu(gate) * up)[:, None]).sum(-1)
    return x.new_zeros(x.shape).index_add(0, token, out)


def pick(
    weights: Float[Tensor, "e out k"] | Packed, expert: Int[Tensor, " m"], dtype: torch.dtype
) -> Float[Tensor, "m out k"]:
    """Return each slot's expert."""
    if isinstance(weights, Packed):
        return Packed(weights.kind, weights.codes[expert], weights.scales[expert]).unpack(dtype)
    return weights[expert]
