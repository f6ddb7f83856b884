"""Edits of what is read, and of the value at any point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama4_lab.config import Llama4Config
from llama4_lab.edits.base import CLEAN, IDS, Change, Edit, Run, Tokens, has_tokens, taken
from llama4_lab.points import PICTURE


@dataclass(frozen=True)
class ReplaceToken(Edit):
    """Read another token in one place."""

    token: int
    id: int

    def first_token(self, config: Llama4Config) -> int:
        return self.token

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def replace(value: Tensor, run: Run) -> Tensor:
            other = run.model.embed_tokens.weight[self.id]
            return run.replaced(value, (self.token,), lambda old, _: other)

        return {"embed": replace}


@dataclass(frozen=True)
class AblateEmbedding(Edit):
    """Blank image patches or tokens: what stands there when the first layer begins.

    The mean is that of all image tokens of `source` in the place of one, of all others elsewhere.
    """

    tokens: Sequence[int]
    how: str = "zero"
    source: str = CLEAN

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def alike(old: Tensor, positions: list[int], run: Run) -> Tensor:
            theirs, ids = run.values[self.source, "embed"], run.values[self.source, IDS]
            is_image = ids[0] == config.image_token_index
            clean = (run.values[CLEAN, IDS][0] == config.image_token_index).tolist()
            own = [place < len(clean) and clean[place] for place in positions]  # text goes on
            for kind, name in ((True, "image"), (False, "other")):
                if kind in own and not (is_image == kind).any():
                    raise ValueError(
                        f"{self}: the run {self.source!r} has no {name} tokens to take the mean of"
                    )
            means = [theirs[0, is_image == kind].mean(dim=0) for kind in own]
            return torch.stack(means).to(old) if means else old

        def blank(value: Tensor, run: Run) -> Tensor:
            if self.how == "mean":
                return run.replaced(value, self.tokens, lambda old, at: alike(old, at, run))
            return run.replaced(
                value, self.tokens, lambda old, at: self._instead(old, at, run, "embed")
            )

        return {"embed": blank}

    def reads(self, config: Llama4Config) -> set[tuple[str, str]]:
        ids = {(self.source, IDS), (CLEAN, IDS)} if self.how == "mean" else set()
        return self._sources("embed") | ids


@dataclass(frozen=True)
class Patch(Edit):
    """Put in what another run has at a point (activation patching, Meng et al. 2022, section 2).

    `source_tokens` are the positions to take from, if they are others than `tokens`.
    """

    point: str
    source: str
    tokens: Tokens = None
    source_tokens: Tokens = None
    head: int | None = None

    def check(self, config: Llama4Config, length: int | None = None) -> None:
        super().check(config, length)
        if self.source_tokens is not None and len(self.source_tokens) != len(self.tokens or ()):
            raise ValueError(
                f"{self}: {len(self.tokens or ())} tokens cannot take the values of "
                f"{len(self.source_tokens)}; give as many"
            )

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        places = dict(zip(self.tokens or (), self.source_tokens or (), strict=False))

        def patch(value: Tensor, run: Run) -> Tensor:
            theirs = run.values[self.source, self.point].to(value)
            if not has_tokens(self.point, config):
                # Of pictures, the first axis counts tiles: one must not stand for all.
                self._must_fit(value, theirs, 0 if self.point.startswith(PICTURE) else 1)
                return _only(self.head, value, theirs.expand_as(value).clone())
            self._must_fit(value, theirs, 2)

            def make(old: Tensor, positions: list[int]) -> Tensor:
                new = taken(theirs, [places.get(p, p) for p in positions], self.source)
                return _only(self.head, old, new)

            return run.replaced(value, self.tokens, make)

        return {self.point: patch}

    def _must_fit(self, value: Tensor, theirs: Tensor, axis: int) -> None:
        """Refuse a source whose axes from this one on are others; the axes before may be."""
        if theirs.shape[axis:] != value.shape[axis:]:
            raise ValueError(
                f"{self}: this value has the shape {tuple(value.shape)}, and in source "
                f"{self.source!r} {tuple(theirs.shape)}; give a source of the same shape"
            )

    def reads(self, config: Llama4Config) -> set[tuple[str, str]]:
        return {(self.source, self.point)}


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply the value at a point; what is masked, or an expert that was dropped, stays so."""

    point: str
    factor: float
    tokens: Tokens = None
    head: int | None = None

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def scaled(old: Tensor) -> Tensor:
            new = torch.where(old == -math.inf, old, old * self.factor)
            return _only(self.head, old, new)

        def scale(value: Tensor, run: Run) -> Tensor:
            if not has_tokens(self.point, config):
                return scaled(value)
            return run.replaced(value, self.tokens, lambda old, _: scaled(old))

        return {self.point: scale}


@dataclass(frozen=True)
class Steer(Edit):
    """Add ``factor * vector`` along a point's last axis."""

    point: str
    vector: Sequence[float]
    factor: float = 1.0
    tokens: Tokens = None

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def steer(value: Tensor, run: Run) -> Tensor:
            if value.shape[-1] != len(self.vector):
                raise ValueError(
                    f"a vector of {len(self.vector)} numbers does not fit {self.point}, whose last "
                    f"axis has {value.shape[-1]}"
                )
            added = self.factor * torch.tensor(self.vector).to(value)
            if not has_tokens(self.point, config):
                return value + added
            return run.replaced(value, self.tokens, lambda old, _: old + added)

        return {self.point: steer}


def _only(head: int | None, old: Tensor, new: Tensor) -> Tensor:
    """Return `new` in one head of ``[b n h dh]`` and `old` in the others; without a head, `new`."""
    if head is None:
        return new
    is_it = torch.arange(old.shape[2], device=old.device) == head
    return torch.where(is_it[:, None], new, old)
