"""Which experts prefer which kind of text, and how much of that is more than chance."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from llama4_lab.analysis.counts import RoutingCounts
from llama4_lab.analysis.information import information, mutual_information
from llama4_lab.analysis.load import shares
from llama4_lab.analysis.resampling import band, relabelled, resampled
from llama4_lab.analysis.routing import Batch, choices, moe_layers
from llama4_lab.model import Llama4

__all__ = ["Specialisation", "by_modality", "mutual_information", "specialisation"]


@dataclass(frozen=True, eq=False)
class Specialisation:
    """Choices of experts by domain and MoE layer, documents dealt out to folds.

    A domain is any label of a token: a kind of text, a language, a modality.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    by_label: Int[np.ndarray, "domain fold l e"]  # as in RoutingCounts

    @property
    def share(self) -> Float[np.ndarray, "domain l e"]:
        """Share of each domain's choices that go to each expert, in [0, 1].

        Raises:
            ValueError: a domain without tokens.
        """
        load = self.by_label.sum(axis=1)
        for name, count in zip(self.domains, load.sum(axis=(1, 2)), strict=True):
            if not count:
                raise ValueError(f"domain {name!r} has no tokens: give it text, or leave it out")
        return shares(load)

    @property
    def mixed(self) -> Float[np.ndarray, "l e"]:
        """Share of the mix in which every domain has the same weight."""
        return self.share.mean(axis=0)

    @property
    def mutual_information(self) -> Float[np.ndarray, " l"]:
        """Bits that an expert tells about its token's domain, by layer; all domains weigh alike."""
        return _bits(self.share)

    def share_band(
        self, level: float = 0.95, times: int = 500, seed: int = 0
    ) -> tuple[Float[np.ndarray, "domain l e"], Float[np.ndarray, "domain l e"]]:
        """Return the ends of the bootstrap band of `share`: other documents of the same domains.

        Raises:
            ValueError: a domain with fewer than two folds.
        """
        return band(shares(resampled(self.by_label, times, seed)), level)

    def shuffled_share_band(
        self, level: float = 0.95, times: int = 500, seed: int = 0
    ) -> tuple[Float[np.ndarray, "domain l e"], Float[np.ndarray, "domain l e"]]:
        """Return the ends of the band of `share` when the domains say nothing.

        Raises:
            ValueError: a domain with fewer than two folds.
        """
        return band(shares(relabelled(self.by_label, times, seed)), level)

    def information_band(
        self, level: float = 0.95, times: int = 500, seed: int = 0
    ) -> tuple[Float[np.ndarray, " l"], Float[np.ndarray, " l"]]:
        """Return the ends of the bootstrap band of the true mutual information, in bits.

        Few documents show information that is not there, and a bootstrap shows it twice. The band
        is therefore reflected (the basic bootstrap, Davison & Hinkley 1997, eq. 5.6), which takes
        the bias out: it may lie below `mutual_information`, and holds 0 when domains say nothing.

        Raises:
            ValueError: a domain with fewer than two folds.
        """
        low, high = band(_bits(shares(resampled(self.by_label, times, seed))), level)
        return 2 * self.mutual_information - high, 2 * self.mutual_information - low

    def shuffled_information(self, times: int = 500, seed: int = 0) -> Float[np.ndarray, "times l"]:
        """Return the mutual information that shuffled domains show, in bits: the null to beat.

        Raises:
            ValueError: a domain with fewer than two folds.
        """
        return _bits(shares(relabelled(self.by_label, times, seed)))


def specialisation(model: Llama4, rows: Mapping[str, Iterable[Batch]]) -> Specialisation:
    """Count the experts chosen for each domain; each row of a batch is a document.

    Raises:
        ValueError: a model without MoE layers.
    """
    counts = _empty(model, len(rows))
    for label, batches in enumerate(rows.values()):
        document = 0
        for batch in batches:
            found = choices(model, batch)
            counts.update(found.expert, label, document + found.row)
            document += found.num_rows
    return Specialisation(tuple(rows), moe_layers(model), counts.by_label)


def by_modality(model: Llama4, batches: Iterable[Batch]) -> Specialisation:
    """Count the experts chosen for text and for image tokens; each row is a document.

    Raises:
        ValueError: a model without MoE layers.
    """
    counts = _empty(model, 2)
    document = 0
    for batch in batches:
        found = choices(model, batch)
        is_image = (found.token == model.config.image_token_index).astype(int)
        counts.update(found.expert, is_image, document + found.row)
        document += found.num_rows
    return Specialisation(("text", "image"), moe_layers(model), counts.by_label)


def _empty(model: Llama4, labels: int) -> RoutingCounts:
    return RoutingCounts.empty(len(moe_layers(model)), model.config.num_local_experts, labels)


def _bits(share: Float[np.ndarray, "*times domain l e"]) -> Float[np.ndarray, "*times l"]:
    return information(share.swapaxes(-3, -2))
