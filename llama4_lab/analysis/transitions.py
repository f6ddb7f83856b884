"""Which expert follows which, from layer to layer and within one.

The counts come from `llama4_lab.analysis.counts.RoutingCounts`; whether they are more than chance
say `against_shuffles` and `surprise` of `llama4_lab.analysis.information`.
"""

import numpy as np
from jaxtyping import Float, Int


def following(transitions: Int[np.ndarray, "*l e e"]) -> Float[np.ndarray, "*l e e"]:
    """Return P(expert in the next layer | expert in this one), in [0, 1].

    Rows sum to one, but for those of unused experts, which are 0.

    >>> following(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    return _divide(transitions, transitions.sum(axis=-1))


def coactivation(together: Int[np.ndarray, "*l e e"]) -> Float[np.ndarray, "*l e e"]:
    """Return P(j | i), the share of the tokens of expert i that chose expert j as well.

    All pairs of a token's top-k count (OLMoE, Muennighoff et al. 2024, section 5.2). Rows sum to
    top-k and have 1 on the diagonal, but for those of unused experts, which are 0.

    >>> coactivation(np.array([[4, 1], [1, 2]])).tolist()
    [[1.0, 0.25], [0.5, 1.0]]
    """
    return _divide(together, np.diagonal(together, axis1=-2, axis2=-1))


def _divide(
    counts: Int[np.ndarray, "*l e e"], by: Int[np.ndarray, "*l e"]
) -> Float[np.ndarray, "*l e e"]:
    return np.divide(counts, by[..., None], where=by[..., None] > 0, out=np.zeros(counts.shape))
