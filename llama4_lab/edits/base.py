"""What all edits are: changes at points and rules of layers, for some tokens of a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.points import points

HOW = ("zero", "mean", "resample")
Tokens = Sequence[int] | None  # None stands for all of them
Values = Mapping[tuple[str, str], Tensor]
CLEAN = "clean"
IDS = "input_ids"


class Touch(NamedTuple):
    """The first point of a forward pass, and the earliest token, whose value an edit can change."""

    layer: int  # -1 before the first layer, the number of layers behind the last
    point: str
    token: int


class Run:
    """What edits look up while a pass is under way.

    `values` are points of other runs, ``(source, point) -> value``; `seen` keeps what the router
    of the layer under way has said so far.
    """

    def __init__(self, model: Llama4, values: Values):
        self.model = model
        self.values = values
        self.seen: dict[str, Tensor] = {}

    def columns(self, t: int, tokens: Tokens) -> tuple[list[int], list[int]]:
        """Return which of the pass's t slots are meant, and their positions in the prompt."""
        start = self.model.first_slot
        meant = range(start, start + t) if tokens is None else tokens
        positions = [p for p in meant if start <= p < start + t]
        return [p - start for p in positions], positions

    def replaced(
        self, value: Tensor, tokens: Tokens, make: Callable[[Tensor, list[int]], Any]
    ) -> Tensor:
        """Return a copy of ``value [b t …]`` with ``make(old, positions)`` in place of tokens."""
        columns, positions = self.columns(value.shape[1], tokens)
        value = value.clone()
        value[:, columns] = make(value[:, columns], positions)
        return value


Change = Callable[[Tensor, Run], Tensor]


@dataclass(frozen=True)
class See:
    """A change that changes nothing and remembers the value."""

    name: str

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        run.seen[self.name] = value
        return value


@dataclass(frozen=True)
class Edit:
    """Base of all edits. Fields of the same name mean the same everywhere:

    `layer`, `head` and `expert` count from 0; `tokens` are positions, None for all. `how` puts
    zeros, the mean over the tokens of the run `source`, or (resample) what `source` has at the
    same position; the source "clean" is the run itself without edits.
    """

    is_moe: ClassVar[bool | None] = None  # the kind of layer that is needed

    def changes(self, config: Llama4Config) -> dict[str, Change]:
        """Return what happens at which points."""
        return {}

    def rules(self, model: Llama4) -> list[tuple[Any, str, object]]:
        """Return the attributes that are different during a pass: object, name, value."""
        return []

    def reads(self, config: Llama4Config) -> set[tuple[str, str]]:
        """Return the points of other runs that are needed: (source, point)."""
        return set()

    def first_token(self, config: Llama4Config) -> int:
        """Return the earliest position where a value can change."""
        tokens = getattr(self, "tokens", None)
        return min(tokens) if tokens else 0

    def touches(self, config: Llama4Config) -> Touch:
        """Return where a run first differs: point and token."""
        changed = self.changes(config)
        point = next(point for point in points(config) if point in changed)
        return Touch(layer_of(config, point), point, self.first_token(config))

    def __post_init__(self) -> None:
        for name in ("tokens", "source_tokens", "queries", "keys", "vector"):
            if isinstance(given := getattr(self, name, None), Iterable):
                object.__setattr__(self, name, tuple(given))
        if (how := getattr(self, "how", "zero")) not in HOW:
            raise ValueError(f"how={how!r} is unknown; choose from {HOW}")
        if how == "resample" and getattr(self, "source", CLEAN) == CLEAN:
            raise ValueError("resample takes values of another run: name it with source=")

    def check(self, config: Llama4Config, length: int | None = None) -> None:
        """Refuse what this model, or a prompt of `length` tokens, does not have.

        Raises:
            ValueError: what was given and what is there.
        """
        counts = {
            "layer": config.num_hidden_layers,
            "head": config.num_attention_heads,
            "expert": config.num_local_experts,
            "id": config.vocab_size,
        }
        for name, count in counts.items():
            given = getattr(self, name, None)
            if given is not None and not 0 <= given < count:
                raise ValueError(
                    f"{self}: {name} {given} is out of range: this model has {count} {name}s "
                    f"(0 to {count - 1})"
                )
        layer, layers = getattr(self, "layer", None), range(config.num_hidden_layers)
        if self.is_moe is not None and layer is not None and config.is_moe(layer) != self.is_moe:
            fit = ", ".join(str(i) for i in layers if config.is_moe(i) == self.is_moe) or "none"
            kind, others = ("dense", "MoE") if self.is_moe else ("MoE", "dense")
            raise ValueError(f"{self}: layer {layer} is a {kind} layer; {others} layers are {fit}")
        for name in ("token", "tokens", "queries", "keys"):
            given = getattr(self, name, None)
            for token in [given] if isinstance(given, int) else given or ():
                if token < 0 or (length is not None and token >= length):
                    there = f": the prompt has {length} (0 to {length - 1})" if length else ""
                    raise ValueError(f"{self}: there is no token {token}{there}")
        if (point := getattr(self, "point", None)) is not None:
            self._check_point(point, config)

    def _check_point(self, point: str, config: Llama4Config) -> None:
        known = points(config)
        if point not in known:
            raise ValueError(f"{self}: unknown point {point!r}; points(config) lists all")
        axes = known[point].split()
        if point.endswith("indices"):
            raise ValueError(f"{self}: experts have numbers, not sizes; use Route or DropExpert")
        if getattr(self, "head", None) is not None and axes[-2:] != ["h", "dh"]:
            raise ValueError(f"{self}: {point} has no axis of query heads; leave head out")
        if getattr(self, "tokens", None) is not None and not has_tokens(point, config):
            raise ValueError(f"{self}: {point} has no axis of text tokens; leave tokens out")

    def _instead(
        self, old: Tensor, positions: list[int], run: Run, point: str, head: int | None = None
    ) -> Tensor:
        """Return by `how` what stands in place of `old`, ``[b n …]``."""
        how, source = getattr(self, "how", "zero"), getattr(self, "source", CLEAN)
        if how == "zero":
            return torch.zeros_like(old)
        value = run.values[source, point]
        value = value if head is None else value[:, :, head]
        if how == "mean":
            return value.mean(dim=1, keepdim=True).to(old).expand_as(old)
        return taken(value, positions, source).to(old).expand_as(old)

    def _sources(self, point: str) -> set[tuple[str, str]]:
        if getattr(self, "how", "zero") == "zero":
            return set()
        return {(getattr(self, "source", CLEAN), point)}


def taken(value: Tensor, positions: list[int], source: str) -> Tensor:
    """Return ``value [b t …]`` at positions, if it has them."""
    if positions and max(positions) >= value.shape[1]:
        raise ValueError(
            f"source {source!r} has {value.shape[1]} tokens: there is nothing to take for token "
            f"{max(positions)}"
        )
    return value[:, positions]


def has_tokens(point: str, config: Llama4Config) -> bool:
    """Whether a point's second axis runs over the prompt's tokens."""
    is_picture = point.startswith(("vision.", "projector."))
    return not is_picture and points(config)[point].split()[1] == "t"


def layer_of(config: Llama4Config, point: str) -> int:
    """Return a point's layer; -1 before the first one, the number of layers behind the last."""
    parts = point.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return config.num_hidden_layers if point in ("final_norm", "logits") else -1
