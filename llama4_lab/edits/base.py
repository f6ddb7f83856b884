"""What all edits are: changes at points and rules of layers, for some tokens of a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

from llama4_lab.aliases import match
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.points import PICTURE, described

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
        t = value.shape[1]
        columns, positions = self.columns(t, tokens)
        if columns == list(range(t)):  # the usual case, without a copy by index
            return torch.empty_like(value).copy_(torch.as_tensor(make(value, positions)))
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
class _OfAKind:
    """A change whose kind says what other changes at its point mean for it."""

    change: Change

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        return self.change(value, run)


@dataclass(frozen=True)
class Gate(_OfAKind):
    """A change of scores that follows from the choice; `is_own` where it gives each its own."""

    is_own: bool = False


@dataclass(frozen=True)
class Again(_OfAKind):
    """A change of scores or inside experts that is new only if others are made there, too."""


@dataclass(frozen=True)
class Bias(_OfAKind):
    """A change of a router's logits for the choice alone."""

    logits: str  # the point


@dataclass(frozen=True)
class SeeUnbiased:
    """A change that changes nothing and remembers what would stand here without biases."""

    logits: str
    others: tuple[Change, ...]

    def __call__(self, value: Tensor, run: Run) -> Tensor:
        fair = value.clone()  # the model may write what replaces it to the same memory
        for change in self.others:
            fair = change(fair, run)
        run.seen[unbiased(self.logits)] = fair
        return value


def unbiased(logits: str) -> str:
    """Return the name under which a run remembers logits without biases."""
    return f"{logits} without biases"


def in_order(along: Sequence[Change]) -> list[Change]:
    """Return the changes at one point as they happen.

    That is as given, but scores follow the choice before they are ablated, and what is seen is what
    the model goes on with.
    """
    gates = [change for change in along if isinstance(change, Gate)]
    gates.sort(key=lambda gate: not gate.is_own)  # what is asked for goes beyond
    sees: list[Change] = [change for change in along if isinstance(change, See)]
    others = [change for change in along if not isinstance(change, Gate | See)]
    before: list[Change] = []
    if biases := [change for change in others if isinstance(change, Bias)]:
        fair = tuple(change for change in others if not isinstance(change, Bias))
        before = [SeeUnbiased(biases[0].logits, fair)]
    return [*before, *gates, *others, *sees]


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
        point = next(point for point in described(config) if point in changed)
        return Touch(layer_of(config, point), point, self.first_token(config))

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _plain(field.type, given))
            except TypeError as error:
                raise TypeError(
                    f"{type(self).__name__}: {field.name}={given!r:.60}: {error}"
                ) from None
        if (how := getattr(self, "how", "zero")) not in HOW:
            raise ValueError(f"how={how!r} is unknown; choose from {HOW}")
        if how == "resample" and getattr(self, "source", CLEAN) == CLEAN:
            raise ValueError("resample takes values of another run: name it with source=")

    def check(self, config: Llama4Config, length: int | None = None) -> None:
        """Refuse what this model, or a prompt of `length` tokens, does not have.

        Raises:
            ValueError: what was given and what is there.
        """
        is_of_pictures = getattr(self, "point", "").startswith(PICTURE)
        encoder = config.vision_config if is_of_pictures else None
        counts = {
            "layer": config.num_hidden_layers,
            "head": (encoder or config).num_attention_heads,
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
        for name in ("token", "tokens", "queries", "keys", "source_tokens"):
            given = getattr(self, name, None)
            count = length if name != "source_tokens" else None
            for token in [given] if isinstance(given, int) else given or ():
                if token < 0 or (count is not None and token >= count):
                    there = f": the prompt has {count} (0 to {count - 1})" if count else ""
                    raise ValueError(f"{self}: there is no token {token}{there}")
        if (point := getattr(self, "point", None)) is not None:
            self._check_point(point, config)

    def _check_point(self, point: str, config: Llama4Config) -> None:
        known = described(config)
        if point not in known:
            raise ValueError(f"{self}: {_meant(point, config)}")
        axes = known[point].axes.split()
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


_NEEDED = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _plain(kind: Any, given: Any) -> Any:
    """Return what a field was given as plain Python has it, from numpy and torch as well.

    Raises:
        TypeError: it is of another kind than the field.
    """
    if get_origin(kind) is Sequence:
        given = getattr(given, "tolist", lambda: given)()
        if isinstance(given, str | Mapping) or not hasattr(given, "__iter__"):
            raise TypeError("give a sequence of numbers")
        (inner,) = get_args(kind)
        return tuple(_plain(inner, each) for each in given)
    if choices := get_args(kind):  # or None
        return None if given is None else _plain(choices[0], given)
    given = getattr(given, "item", lambda: given)()
    wanted = int | float if kind is float else kind
    if not isinstance(given, wanted) or (isinstance(given, bool) and kind is not bool):
        raise TypeError(f"give {_NEEDED[kind]}")
    return given


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
    return not point.startswith(PICTURE) and described(config)[point].axes.split()[1] == "t"


def layer_of(config: Llama4Config, point: str) -> int:
    """Return a point's layer; -1 before the first one, the number of layers behind the last."""
    parts = point.split(".")
    if parts[0] == "layers":
        return int(parts[1])
    return config.num_hidden_layers if point in ("final_norm", "logits") else -1


def _meant(point: str, config: Llama4Config) -> str:
    """Say what may have been meant by what is no point's own name."""
    try:
        first = match(config, point)[0]
    except KeyError as error:
        return error.args[0]
    return f"{point!r} is an alias or a pattern: give the name of one point, such as {first!r}"
