"""Backend on batched products: every expert's rows are filled up to one common, round number.

What it wastes on zeros it gains in shapes that come again: libraries that prepare a kernel for each
shape (oneDNN in bfloat16 on the CPU takes over a millisecond) prepare few. Good for training on the
CPU; its memory grows with the fullest expert.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts import loop
from llama4_lab.packed import Packed

_ROUND = 128  # rows


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: Float[Tensor, "e f2 d"] | Packed,
    down: Float[Tensor, "e d f"] | Packed,
) -> Float[Tensor, "n d"]:
    """Equal `loop.apply`, which runs packed weights."""
    if isinstance(gate_up, Packed) or isinstance(down, Packed):
        return loop.apply(x, order, offsets, score, gate_up, down)
    e, load = len(gate_up), offsets.diff()
    size = -(-int(load.max()) // _ROUND) * _ROUND
    token = order // score.shape[1]
    expert = torch.arange(e, device=x.device).repeat_interleave(load)
    place = torch.arange(len(order), device=x.device) - offsets[expert] + expert * size
    rows = x[token] * score.flatten()[order, None]
    blocks = x.new_zeros(e * size, x.shape[1]).index_copy(0, place, rows).unflatten(0, (e, size))
    gate, up = torch.bmm(blocks, gate_up.mT).chunk(2, dim=-1)
    out = torch.bmm(F.silu(gate) * up, down.mT).flatten(0, 1)[place]
    return x.new_zeros(x.shape).index_add(0, token, out.to(x.dtype))
