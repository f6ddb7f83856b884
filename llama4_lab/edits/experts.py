"""Edits of routers and routed experts."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama4_lab.config import Llama4Config
from llama4_lab.edits.base import (
    CLEAN,
    Bias,
    Change,
    Edit,
    Gate,
    Run,
    See,
    Tokens,
    Touch,
    unbiased,
)
from llama4_lab.model import Llama4

GATES = ("own", "winner", "one")


def _router(layer: int) -> tuple[str, str, str]:
    prefix = f"layers.{layer}.router."
    return prefix + "logits", prefix + "indices", prefix + "scores"


@dataclass(frozen=True)
class AblateExpert(Edit):
    """Ablate a routed expert for the tokens that go there; their routing stays.

    The mean is that of the expert's outputs over the m tokens of `source` that go there; resample
    gives the token at position p the output for number p mod m of them.
    """

    layer: int
    expert: int
    how: str = "zero"
    source: str = CLEAN
    tokens: Tokens = None
    is_moe: ClassVar = True

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        _, indices, scores = _router(self.layer)
        out = f"layers.{self.layer}.experts.out"

        def goes_there(run: Run) -> tuple[Tensor, Tensor]:
            chosen = run.seen[indices]
            columns, positions = run.columns(chosen.shape[1], self.tokens)
            position = torch.full_like(chosen, -1)
            position[:, columns] = chosen.new_tensor(positions)[:, None]
            return (chosen == self.expert) & (position >= 0), position

        def silence(value: Tensor, run: Run) -> Tensor:
            return value.masked_fill(goes_there(run)[0], 0.0)  # what reads zeros writes zeros

        def replace(value: Tensor, run: Run) -> Tensor:
            there, position = goes_there(run)
            theirs = run.values[self.source, out][run.values[self.source, indices] == self.expert]
            if not len(theirs):
                raise ValueError(
                    f"{self}: no token of {self.source!r} goes to this expert, so there is no "
                    "output to take; choose another source, or how='zero'"
                )
            if self.how == "mean":
                theirs = theirs.mean(dim=0, keepdim=True)
            value = value.clone()
            value[there] = theirs[position[there] % len(theirs)].to(value)
            return value

        return {indices: See(indices)} | (
            {scores: silence} if self.how == "zero" else {out: replace}
        )

    def reads(self, config: Llama4Config) -> set[tuple[str, str]]:
        parts = ("router.indices", "experts.out")
        return {found for part in parts for found in self._sources(f"layers.{self.layer}.{part}")}


@dataclass(frozen=True)
class DropExpert(Edit):
    """Take an expert out of the choice: its tokens go to their next best."""

    layer: int
    expert: int
    tokens: Tokens = None
    is_moe: ClassVar = True

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        gone = torch.zeros(config.num_local_experts, dtype=torch.bool)
        gone[self.expert] = True

        def drop(value: Tensor, run: Run) -> Tensor:
            return run.replaced(
                value,
                self.tokens,
                lambda old, _: old.masked_fill(gone.to(old.device), float("-inf")),
            )

        return {_router(self.layer)[0]: drop}


@dataclass(frozen=True)
class Route(Edit):
    """Send a token to an expert, in place of the strongest one that it would choose.

    `gate` is what multiplies the expert's input: the sigmoid of the expert's "own" logit, that of
    the "winner", or "one". An expert that is chosen anyway becomes the strongest.
    """

    layer: int
    token: int
    expert: int
    gate: str = "own"
    is_moe: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is unknown; choose from {GATES}")

    def first_token(self, config: Llama4Config) -> int:
        return self.token

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        logits, indices, scores = _router(self.layer)

        def choose(value: Tensor, run: Run) -> Tensor:
            def make(chosen: Tensor, _: list[int]) -> Tensor:
                # Where it was chosen already, the strongest one takes its place.
                chosen = torch.where(chosen == self.expert, chosen[..., :1], chosen)
                first = torch.full_like(chosen[..., :1], self.expert)
                return torch.cat([first, chosen[..., 1:]], dim=-1)

            return See(indices)(run.replaced(value, (self.token,), make), run)

        def weigh(value: Tensor, run: Run) -> Tensor:
            def make(old: Tensor, _: list[int]) -> Tensor:
                columns, _ = run.columns(value.shape[1], (self.token,))
                winner = run.seen[logits][:, columns].argmax(dim=-1, keepdim=True)
                gates = run.seen.get(unbiased(logits), run.seen[logits])
                best = gates[:, columns].gather(-1, winner)
                first = best.float().sigmoid() if self.gate == "winner" else torch.ones_like(best)
                is_it = run.seen[indices][:, columns, :1] == self.expert  # no later edit's
                first = torch.where(is_it, first.to(old), old[..., :1])
                return torch.cat([first, old[..., 1:]], dim=-1)

            return run.replaced(value, (self.token,), make)

        if self.gate == "own":  # scores are taken from the logits of whoever is chosen
            return {indices: choose}
        return {logits: See(logits), indices: choose, scores: Gate(weigh)}


@dataclass(frozen=True)
class TopK(Edit):
    """Let each token of a layer choose another number of experts."""

    layer: int
    k: int
    is_moe: ClassVar = True

    def check(self, config: Llama4Config, length: int | None = None) -> None:
        super().check(config, length)
        if not 1 <= self.k <= config.num_local_experts:
            raise ValueError(f"{self}: k must be 1 to {config.num_local_experts}, all experts")

    def rules(self, model: Llama4) -> list[tuple[Any, str, object]]:
        return [(model.layers[self.layer].feed_forward, "topk", self.k)]

    def touches(self, config: Llama4Config) -> Touch:
        return Touch(self.layer, _router(self.layer)[1], 0)


@dataclass(frozen=True)
class RouterTemperature(Edit):
    """Divide a router's logits: above one, scores come closer to a half; the choice stays."""

    layer: int
    temperature: float
    tokens: Tokens = None
    is_moe: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"{self}: the temperature must be above 0, and finite")

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def divide(value: Tensor, run: Run) -> Tensor:
            return run.replaced(value, self.tokens, lambda old, _: old / self.temperature)

        return {_router(self.layer)[0]: divide}


@dataclass(frozen=True)
class RouterBias(Edit):
    """Add to one expert's logit: for the choice alone, or (`gated`) for its score as well.

    For the choice alone is how balancing by bias works (Wang et al. 2024, "Auxiliary-Loss-Free
    Load Balancing").
    """

    layer: int
    expert: int
    bias: float
    gated: bool = False
    tokens: Tokens = None
    is_moe: ClassVar = True

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        logits, indices, scores = _router(self.layer)

        def add(value: Tensor, run: Run) -> Tensor:
            bias = torch.zeros(config.num_local_experts)
            bias[self.expert] = self.bias
            return run.replaced(value, self.tokens, lambda old, _: old + bias.to(old))

        def weigh(value: Tensor, run: Run) -> Tensor:
            columns, _ = run.columns(value.shape[1], self.tokens)
            chosen = run.seen[indices][:, columns]
            own = run.seen[unbiased(logits)][:, columns].gather(-1, chosen).float().sigmoid()
            return run.replaced(
                value,
                self.tokens,
                lambda old, _: torch.where(chosen == self.expert, own.to(old), old),
            )

        if self.gated:
            return {logits: add}
        return {logits: Bias(add, logits), indices: See(indices), scores: Gate(weigh, is_own=True)}
