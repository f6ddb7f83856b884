"""Keeping every expert busy while a router learns: by a loss, or by a bias that ends at nothing."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama4_lab.analysis.load import switch_loss
from llama4_lab.config import Llama4Config
from llama4_lab.points import Tap

__all__ = ["Bias", "RouterTap", "switch_loss"]


class Bias:
    """A number for each expert that is added to its logits when experts are chosen, and only then.

    After a step it rises by `rate` for experts with too few tokens, and falls for those with too
    many (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts").
    Llama 4's routers have none, so it counts less and less from half of a run on, and nothing over
    the last tenth, in which the routers learn to do without.
    """

    def __init__(self, config: Llama4Config, rate: float, device: torch.device):
        layers = len(config.routed_layers)
        self.rate, self.topk = rate, config.num_experts_per_tok
        self.value: Float[Tensor, "l e"] = torch.zeros(
            layers, config.num_local_experts, device=device
        )

    def at(self, done: float) -> Float[Tensor, "l e"]:
        """Return what is added when the share `done` of a run is over."""
        return self.value * min(1.0, max(0.0, (0.9 - done) / 0.4))

    def adjust(self, routers: list[Float[Tensor, "n e"]], added: Float[Tensor, "l e"]) -> None:
        """Take in a step's router logits, to which the bias `added` was added, by layer."""
        for own, logits, bias in zip(self.value, routers, added, strict=True):
            chosen = (logits.detach() + bias).topk(self.topk).indices.flatten()
            load = F.one_hot(chosen, len(own)).float().mean(0)
            own += self.rate * (1 / len(own) - load).sign()


class RouterTap(Tap):
    """Collects a forward pass's router logits, gradients attached; a bias may help to choose."""

    def __init__(self, bias: Float[Tensor, "l e"] | None = None) -> None:
        self.logits: list[Float[Tensor, "b t e"]] = []
        self.bias = bias

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name.endswith("router.logits"):
            self.logits.append(value)
        elif self.bias is not None and name.endswith("router.indices"):
            own = self.bias[len(self.logits) - 1]
            return (self.logits[-1].detach() + own).topk(value.shape[-1]).indices
        return value

    def take(self) -> list[Tensor]:
        """Return what was collected since the last call, one tensor a MoE layer."""
        taken, self.logits = self.logits, []
        return taken
