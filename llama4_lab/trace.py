"""Watch and change named values.

``with trace(model, ["layers.*.router.logits"]) as cache: …`` keeps what a forward pass computes;
``with intervene(model, {"layers.3.attn.z": fn}): …`` puts ``fn(value)`` in its place. Contexts nest
in any order: a trace sees what the model goes on with, after every change.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor

from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.points import Tap, points

Change = Callable[[Tensor], Tensor]


@contextmanager
def trace(
    model: Llama4, names: str | Iterable[str], *, detach: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with the named values of each forward pass inside the block.

    `names` are point names or patterns (``layers.*.router.logits``); `llama4_lab.points` lists
    them with their axes. A later forward pass replaces the values of an earlier one. Logits are the
    same to the bit, unless a value was asked for that only another path of the same mathematics
    makes: ``attn.scores``, ``attn.pattern`` (explicit attention) and ``experts.*`` (readable
    experts), which equal the usual path to rounding.

    Raises:
        KeyError: a name or pattern that no point has, with the closest one.
    """
    cache: dict[str, Tensor] = {}
    outer = model.tap
    model.tap = _Recorder(outer, frozenset(match(model.config, names)), cache, detach)
    try:
        yield cache
    finally:
        model.tap = outer


@contextmanager
def intervene(model: Llama4, changes: Mapping[str, Change]) -> Iterator[None]:
    """Replace named values by ``change(value)`` in each forward pass inside the block.

    Names may be patterns, as for `trace`. What the change returns is what the model computes with
    from there on; it must have the value's shape, dtype and device. Of nested blocks the innermost
    changes first. Scores and patterns of attention are made by another path of the same mathematics
    then, and so are values inside the experts: a change that changes nothing leaves the logits
    equal to a traced run's to the bit.

    Raises:
        KeyError: a name or pattern that no point has, with the closest one.
        TypeError, ValueError: a change returned no tensor, or one that does not fit.
    """
    by_name: dict[str, list[Change]] = {}
    for pattern, change in changes.items():
        for name in match(model.config, pattern):
            by_name.setdefault(name, []).append(change)
    outer = model.tap
    model.tap = _Editor(outer, by_name)
    try:
        yield
    finally:
        model.tap = outer


def match(config: Llama4Config, names: str | Iterable[str]) -> list[str]:
    """Return the points that the names and patterns stand for, in the order of a forward pass."""
    known = points(config)
    wanted = set()
    for name in [names] if isinstance(names, str) else names:
        found = [point for point in known if fnmatchcase(point, name)]
        if not found:
            raise KeyError(_unknown(config, name, known))
        wanted.update(found)
    return [point for point in known if point in wanted]


def _unknown(config: Llama4Config, name: str, known: Iterable[str]) -> str:
    parts = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if parts:
        layer = int(parts[1])
        if layer >= config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            return f"{name!r}: this model has {config.num_hidden_layers} layers (0 to {last})"
        kinds = {"router": True, "experts": True, "shared": True, "mlp": False}
        asks_moe = kinds.get(parts[2].split(".")[0])
        if asks_moe is not None and asks_moe != config.is_moe(layer):
            others = [
                str(i) for i in range(config.num_hidden_layers) if config.is_moe(i) == asks_moe
            ]
            kind, other = ("dense", "MoE") if asks_moe else ("MoE", "dense")
            listed = ", ".join(others) or "none"
            return f"{name!r}: layer {layer} is a {kind} layer; {other} layers are {listed}"
    if name.startswith(("vision.", "projector.")) and config.vision_config is None:
        return f"{name!r}: this model has no vision encoder"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown point {name!r}: {hint}points(config) lists all"


class _Recorder(Tap):
    def __init__(self, outer: Tap, names: frozenset[str], cache: dict[str, Tensor], detach: bool):
        self.outer = outer
        self.names = names
        self.cache = cache
        self.detach = detach

    def watches(self, name: str) -> bool:
        return name in self.names or self.outer.watches(name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        value = self.outer(name, value)
        if name in self.names:
            self.cache[name] = value.detach() if self.detach else value
        return value


class _Editor(Tap):
    def __init__(self, outer: Tap, changes: dict[str, list[Change]]):
        self.outer = outer
        self.changes = changes

    def watches(self, name: str) -> bool:
        return name in self.changes or self.outer.watches(name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        for change in self.changes.get(name, ()):
            value = _checked(name, value, change(value))
        return self.outer(name, value)


def _checked(name: str, value: Tensor, changed: object) -> Tensor:
    if not isinstance(changed, Tensor):
        raise TypeError(
            f"the change of {name!r} returned {type(changed).__name__}: return the tensor that the "
            "model is to go on with"
        )
    for what in ("shape", "dtype", "device"):
        old, new = getattr(value, what), getattr(changed, what)
        if old != new:
            old, new = (tuple(x) if what == "shape" else x for x in (old, new))
            raise ValueError(
                f"the change of {name!r} returned {what} {new} where {old} is computed with: "
                "keep it as it is"
            )
    return changed
