"""Batches of token rows, drawn from several domains by weight."""

import shlex
from pathlib import Path

import numpy as np
from jaxtyping import Int


class Mixture:
    """Rows of ``length + 1`` tokens from the ``{domain}.{split}.bin`` files of a corpus folder.

    `weights` are shares of rows. Each step's rows are spread over the domains as evenly as the
    weights allow (systematic sampling), so that a load-balancing loss always sees the whole mix.
    The files are memory-mapped.
    """

    def __init__(self, folder: str | Path, weights: dict[str, float], split: str = "train"):
        self.folder = Path(folder)
        self.domains = list(weights)
        total = sum(weights.values())
        if not total > 0 or min(weights.values()) < 0:
            raise ValueError(
                f"domains {weights} are no shares: give numbers from 0 up, and one above 0"
            )
        self.shares = np.array([weights[name] / total for name in self.domains])
        self.tokens = {}
        for name in self.domains:
            path = self.folder / f"{name}.{split}.bin"
            if not path.exists():
                command = f"llama4-lab corpus {shlex.quote(str(self.folder))}"
                raise FileNotFoundError(f"{path} is missing: build the corpus with `{command}`")
            if path.stat().st_size == 0:
                raise ValueError(
                    f"{path} is empty: this corpus has no text for the domain {name!r}; build it "
                    "with every licence, or leave the domain out"
                )
            self.tokens[name] = np.memmap(path, dtype=np.uint16, mode="r")

    def batch(
        self, rng: np.random.Generator, rows: int, length: int
    ) -> Int[np.ndarray, "rows tokens"]:
        """Draw rows; the same generator gives the same ones."""
        ticks = (np.arange(rows) + rng.random()) / rows
        chosen = np.searchsorted(self.shares.cumsum(), ticks, side="right").clip(
            max=len(self.shares) - 1
        )
        out = []
        for domain in chosen:
            name = self.domains[domain]
            tokens = self.tokens[name]
            if len(tokens) <= length:
                raise ValueError(
                    f"the domain {name!r} has {len(tokens):,} tokens, and a row takes "
                    f"{length + 1:,}: give shorter rows, or a corpus with more text"
                )
            start = rng.integers(0, len(tokens) - length)
            out.append(tokens[start : start + length + 1].astype(np.int64))
        return np.stack(out)
