"""Counting choices of experts in one pass over any number of tokens.

All that the statistics of `load`, `specialisation`, `transitions` and `saturation` need fits into
tables whose size does not depend on how many tokens went in.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int

from llama4_lab.analysis.load import balance, shares


@dataclass(eq=False)
class RoutingCounts:
    """Choices counted so far; the axis l runs over MoE layers.

    Documents are dealt out to folds. A fold is what bootstraps and shuffles move as one, since the
    tokens of a document are not independent: with no more documents than folds it is a document.
    """

    by_label: Int[np.ndarray, "label fold l e"]  # choices
    together: Int[np.ndarray, "l e e"]  # tokens that chose both; on the diagonal those of one
    transitions: Int[np.ndarray, "steps e e"]  # from layer to next layer, strongest experts
    to_last: Int[np.ndarray, "l e e"]  # from layer to the last layer, strongest experts
    probability: Float[np.ndarray, "l e"]  # sum over tokens of the softmax over all experts
    tokens: int = 0
    scored: int = 0  # tokens whose logits were given, and stand in `probability`

    @classmethod
    def empty(cls, layers: int, experts: int, labels: int = 1, folds: int = 64) -> "RoutingCounts":
        """Start counting: with 64 folds, Scout's 48 layers of 16 experts take 0.4 MB a label."""

        def table(*shape: int) -> np.ndarray:
            return np.zeros(shape, dtype=np.int64)

        return cls(
            by_label=table(labels, folds, layers, experts),
            together=table(layers, experts, experts),
            transitions=table(max(layers - 1, 0), experts, experts),
            to_last=table(layers, experts, experts),
            probability=np.zeros((layers, experts)),
        )

    @property
    def load(self) -> Int[np.ndarray, "l e"]:
        """How often each expert was chosen."""
        return self.by_label.sum(axis=(0, 1))

    @property
    def switch_loss(self) -> Float[np.ndarray, " l"]:
        """The Switch Transformer's load-balancing loss by layer (`llama4_lab.analysis.load`).

        Raises:
            ValueError: tokens were counted without their logits.
        """
        if self.scored != self.tokens or not self.tokens:
            raise ValueError(
                f"logits were given for {self.scored} of {self.tokens} tokens: the balance loss "
                "needs those of all, update(expert, logits=…)"
            )
        share = torch.from_numpy(shares(self.load))
        return balance(share, torch.from_numpy(self.probability / self.tokens)).numpy()

    def update(
        self,
        expert: Int[np.ndarray, "l n topk"],
        label: int | Int[np.ndarray, " n"] = 0,
        document: int | Int[np.ndarray, " n"] = 0,
        logits: Float[np.ndarray, "_ _ _"] | None = None,  # l n e
    ) -> None:
        """Count what n tokens chose, strongest expert first.

        Raises:
            ValueError: layers, experts or labels that these counts do not have, or logits of
                others than these tokens.
        """
        labels, folds, layers, experts = self.by_label.shape
        if len(expert) != layers:
            raise ValueError(f"choices of {len(expert)} layers were given to counts of {layers}")
        _check("expert", expert, experts)
        _check("label", label, labels)
        layer = np.arange(layers)[:, None, None]
        n = expert.shape[1]
        if logits is not None and logits.shape != (layers, n, experts):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} were given with choices of {n} tokens: "
                f"give {(layers, n, experts)}, layers, tokens and experts"
            )
        where = (np.broadcast_to(x, n)[:, None] for x in (label, np.asarray(document) % folds))
        add_counts(self.by_label, *where, layer, expert)
        add_counts(self.together, layer[..., None], expert[..., :, None], expert[..., None, :])
        first = expert[..., 0]
        add_counts(self.transitions, layer[:-1, :, 0], first[:-1], first[1:])
        add_counts(self.to_last, layer[..., 0], first, first[-1:])
        self.tokens += n
        if logits is not None:
            self.probability += torch.from_numpy(logits).double().softmax(-1).sum(1).numpy()
            self.scored += n

    def merge(self, other: "RoutingCounts") -> None:
        """Add what another stream counted.

        Raises:
            ValueError: counts of another shape.
        """
        ours, theirs = self.by_label.shape, other.by_label.shape
        if ours != theirs:
            raise ValueError(
                f"counts of (labels, folds, layers, experts) {ours} and {theirs} do not add up: "
                "start both alike"
            )
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def _check(what: str, given: int | np.ndarray, size: int) -> None:
    for value in (np.min(given, initial=0), np.max(given, initial=0)):
        if not 0 <= value < size:
            raise ValueError(
                f"{what} {value} is out of range: these counts have {size} {what}s "
                f"(0 to {size - 1})"
            )


def add_counts(table: np.ndarray, *index: np.ndarray) -> None:
    """Add one to a contiguous table at every index; the indices broadcast."""
    flat = np.ravel_multi_index(np.broadcast_arrays(*index), table.shape).ravel()
    np.add.at(table.reshape(-1), flat, 1)
