"""What other documents, or other labels of the same documents, would have shown.

Both functions move whole folds of `llama4_lab.analysis.counts.RoutingCounts.by_label` and leave
folds without tokens out.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped


def resampled(
    by_label: Int[np.ndarray, "label fold l e"], times: int, seed: int = 0
) -> Float[np.ndarray, "times label l e"]:
    """Count again with each label's folds drawn with replacement (Efron 1979).

    Raises:
        ValueError: a label with fewer than two folds.
    """
    rng = np.random.default_rng(seed)
    label, cells = _cells(by_label)
    draws = np.zeros((times, len(by_label), len(cells)))
    for i in range(len(by_label)):
        own = np.flatnonzero(label == i)
        draws[:, i, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=times)
    return np.tensordot(draws, cells, axes=1)


def relabelled(
    by_label: Int[np.ndarray, "label fold l e"], times: int, seed: int = 0
) -> Float[np.ndarray, "times label l e"]:
    """Count again with the labels shuffled among the folds: what is left is chance.

    Raises:
        ValueError: a label with fewer than two folds.
    """
    rng = np.random.default_rng(seed)
    label, cells = _cells(by_label)
    mixed = rng.permuted(np.broadcast_to(label, (times, len(label))), axis=1)
    given = (mixed[:, None] == np.arange(len(by_label))[:, None]).astype(float)
    return np.tensordot(given, cells, axes=1)


def band(
    samples: Float[np.ndarray, "times ..."], level: float = 0.95
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Return the two quantiles that hold the middle share `level` of the samples."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _cells(
    by_label: Shaped[np.ndarray, "label fold l e"],
) -> tuple[Int[np.ndarray, " cell"], Float[np.ndarray, "cell l e"]]:
    """Return the folds that hold tokens, with their labels."""
    label, fold = np.nonzero(by_label.any(axis=(2, 3)))
    for i, count in enumerate(np.bincount(label, minlength=len(by_label))):
        if count < 2:
            raise ValueError(
                f"label {i} has {count} folds with tokens: chance needs at least 2, count more "
                "documents"
            )
    return label, by_label[label, fold].astype(float)
