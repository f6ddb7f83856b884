"""How early the routing is what it will be: in training, and in depth."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llama4_lab.analysis.information import information
from llama4_lab.analysis.load import entropy
from llama4_lab.analysis.routing import Batch, choices, moe_layers, uniform_topk
from llama4_lab.model import Llama4


@dataclass(eq=False)
class Saturation:
    """How often two models chose the same experts for the same tokens, counted as they come.

    `share` is OLMoE's router saturation (Muennighoff et al. 2024, section 5.1): the mean over
    tokens of the share of the top-k experts that both models chose, whatever their order.
    """

    shared: Int[np.ndarray, " l"]
    choices: int = 0

    @classmethod
    def empty(cls, layers: int) -> "Saturation":
        return cls(np.zeros(layers, dtype=np.int64))

    @property
    def share(self) -> Float[np.ndarray, " l"]:
        """The saturation by layer, in [0, 1]; about topk / e between strangers.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.choices:
            raise ValueError("no token was counted: update(early, final) first")
        return self.shared / self.choices

    def update(
        self, early: Int[np.ndarray, "l n topk"], final: Int[np.ndarray, "l n topk"]
    ) -> None:
        """Count what an early and a final model chose for n tokens."""
        self.shared = self.shared + (early[..., :, None] == final[..., None, :]).sum(axis=(1, 2, 3))
        self.choices += final.shape[1] * final.shape[2]

    def merge(self, other: "Saturation") -> None:
        """Add what another stream counted."""
        self.shared = self.shared + other.shared
        self.choices += other.choices


def saturation(early: Llama4, final: Llama4, batches: Iterable[Batch]) -> Saturation:
    """Compare the choices of an early checkpoint with those of the final model, batch by batch.

    Raises:
        ValueError: models of different MoE layers, experts or top-k.
    """
    routes = [
        (moe_layers(model), model.config.num_local_experts, uniform_topk(model))
        for model in (early, final)
    ]
    if routes[0] != routes[1]:
        raise ValueError(
            f"(MoE layers, experts, top-k) of the models are {routes[0]} and {routes[1]}: compare "
            "checkpoints of one model"
        )
    found = Saturation.empty(len(routes[1][0]))
    for batch in batches:
        found.update(choices(early, batch).expert, choices(final, batch).expert)
    return found


def depth_saturation(to_last: Int[np.ndarray, "l e e"]) -> Float[np.ndarray, " l"]:
    """Return how much of the last layer's choice a layer's choice tells, in [0, 1] by layer.

    It is the mutual information over the last layer's entropy. Experts of two layers have nothing
    in common but their number, so that overlap would compare names. It is 1 in the last layer;
    `against_shuffles` tells how much of it few tokens would show by chance.
    """
    told, whole = information(to_last), entropy(to_last.sum(axis=1))
    return np.divide(told, whole, where=whole > 0, out=np.ones_like(whole))
