"""Keeping every expert busy while a router learns."""

from jaxtyping import Float
from torch import Tensor

from llama4_lab.analysis.load import switch_loss
from llama4_lab.points import Tap

__all__ = ["RouterTap", "switch_loss"]


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
