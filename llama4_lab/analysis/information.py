"""How much one label tells about another, and how much of that chance alone would show.

A table counts how often the label of its row met the label of its column: domain and expert, token
and expert, expert and next layer's expert. The null hypothesis shuffles one of the two labels
among the tokens, which keeps how often each occurs. What a shuffle leaves is a random table with
the same sums of rows and columns, so that it can be drawn without the tokens.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num


def information(table: Num[np.ndarray, "*batch a b"]) -> Float[np.ndarray, "*batch"]:
    """Return the mutual information of rows and columns in bits, for each table.

    Raises:
        ValueError: a table without counts.
    """
    total = table.sum(axis=(-2, -1), keepdims=True)
    if not total.all():
        raise ValueError(f"a table of shape {table.shape} counts nothing: update its counts first")
    together = table / total
    apart = together.sum(axis=-1, keepdims=True) * together.sum(axis=-2, keepdims=True)
    ratio = np.divide(together, apart, where=together > 0, out=np.ones(table.shape))
    return np.asarray((together * np.log2(ratio)).sum(axis=(-2, -1)))


def mutual_information(table: Num[np.ndarray, "a b"]) -> float:
    """Return the mutual information of rows and columns in bits.

    Of shares (rows that sum to one) it is the information when all rows weigh the same. It is 0
    when every row spreads alike and at most ``log2(min(rows, columns))``.

    >>> mutual_information(np.eye(4)), mutual_information(np.full((4, 4), 0.25))
    (2.0, 0.0)
    """
    return float(information(table))


@dataclass(frozen=True, eq=False)
class Dependence:
    """Mutual information of tables, beside that of the same tables shuffled; in bits."""

    bits: Float[np.ndarray, " l"]
    null: Float[np.ndarray, "shuffle l"]

    @property
    def excess(self) -> Float[np.ndarray, " l"]:
        """Bits beyond the mean shuffle: few tokens show information that is not there."""
        return self.bits - self.null.mean(axis=0)

    @property
    def z(self) -> Float[np.ndarray, " l"]:
        """The excess in standard deviations of the shuffles; 0 where all shuffles are equal."""
        spread = self.null.std(axis=0, ddof=1)
        return np.divide(self.excess, spread, where=spread > 0, out=np.zeros_like(spread))


def against_shuffles(
    table: Int[np.ndarray, "l a b"], shuffles: int = 100, seed: int = 0
) -> Dependence:
    """Compare tables of counts with frequency-preserving shuffles of their tokens.

    Raises:
        ValueError: a table without counts, or of a billion tokens or more.
    """
    rng = np.random.default_rng(seed)
    null = [information(shuffled(one, shuffles, rng)) for one in table]
    return Dependence(information(table), np.stack(null, axis=1))


def shuffled(
    table: Int[np.ndarray, "a b"], times: int, rng: np.random.Generator
) -> Int[np.ndarray, "times a b"]:
    """Draw tables of tokens whose column labels were shuffled: the sums of both axes stay."""
    sizes = table.sum(axis=1).tolist()
    drawn = []
    for _ in range(times):
        left = table.sum(axis=0)
        for size in sizes:
            drawn.append(rng.multivariate_hypergeometric(left, size, method="marginals"))
            left -= drawn[-1]
    return np.reshape(drawn, (times, *table.shape))


def surprise(table: Int[np.ndarray, "*batch a b"]) -> Float[np.ndarray, "*batch a b"]:
    """Return how far each count is from its mean over shuffles, in standard deviations.

    In closed form: a count of shuffled tokens is hypergeometric. 0 where it cannot vary.
    """
    rows, columns = table.sum(axis=-1, keepdims=True), table.sum(axis=-2, keepdims=True)
    total = table.sum(axis=(-2, -1), keepdims=True).clip(1).astype(float)
    mean = rows * columns / total
    variance = mean * (1 - rows / total) * (total - columns) / (total - 1).clip(1)
    spread = np.sqrt(variance)
    return np.divide(table - mean, spread, where=spread > 0, out=np.zeros(table.shape))
