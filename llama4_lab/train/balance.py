"""Keeping every expert busy while a router learns."""

import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.points import Tap


class RouterTap(Tap):
    """Collects the router logits of a forward pass, gradients attached."""

    def __init__(self) -> None:
        self.logits: list[Float[Tensor, "b t e"]] = []

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name.endswith("router.logits"):
            self.logits.append(value)
        return value

    def take(self) -> list[Tensor]:
        """Return what was collected since the last call, one tensor a MoE layer."""
        taken, self.logits = self.logits, []
        return taken


def switch_loss(logits: Float[Tensor, "*batch e"], topk: int = 1) -> Float[Tensor, ""]:
    """Return the load-balancing loss of the Switch Transformer (Fedus et al. 2021, eq. 4 to 6).

    ``e * sum(f * P)``: f is the share of choices that each expert gets, P the mean softmax
    probability. It is 1 when balanced and at most e. Give it the tokens of all domains together:
    balanced apart, each domain would be pushed to use every expert.
    """
    logits = logits.float().flatten(0, -2)
    e = logits.shape[-1]
    chosen = logits.topk(topk, dim=-1).indices
    share = torch.bincount(chosen.flatten(), minlength=e) / chosen.numel()
    return e * (share * logits.softmax(dim=-1).mean(0)).sum()
