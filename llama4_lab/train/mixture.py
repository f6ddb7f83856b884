"""Batches of token rows, drawn from several domains by weight."""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


class Mixture:
    """Rows of ``length + 1`` tokens from the ``{domain}.{split}.bin`` files of a corpus folder.

    `weights` are shares of rows. Each step's rows are spread over the domains as evenly as the
    weights allow (systematic sampling), so that a load-balancing loss always sees the whole mix.
    The files are memory-mapped; the same seed and step give the same rows, whatever came before.
    """

    def __init__(self, folder: str | Path, weights: dict[str, float], split: str = "train"):
        self.folder = Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text())
        self.domains = list(weights)
        total = sum(weights.values())
        self.shares = np.array([weights[name] / total for name in self.domains])
        self.tokens = {}
        for name in self.domains:
            path = self.folder / f"{name}.{split}.bin"
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: build the corpus with `llama4-lab corpus {self.folder}`"
                )
            self.tokens[name] = np.memmap(path, dtype=np.uint16, mode="r")
        self.bytes_per_token = {
            name: meta["files"][f"{name}.{split}"]["bytes"]
            / meta["files"][f"{name}.{split}"]["tokens"]
            for name in self.domains
        }

    def batch(self, seed: int, step: int, rows: int, length: int) -> Int[Tensor, "rows tokens"]:
        """Return the rows of one training step."""
        rng = np.random.default_rng((seed, step))
        ticks = (np.arange(rows) + rng.random()) / rows
        chosen = np.searchsorted(self.shares.cumsum(), ticks, side="right").clip(
            max=len(self.shares) - 1
        )
        out = []
        for domain in chosen:
            tokens = self.tokens[self.domains[domain]]
            start = rng.integers(0, len(tokens) - length)
            out.append(torch.from_numpy(tokens[start : start + length + 1].astype(np.int64)))
        return torch.stack(out)

    def fixed_rows(self, name: str, rows: int, length: int) -> Int[Tensor, "rows tokens"]:
        """Return the same evenly spaced rows of one domain every time, for evaluation."""
        tokens = self.tokens[name]
        rows = min(rows, len(tokens) // (length + 1))
        starts = np.linspace(0, len(tokens) - length - 1, rows).astype(np.int64)
        return torch.stack(
            [torch.from_numpy(tokens[s : s + length + 1].astype(np.int64)) for s in starts]
        )
