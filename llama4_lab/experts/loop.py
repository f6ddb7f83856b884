"""The readable backend: one expert after the other. Every other backend must equal it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts.mapped import Mapped
from llama4_lab.packed import Packed, linear
from llama4_lab.points import NO_TAP, Tap


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: Float[Tensor, "e f2 d"] | Packed | Mapped,
    down: Float[Tensor, "e d f"] | Packed | Mapped,
    record: Tap = NO_TAP,
) -> Float[Tensor, "n d"]:
    """Run each token through its chosen experts and sum over the choices.

    The score multiplies the expert's *input*: with a nonlinear expert that is not the same as
    scaling its output.
    """
    load = offsets.diff().tolist()
    asked = [expert for expert, tokens in enumerate(load) if tokens]
    inverse = order.argsort()

    def per_expert(rows: Tensor, weights: Tensor | Packed | Mapped) -> Tensor:
        blocks = rows.flatten(0, 1)[order].split(load)
        if isinstance(weights, Mapped):
            each = weights.in_turn(asked)
        else:
            # A tensor is cut at once, so that its gradient is put together once.
            cut = weights.unbind(0) if isinstance(weights, Tensor) else weights
            each = (cut[expert] for expert in asked)
        done = [linear(blocks[expert], next(each)) for expert in asked]
        done = done or [rows.new_empty(0, weights.shape[1])]
        return torch.cat(done)[inverse].unflatten(0, score.shape)

    inputs = record("experts.in", x[:, None] * score[..., None])
    gate, up = per_expert(inputs, gate_up).chunk(2, dim=-1)
    hidden = record("experts.hidden", F.silu(gate) * up)
    return record("experts.out", per_expert(hidden, down)).sum(1)


class Noting(Tap):
    """Shows values to another tap, and notes whether it changes any."""

    def __init__(self, tap: Tap):
        self._tap = tap
        self.watches = tap.watches
        self.has_changed = False

    def __call__(self, name: str, value: Tensor) -> Tensor:
        before = value.clone() if self.watches(name) else value  # it may be changed in its place
        given = self._tap(name, value)
        is_new = given.requires_grad and given is not value  # a gradient may be asked for
        self.has_changed |= is_new or not (given is before or torch.equal(given, before))
        return given
