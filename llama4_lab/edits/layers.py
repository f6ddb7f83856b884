"""Edits of layers and of attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.config import Llama4Config
from llama4_lab.edits.base import CLEAN, Again, Change, Edit, Run, Tokens, Touch
from llama4_lab.model import Llama4
from llama4_lab.model.text import temperature


@dataclass(frozen=True)
class SkipLayer(Edit):
    """Let a layer add nothing: the residual stream passes it by."""

    layer: int
    tokens: Tokens = None

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def nothing(value: Tensor, run: Run) -> Tensor:
            return run.replaced(value, self.tokens, lambda old, _: 0.0)

        changes: dict[str, Change] = {"attn.out": nothing}
        if config.is_moe(self.layer):
            # A routed expert with a score of zero reads zeros and writes exactly zeros.
            changes |= {"router.scores": Again(nothing), "shared.out": nothing}
            changes |= {"experts.out": Again(nothing)}
        else:
            changes |= {"mlp.out": nothing}
        return {f"layers.{self.layer}.{part}": change for part, change in changes.items()}


@dataclass(frozen=True)
class _AblatePart(Edit):
    layer: int
    how: str = "zero"
    source: str = CLEAN
    tokens: Tokens = None
    part: ClassVar[str]

    @property
    def _point(self) -> str:
        return f"layers.{self.layer}.{self.part}"

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def change(value: Tensor, run: Run) -> Tensor:
            return run.replaced(
                value, self.tokens, lambda old, at: self._instead(old, at, run, self._point)
            )

        return {self._point: change}

    def reads(self, config: Llama4Config) -> set[tuple[str, str]]:
        return self._sources(self._point)


@dataclass(frozen=True)
class AblateMLP(_AblatePart):
    """Ablate what the MLP of a dense layer adds to the residual stream."""

    is_moe: ClassVar = False
    part: ClassVar = "mlp.out"


@dataclass(frozen=True)
class AblateShared(_AblatePart):
    """Ablate what the shared expert of a MoE layer adds to the residual stream."""

    is_moe: ClassVar = True
    part: ClassVar = "shared.out"


@dataclass(frozen=True)
class AblateAttention(_AblatePart):
    """Ablate what all heads of a layer together add to the residual stream."""

    part: ClassVar = "attn.out"


@dataclass(frozen=True)
class AblateHead(Edit):
    """Ablate one query head: what it gathers, before its part of the output matrix."""

    layer: int
    head: int
    how: str = "zero"
    source: str = CLEAN
    tokens: Tokens = None

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        point = f"layers.{self.layer}.attn.z"

        def change(value: Tensor, run: Run) -> Tensor:
            def make(old: Tensor, at: list[int]) -> Tensor:
                one = self._instead(old[:, :, self.head], at, run, point, self.head)
                return old.index_copy(2, torch.tensor([self.head]).to(old.device), one[:, :, None])

            return run.replaced(value, self.tokens, make)

        return {point: change}

    def reads(self, config: Llama4Config) -> set[tuple[str, str]]:
        return self._sources(f"layers.{self.layer}.attn.z")


@dataclass(frozen=True)
class Rope(Edit):
    """Make a layer a RoPE layer or a NoPE layer; which keys it may see stays (see `Chunk`).

    As everywhere in Llama 4, the qk norm goes with RoPE and the temperature with NoPE.
    """

    layer: int
    on: bool

    def rules(self, model: Llama4) -> list[tuple[Any, str, object]]:
        attention = model.layers[self.layer].self_attn
        use_qk_norm = self.on and model.config.use_qk_norm
        return [(attention, "uses_rope", self.on), (attention, "use_qk_norm", use_qk_norm)]

    def touches(self, config: Llama4Config) -> Touch:
        return Touch(self.layer, f"layers.{self.layer}.attn.rot_q", 0)


@dataclass(frozen=True)
class Chunk(Edit):
    """Let a layer attend inside chunks of `size` tokens, or (None) over the whole past."""

    layer: int
    size: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise ValueError(f"a chunk of {self.size} tokens is impossible; None means no chunks")

    def rules(self, model: Llama4) -> list[tuple[Any, str, object]]:
        return [(model.layers[self.layer].self_attn, "chunk", self.size)]

    def first_token(self, config: Llama4Config) -> int:
        sizes = (self.size, config.attention_chunk(self.layer))
        return min((size for size in sizes if size is not None), default=0)

    def touches(self, config: Llama4Config) -> Touch:
        return Touch(self.layer, f"layers.{self.layer}.attn.scores", self.first_token(config))


@dataclass(frozen=True)
class AttentionTemperature(Edit):
    """Change a NoPE layer's temperature ``1 + scale * log(1 + floor((position + 1) / floor))``.

    A scale of 0 switches it off; None keeps the model's value, which is 0 where the model has no
    temperature. The edit multiplies by this and divides by the model's own temperature, so that
    several of one layer do not replace each other but multiply. A layer that `Rope` switches to
    NoPE has one, too.
    """

    layer: int
    scale: float | None = None
    floor_scale: int | None = None

    def check(self, config: Llama4Config, length: int | None = None) -> None:
        super().check(config, length)
        if self.floor_scale is not None and self.floor_scale < 1:
            raise ValueError(f"{self}: floor_scale counts tokens, so it must be 1 or more")

    def factor(self, config: Llama4Config, position: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
        """Return what the queries at some positions are multiplied by."""
        own = config.attn_scale if config.attn_temperature_tuning else 0.0
        scale = own if self.scale is None else self.scale
        floor = config.floor_scale if self.floor_scale is None else self.floor_scale
        wanted = config.replace(attn_temperature_tuning=True, attn_scale=scale, floor_scale=floor)
        return temperature(wanted, position) / temperature(config, position)

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def change(value: Tensor, run: Run) -> Tensor:
            slots = torch.arange(value.shape[1], device=value.device) + run.model.first_slot
            return (value * self.factor(config, slots)[:, None, None]).to(value.dtype)

        return {f"layers.{self.layer}.attn.rot_q": change}


@dataclass(frozen=True)
class KnockOut(Edit):
    """Forbid `queries` to attend to `keys`, in all layers and heads or in one.

    The rest of a query's pattern grows to a sum of one again; a query that sees nothing gathers
    zeros (Geva et al. 2023, "Dissecting Recall of Factual Associations", section 5).
    """

    queries: Sequence[int]
    keys: Sequence[int]
    layer: int | None = None
    head: int | None = None

    def first_token(self, config: Llama4Config) -> int:
        return min(self.queries, default=0)

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def forbid(value: Tensor, run: Run) -> Tensor:
            t = value.shape[2]
            columns, _ = run.columns(t, self.queries)
            forbidden = is_key(value, run, self.keys).repeat(t, 1)
            others = torch.ones(t, dtype=torch.bool, device=value.device)
            others[columns] = False
            forbidden[others] = False
            heads = torch.arange(value.shape[1], device=value.device)[:, None, None]
            if self.head is not None:
                forbidden = forbidden & (heads == self.head)
            return value.masked_fill(forbidden, float("-inf"))

        layers = range(config.num_hidden_layers) if self.layer is None else (self.layer,)
        return {f"layers.{layer}.attn.scores": forbid for layer in layers}


@dataclass(frozen=True)
class RemoveTokens(Edit):
    """Hide tokens from all later ones, in every layer; positions stay as they are."""

    tokens: Sequence[int]

    def first_token(self, config: Llama4Config) -> int:
        return min(self.tokens, default=0) + 1

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        def hide(value: Tensor, run: Run) -> Tensor:
            t, s = value.shape[2:]
            own = torch.ones(t, s, dtype=torch.bool, device=value.device)
            own = own.tril(s - t).triu(s - t)
            return value.masked_fill(is_key(value, run, self.tokens) & ~own, float("-inf"))

        return {f"layers.{i}.attn.scores": hide for i in range(config.num_hidden_layers)}


def is_key(scores: Tensor, run: Run, tokens: Sequence[int]) -> Tensor:
    """Say which keys of ``scores [b h t s]`` are the given tokens; the last t are the queries'."""
    t, s = scores.shape[2:]
    first = run.model.first_slot + t - s
    meant = torch.zeros(s, dtype=torch.bool, device=scores.device)
    meant[[token - first for token in tokens if 0 <= token - first < s]] = True
    return meant
