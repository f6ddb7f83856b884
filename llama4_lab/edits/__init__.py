"""Edits: what is to be different in a run, as values that code, widgets and files share.

``with edited(model, [Route(3, token=7, expert=2)]): model(**prompt)`` runs the whole model so;
`llama4_lab.Replay` runs only what the edits touch. They compose in this order: the rules of layers
(`Rope`, `Chunk`, `TopK`) hold during the whole pass, everything else happens along the forward
pass, and at one point in the order given; what an edit needs to know of the router (who chose whom)
is what came of all of them, and gates are set before they are ablated. Tokens are positions in the
prompt, from 0; in a batch they count the padding on the left, too.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llama4_lab.config import Llama4Config
from llama4_lab.edits.base import (
    IDS,
    Again,
    Bias,
    Change,
    Edit,
    Gate,
    Run,
    See,
    Touch,
    Values,
    in_order,
    layer_of,
)
from llama4_lab.edits.experts import (
    AblateExpert,
    DropExpert,
    Route,
    RouterBias,
    RouterTemperature,
    TopK,
)
from llama4_lab.edits.layers import (
    AblateAttention,
    AblateHead,
    AblateMLP,
    AblateShared,
    AttentionTemperature,
    Chunk,
    KnockOut,
    RemoveTokens,
    Rope,
    SkipLayer,
)
from llama4_lab.edits.values import AblateEmbedding, Patch, ReplaceToken, Scale, Steer
from llama4_lab.model import Llama4
from llama4_lab.points import INSIDE, points
from llama4_lab.trace import inputs_of, intervene, trace, unobserved

KINDS: dict[str, type[Edit]] = {
    kind.__name__: kind
    for kind in (
        SkipLayer,
        AblateHead,
        AblateAttention,
        AblateMLP,
        AblateShared,
        AblateExpert,
        DropExpert,
        Route,
        TopK,
        RouterTemperature,
        RouterBias,
        Rope,
        Chunk,
        AttentionTemperature,
        KnockOut,
        RemoveTokens,
        ReplaceToken,
        AblateEmbedding,
        Patch,
        Scale,
        Steer,
    )
}
_EXAMPLE = 'such as [{"edit": "SkipLayer", "layer": 3}]'

__all__ = [
    "KINDS",
    "AblateAttention",
    "AblateEmbedding",
    "AblateExpert",
    "AblateHead",
    "AblateMLP",
    "AblateShared",
    "AttentionTemperature",
    "Chunk",
    "DropExpert",
    "Edit",
    "KnockOut",
    "Patch",
    "RemoveTokens",
    "ReplaceToken",
    "Rope",
    "Route",
    "RouterBias",
    "RouterTemperature",
    "Run",
    "Scale",
    "SkipLayer",
    "Steer",
    "TopK",
    "Touch",
    "dumps",
    "edited",
    "loads",
]


@contextmanager
def edited(
    model: Llama4, edits: Sequence[Edit], sources: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Run the whole model with edits in each forward pass inside the block.

    `sources` are the runs that means and other values are taken from, by name: prompts, texts, or
    ids ``[1, t]``. All rows of a batch are edited alike.

    Raises:
        ValueError: an edit that this model cannot have, or that needs to know what a block around
            this one changes.
        KeyError: a source that was not given.
    """
    check(edits, model.config)
    changes = changes_of(edits, model.config)
    for point, along in changes.items():
        looks = any(isinstance(each, Bias | Gate | See) for each in along)
        if looks and model.tap.alters(at := point.replace("scores", "indices")):
            raise ValueError(
                f"a block around this one changes {at} behind edits that need to know it: give the "
                "edits of a router in one list, or put that block inside this one"
            )
    run = Run(model, read_sources(model, edits, sources or {}))
    waiting = bound(_left_out(edits, changes, model.config), run, waits=True)
    with ruled(model, edits), intervene(model, bound(changes, run) | waiting):
        yield


def check(edits: Sequence[Edit], config: Llama4Config, length: int | None = None) -> None:
    """Refuse edits that a model, or a prompt of `length` tokens, cannot have.

    Raises:
        TypeError: something that is no edit.
        ValueError: what was given and what is there.
    """
    _check_kinds(edits)
    dropped: dict[int, list[DropExpert]] = {}
    topk = {edit.layer: edit.k for edit in edits if isinstance(edit, TopK)}
    rotates = {layer: config.uses_rope(layer) for layer in range(config.num_hidden_layers)}
    rotates |= {edit.layer: edit.on for edit in edits if isinstance(edit, Rope)}
    for edit in edits:
        edit.check(config, length)
        if isinstance(edit, AttentionTemperature) and rotates[edit.layer]:
            fit = ", ".join(str(layer) for layer, on in rotates.items() if not on) or "none"
            raise ValueError(
                f"{edit}: layer {edit.layer} is a RoPE layer in this run; NoPE layers are {fit}"
            )
        if isinstance(edit, DropExpert):
            dropped.setdefault(edit.layer, []).append(edit)
    for layer, drops in dropped.items():
        always = {drop.expert for drop in drops if drop.tokens is None}
        at: dict[int, set[int]] = {}
        for drop in drops:
            for token in drop.tokens or ():
                at.setdefault(token, {*always}).add(drop.expert)
        gone = max([always, *at.values()], key=len)
        left = config.num_local_experts - len(gone)
        if left < (k := topk.get(layer, config.num_experts_per_tok)):
            raise ValueError(
                f"{len(gone)} of {config.num_local_experts} experts dropped in layer {layer} leave "
                f"{left}, and each token chooses {k}; drop fewer"
            )


def _check_kinds(edits: Sequence[Edit]) -> None:
    if isinstance(edits, Edit):
        raise TypeError(f"{edits!r:.80} stands alone: give a list of edits, [{edits!r:.80}]")
    if strange := [each for each in edits if not isinstance(each, Edit)]:
        raise TypeError(f"{strange[0]!r:.80} is no edit: they are {', '.join(KINDS)}")


def changes_of(edits: Sequence[Edit], config: Llama4Config) -> dict[str, list[Change]]:
    """Return what happens at which points, in the order given."""
    found = _all_changes(edits, config)
    for layer in {edit.layer for edit in edits if isinstance(edit, SkipLayer)}:
        inside = [f"layers.{layer}.{name}" for name in INSIDE]
        along = [change for point in inside for change in found.get(point, [])]
        scores = found.get(f"layers.{layer}.router.scores", [])
        skips = [isinstance(each, Again) for each in scores if not isinstance(each, Gate | See)]
        is_last = skips == sorted(skips)  # nothing gives a score back behind the skip
        if is_last and all(isinstance(change, Again) for change in along):
            found.pop(inside[-1], None)  # the experts need not be opened for it
    return {point: in_order(along) for point, along in found.items()}


def _all_changes(edits: Sequence[Edit], config: Llama4Config) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {}
    for edit in edits:
        for point, change in edit.changes(config).items():
            found.setdefault(point, []).append(change)
    return found


def _left_out(
    edits: Sequence[Edit], changes: Mapping[str, list[Change]], config: Llama4Config
) -> dict[str, list[Change]]:
    """Return what `changes_of` spares, which is needed where a block inside changes the same."""
    return {
        point: along for point, along in _all_changes(edits, config).items() if point not in changes
    }


def bound(
    changes: Mapping[str, list[Change]], run: Run, waits: bool = False
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return one function of a value for each point; one that `waits` asks for no value itself."""

    return {point: _Bound(along, run, waits) for point, along in changes.items()}


@dataclasses.dataclass(frozen=True)
class _Bound:
    """Changes one after the other, in the run that they belong to."""

    along: Sequence[Change]
    run: Run
    waits: bool = False

    def __call__(self, value: Tensor) -> Tensor:
        for each in self.along:
            value = each(value, self.run)
        return value

    @property
    def only_sees(self) -> bool:
        return all(isinstance(each, See) for each in self.along)


@contextmanager
def ruled(model: Llama4, edits: Sequence[Edit]) -> Iterator[None]:
    """Let the rules of edits hold inside the block."""
    before: list[tuple[Any, str, object]] = []
    try:
        for edit in edits:
            for owner, name, value in edit.rules(model):
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


@torch.no_grad()
def read_sources(model: Llama4, edits: Sequence[Edit], sources: Mapping[str, Any]) -> Values:
    """Run the sources that edits take values from, each once.

    Raises:
        KeyError: a source that was not given.
        ValueError: a source of several rows or with padding, or one without a picture that was to
            give values of one.
    """
    wanted: dict[str, set[str]] = {}
    for edit in edits:
        for source, point in edit.reads(model.config):
            wanted.setdefault(source, set()).add(point)
    values: dict[tuple[str, str], Tensor] = {}
    for source, names in wanted.items():
        if source not in sources:
            known = ", ".join(map(repr, sources)) or "none"
            raise KeyError(
                f"an edit takes values of the run {source!r}, and given are {known}: "
                f"pass sources={{{source!r}: prompt}}"
            )
        inputs = inputs_of(model, sources[source])
        if what := not_one_row(inputs):
            raise ValueError(f"the source {source!r} has {what}: give one row without padding")
        values[source, IDS] = inputs["input_ids"]
        with unobserved(model), trace(model, names & points(model.config).keys()) as cache:
            if all(layer_of(model.config, name) < 0 for name in names - {IDS}):
                model.first_slot = 0  # changes around this count from it
                model.tap("embed", model.embed(inputs["input_ids"], inputs.get("pixel_values")))
            else:
                model(**inputs)
        if absent := names - cache.keys() - {IDS}:
            raise ValueError(f"the run {source!r} has no picture, so it has no {min(absent)}")
        values |= {(source, point): value for point, value in cache.items()}
    return values


def not_one_row(inputs: Mapping[str, Tensor]) -> str:
    """Say what a model is given that is not one row without padding; nothing where it is one."""
    rows, mask = len(inputs["input_ids"]), inputs.get("attention_mask")
    is_padded = mask is not None and not mask.all()
    what = f"{rows} row{'s' * (rows != 1)}" + " with padding" * is_padded
    return what if rows != 1 or is_padded else ""


def dumps(edits: Sequence[Edit]) -> str:
    """Return edits as JSON.

    >>> dumps([Route(3, token=7, expert=2)])
    '[{"edit": "Route", "layer": 3, "token": 7, "expert": 2, "gate": "own"}]'

    Raises:
        TypeError: something that is no list of edits.
        ValueError: an edit holds a number that is not finite.
    """
    _check_kinds(edits)
    values = [{"edit": type(edit).__name__} | dataclasses.asdict(edit) for edit in edits]
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"JSON has finite numbers only, and these are edits: {edits}") from error


def loads(text: str) -> list[Edit]:
    """Read edits from JSON.

    Raises:
        ValueError: text that is no list of edits, an unknown kind, fields it does not have, or
            values that they cannot have.
    """
    try:
        found = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"edits must be JSON, {_EXAMPLE}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"edits must be a JSON list of objects, {_EXAMPLE}")
    return [_from_dict(each) for each in found]


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"edits take finite numbers, and {number} is none")
    return value


def _from_dict(values: dict[str, Any]) -> Edit:
    given = dict(values)
    name = given.pop("edit", None)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"unknown edit {name!r}; choose from {', '.join(KINDS)}")
    fields = {field.name: field for field in dataclasses.fields(KINDS[name])}
    needed = {n for n, field in fields.items() if field.default is dataclasses.MISSING}
    if strange := sorted(given.keys() - fields.keys()):
        raise ValueError(f"{name} has no {', '.join(strange)}; it has {', '.join(fields)}")
    if lacking := [n for n in fields if n in needed - given.keys()]:
        raise ValueError(f"{name} needs {', '.join(lacking)} as well; given was {values}")
    try:
        return KINDS[name](**given)
    except TypeError as error:
        raise ValueError(str(error)) from error
