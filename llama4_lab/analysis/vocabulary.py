"""Which experts prefer which tokens of the vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llama4_lab.analysis.counts import add_counts
from llama4_lab.analysis.routing import Batch, choices, moe_layers
from llama4_lab.model import Llama4


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """How often each token of the vocabulary chose each expert."""

    layers: tuple[int, ...]
    load: Int[np.ndarray, "v l e"]
    topk: int = 1  # choices that an occurrence makes

    @property
    def share(self) -> Float[np.ndarray, "v l e"]:
        """Share of a token's choices that went to an expert; 0 for tokens never seen.

        OLMoE's vocabulary specialisation (Muennighoff et al. 2024, section 5.4) over top-k. A token
        seen once is its expert's alone: look at frequent tokens, and at `against_shuffles` of
        `tables`.
        """
        total = self.load.sum(axis=-1, keepdims=True)
        return np.divide(self.load, total, where=total > 0, out=np.zeros(self.load.shape))

    @property
    def specialisation(self) -> Float[np.ndarray, " l"]:
        """Share of choices that go to the favourite expert of their token, in [1/e, 1]."""
        return self.load.max(axis=-1).sum(axis=0) / self.load.sum(axis=(0, 2))

    @property
    def tables(self) -> Int[np.ndarray, "l used e"]:
        """The counts of the tokens that occur, as `llama4_lab.analysis.information` reads them."""
        return self.load[self.load.any(axis=(1, 2))].swapaxes(0, 1)

    def favourites(self, row: int, expert: int, at_least: int = 20) -> Int[np.ndarray, " token"]:
        """Return the tokens with the greatest share at an expert of the layer ``layers[row]``.

        The greatest share comes first; tokens that occur less often than `at_least` are left out.
        """
        ids = np.flatnonzero(self.load[:, row].sum(axis=-1) >= at_least * self.topk)
        return ids[np.argsort(-self.share[ids, row, expert], kind="stable")]


def vocabulary(model: Llama4, batches: Iterable[Batch]) -> Vocabulary:
    """Count the experts that each input token chose, batch by batch.

    Memory is vocabulary × MoE layers × experts × 8 bytes, whatever the number of tokens.

    Raises:
        ValueError: batches without a token that counts, and as `choices`.
    """
    layers = moe_layers(model)
    config = model.config
    load = np.zeros((config.vocab_size, len(layers), config.num_local_experts), dtype=np.int64)
    layer, topk = np.arange(len(layers))[:, None, None], 0
    for batch in batches:
        found = choices(model, batch)
        topk = found.expert.shape[-1]
        add_counts(load, found.token[:, None], layer, found.expert)
    if not load.any():
        raise ValueError("no tokens were given: there is nothing to count")
    return Vocabulary(layers, load, topk)
