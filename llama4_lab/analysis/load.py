"""How evenly the tokens are spread over the experts.

`llama4_lab.analysis.counts` makes the loads. Each function takes counts or shares with experts on
the last axis and keeps the other axes.
"""

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor


def shares(load: Num[np.ndarray, "*batch e"]) -> Float[np.ndarray, "*batch e"]:
    """Scale counts to shares that sum to one.

    Raises:
        ValueError: a load without a single choice.
    """
    total = load.sum(axis=-1, keepdims=True)
    if not total.all():
        empty = np.argwhere(total[..., 0] == 0)[0].tolist()
        raise ValueError(f"the load at {empty} counts no choice: give it tokens, or leave it out")
    return load / total


def entropy(load: Num[np.ndarray, "*batch e"]) -> Float[np.ndarray, "*batch"]:
    """Return the entropy of the load in bits, from 0 (one expert) to log2 e (balanced).

    >>> entropy(np.array([[5, 5, 5, 5], [9, 0, 0, 0]])).tolist()
    [2.0, 0.0]
    """
    share = shares(load)
    log = np.log2(share, where=share > 0, out=np.zeros_like(share))
    return np.asarray(0.0 - (share * log).sum(axis=-1))  # not -0.0


def normalised_entropy(load: Num[np.ndarray, "*batch e"]) -> Float[np.ndarray, "*batch"]:
    """Return the entropy as a share of log2 e, in [0, 1]; a single expert has 0."""
    return np.asarray(entropy(load) / np.log2(max(load.shape[-1], 2)))


def effective_experts(load: Num[np.ndarray, "*batch e"]) -> Float[np.ndarray, "*batch"]:
    """Return how many equally loaded experts have this entropy, from 1 to e (its perplexity)."""
    return np.asarray(2 ** entropy(load))


def gini(load: Num[np.ndarray, "*batch e"]) -> Float[np.ndarray, "*batch"]:
    """Return the Gini coefficient: 0 when balanced, (e - 1) / e when one expert does everything.

    It is the mean difference of two experts' loads over twice the mean load.

    >>> gini(np.array([[5, 5, 5, 5], [9, 0, 0, 0]])).tolist()
    [0.0, 0.75]
    """
    e = load.shape[-1]
    rank = 2 * np.arange(1, e + 1) - e - 1
    return np.asarray((rank * np.sort(shares(load), axis=-1)).sum(axis=-1) / e)


def max_over_mean(load: Num[np.ndarray, "*batch e"]) -> Float[np.ndarray, "*batch"]:
    """Return the fullest expert's load over the mean load, from 1 (balanced) to e.

    With one device an expert, this is how much longer a batch takes than a balanced one.
    """
    return np.asarray(shares(load).max(axis=-1) * load.shape[-1])


def switch_loss(logits: Float[Tensor, "*batch e"], topk: int = 1) -> Float[Tensor, ""]:
    """Return the load-balancing loss of the Switch Transformer (Fedus et al. 2021, eq. 4 to 6).

    ``e * sum(f * P)``: f is the share of choices that each expert gets, P the mean softmax
    probability. It is 1 when balanced and at most e; transformers' ``load_balancing_loss_func``
    counts choices a token instead, and so is `topk` times this. Give it the tokens of all domains
    together: balanced apart, each domain would be pushed to use every expert.
    """
    logits = logits.float().flatten(0, -2)
    chosen = logits.topk(topk, dim=-1).indices
    share = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()
    return balance(share, logits.softmax(dim=-1).mean(0))


def balance(
    share: Float[Tensor, "*batch e"], probability: Float[Tensor, "*batch e"]
) -> Float[Tensor, "*batch"]:
    """Return `switch_loss` of what it needs to know: shares of choices and mean probabilities."""
    return share.shape[-1] * (share * probability).sum(-1)
