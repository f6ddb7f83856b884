"""Watch and change named values.

``with trace(model, ["layers.*.router.logits"]) as cache: …`` keeps what a forward pass computes;
``with intervene(model, {"layers.3.attn.z": fn}): …`` puts ``fn(value)`` in its place. Contexts nest
in any order: a trace sees what the model goes on with, after every change.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab import spill as disk
from llama4_lab.aliases import aliases, match, resolve
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.points import NO_TAP, Tap, points

Change = Callable[[Tensor], Tensor]
Choice = int | slice | Sequence[int] | np.integer | np.ndarray | Tensor


@contextmanager
def trace(
    model: Llama4,
    names: str | Iterable[str],
    *,
    detach: bool = True,
    positions: Choice | None = None,
    heads: Choice | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    spill: str | Path | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with the named values of each forward pass inside the block.

    `names` are point names or patterns (``layers.*.router.logits``); `llama4_lab.points` lists
    them with their axes. TransformerLens's names (``blocks.3.hook_resid_pre``) stand for the same
    points, and their values are kept under them; `llama4_lab.aliases` says where the meaning
    differs. A pattern stands for points, and for aliases only if no point fits. The model is
    watched, not the caller: forward passes that other threads make meanwhile are seen as well, and
    changed by `intervene`. For such threads there is ``model.apart()``.

    A later forward pass replaces the values of an earlier one. Logits are the same to the bit,
    unless a value was asked for that only another path of the same mathematics makes:
    ``attn.scores`` and ``attn.pattern`` (explicit attention), which equals the usual path to
    rounding; and so do decoding on the CPU, where values other than the routers' need the readable
    path, and, while gradients are recorded, values inside the experts. Without gradients these
    equal what the backend computed to rounding.

    Args:
        detach: keep values without their gradients.
        positions: which places of the axis t to keep; they count the tokens of one forward pass,
            padding included. Values without that axis are kept whole, and so are all of the vision
            encoder, whose t counts patch slots. An int keeps an axis of length one; negative ones
            count from the end. What is kept is a copy, the rest is freed.
        heads: likewise for the axis h of ``attn.q, rot_q, scores, pattern, z``, in text and vision.
            Keys and values (axis k) are kept whole.
        device, dtype: of what is kept; `dtype` concerns floating-point values only.
        spill: a new or empty folder that values are written to, one safetensors file each. The dict
            holds them memory-mapped, so that they take no memory until they are used, and only
            what is used; so does `llama4_lab.load_trace` later.

    Raises:
        KeyError: a name or pattern that no point has, with the closest one.
        TypeError, ValueError: positions, heads or options that are impossible; a place outside a
            value is found during the forward pass.
        FileExistsError: the folder to spill to is a file, or holds something.
    """
    if spill is not None and (device is not None or not detach):
        raise ValueError("spill keeps values on disk, without gradients: leave out device, detach")
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"dtype={dtype!r}: give a dtype of torch, such as torch.float16")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"values cannot be kept as {dtype}: give a floating-point dtype")
    kept = _Kept(
        axes={name: axes.split() for name, axes in points(model.config).items()},
        detach=detach,
        places={"t": _places("positions", positions), "h": _places("heads", heads)},
        to={"device": device, "dtype": dtype},
    )
    asked: dict[str, list[str]] = {}
    for name, point in resolve(model.config, names).items():
        asked.setdefault(point, []).append(name)
    folder = None if spill is None else disk.claim(spill)
    cache: dict[str, Tensor] = {}
    outer = model.tap
    try:
        model.tap = _Recorder(outer, asked, cache, kept, folder)
        yield cache
    finally:
        model.tap = outer


@contextmanager
def unobserved(model: Llama4) -> Iterator[None]:
    """Hide the forward passes inside the block from a trace around it; what changes them stays."""
    outer = model.tap
    try:
        model.tap = outer if outer.records() is None else NO_TAP
        yield
    finally:
        model.tap = outer


def run_with_cache(
    model: Llama4,
    prompt: Any,
    names_filter: str | Iterable[str] | Callable[[str], bool] | None = None,
    *,
    detach: bool = True,
    **options: Any,
) -> tuple[Float[Tensor, "b t v"], dict[str, Tensor]]:
    """Run a prompt and return its logits and a dict of values, as TransformerLens does.

    `prompt` is what ``model.prompt`` returns, a text or chat messages for it, or token ids
    (``[b t]`` or ``[t]``). `names_filter` names points or aliases, as for `trace`, or is a function
    that says which to keep: it is asked for every point, and for aliases if it wants no point. The
    dict has the spelling that was asked for. None keeps every point but ``attn.scores`` and
    ``attn.pattern``, which grow with the square of the length: ask for them by name.

    Neither logits nor values carry gradients unless ``detach=False``. The other options are those
    of `trace`: positions, heads, device, dtype, spill.

    Raises:
        KeyError: a name or pattern that no point has, or a function that wants none.
        TypeError, ValueError, FileExistsError: as `trace` and ``model.prompt``.
    """
    inputs = inputs_of(model, prompt)
    names = _filtered(model.config, names_filter)
    with (
        torch.set_grad_enabled(not detach and torch.is_grad_enabled()),
        trace(model, names, detach=detach, **options) as cache,
    ):
        return model(**inputs), cache


def inputs_of(model: Any, prompt: Any) -> dict[str, Any]:
    """Return what a model is called with, on its device.

    `prompt` is what ``model.prompt`` returns, a text or chat messages for it, or token ids
    (``[b t]`` or ``[t]``).

    Raises:
        ValueError: a mapping without token ids, such as a single chat message, or of no tensors.
    """
    if isinstance(prompt, Tensor):
        prompt = {"input_ids": prompt if prompt.ndim > 1 else prompt[None]}
    elif not hasattr(prompt, "keys"):
        prompt = model.prompt(prompt)
    if "input_ids" not in prompt.keys():  # noqa: SIM118  a Prompt is a mapping by its keys alone
        raise ValueError(
            f"{', '.join(map(repr, prompt.keys()))} make no prompt: give input_ids, or chat "
            'messages as a list, [{"role": "user", "content": …}]'
        )
    given = {key: value for key, value in {**prompt}.items() if value is not None}
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}: give a tensor")
    return {key: value.to(model.device) for key, value in given.items()}


@contextmanager
def intervene(
    model: Llama4, changes: Mapping[str, Change], *, last: bool = False
) -> Iterator[None]:
    """Replace named values by ``change(value)`` in each forward pass inside the block.

    Names may be patterns and aliases, as for `trace`. What the change returns is what the model
    computes with from there on; it must have the value's shape, dtype and device. The change may
    alter its value in place, which is a copy, but has to return it. Of nested blocks the innermost
    changes first, unless `last` puts its changes behind those of the blocks around it. A change
    that changes nothing leaves the logits as they are to the bit; one of what only another path of
    the same mathematics makes, as scores or patterns of attention, leaves them as they are in a
    traced run.

    If no complete forward pass inside the block computes a named value, such as one of pictures in
    prompts without any, a UserWarning says so at its end.

    Raises:
        KeyError: a name or pattern that no point has, with the closest one.
        TypeError, ValueError: a change returned no tensor, or one that does not fit.
    """
    by_name: dict[str, list[Change]] = {}
    meant = {pattern: match(model.config, pattern) for pattern in changes}
    for pattern, change in changes.items():
        if not callable(change):
            raise TypeError(
                f"the change of {pattern!r} is a {type(change).__name__}: give a function of the "
                "value that returns the one to go on with"
            )
        for name in meant[pattern]:
            by_name.setdefault(name, []).append(change)
    owner, name = _place(model, last)
    outer = getattr(owner, name)
    editor = _Editor(outer, by_name)
    try:
        setattr(owner, name, editor)
        yield
    finally:
        setattr(owner, name, outer)
    for pattern, names in meant.items():
        if editor.is_complete and editor.made.isdisjoint(names):
            warnings.warn(
                f"the change of {pattern!r} was never made: no forward pass inside the block "
                "computed it",
                stacklevel=3,
            )


def _place(model: Llama4, last: bool) -> tuple[Any, str]:
    """Return whose attribute an editor takes: the model's, or that of the outermost tap."""
    owner, name = model, "tap"
    while last and isinstance(outer := getattr(owner, name), _Recorder | _Editor):
        owner, name = outer, "outer"
    return owner, name


def _filtered(
    config: Llama4Config, names_filter: str | Iterable[str] | Callable[[str], bool] | None
) -> str | Iterable[str]:
    known = points(config)
    if names_filter is None:
        return [name for name, axes in known.items() if "s" not in axes.split()]
    if not callable(names_filter):
        return names_filter
    for spelled in (known, aliases(known)):
        if wanted := [name for name in spelled if names_filter(name)]:
            return wanted
    raise KeyError(
        f"names_filter wants none of this model's {len(known)} points and of their aliases: "
        "points(config) lists all"
    )


def _places(what: str, choice: Choice | None) -> slice | list[int] | None:
    """Check what was given for `positions` or `heads`; only a value can say whether it fits."""
    plain: Any = getattr(choice, "tolist", lambda: choice)()
    if plain is None or isinstance(plain, slice):
        return plain
    places = [plain] if isinstance(plain, int) else plain
    if not isinstance(places, Sequence) or any(type(place) is not int for place in places):
        raise TypeError(f"{what}={choice!r}: give an int, a slice or a sequence of ints")
    return list(places)


@dataclass(frozen=True)
class _Kept:
    """What is kept of a value."""

    axes: dict[str, list[str]]
    detach: bool
    places: dict[str, slice | list[int] | None]  # of an axis
    to: dict[str, Any]

    @cached_property
    def is_all(self) -> bool:
        return all(choice is None for choice in (*self.places.values(), *self.to.values()))

    def __call__(self, point: str, value: Tensor) -> Tensor:
        value = value.detach() if self.detach and value.requires_grad else value
        if self.is_all:
            return value
        for axis, places in self.places.items():
            if places is None or axis not in self.axes[point]:
                continue
            if axis == "t" and point.startswith("vision."):
                continue
            dim = self.axes[point].index(axis)
            index = _index(point, axis, places, value.shape[dim])
            value = value.index_select(
                dim, torch.tensor(index, device=value.device, dtype=torch.long)
            )
        dtype = self.to["dtype"] if value.is_floating_point() else None
        return value.to(device=self.to["device"], dtype=dtype)


def _index(point: str, axis: str, places: slice | list[int], size: int) -> list[int]:
    if isinstance(places, slice):
        return list(range(size)[places])
    for place in places:
        if not -size <= place < size:
            what, many = ("position", "tokens") if axis == "t" else ("head", "heads")
            raise ValueError(
                f"{what} {place} is out of range: {point!r} has {size} {many} in this forward pass "
                f"(0 to {size - 1})"
            )
    return [place % size for place in places]


class _Recorder(Tap):
    def __init__(
        self,
        outer: Tap,
        asked: dict[str, list[str]],
        cache: dict[str, Tensor],
        kept: _Kept,
        folder: Path | None,
    ):
        self.outer = outer
        self.asked = asked  # point -> names to keep it under
        self.cache = cache
        self.kept = kept
        self.folder = folder
        names = all(names == [point] for point, names in asked.items())
        self._is_plain = names and kept.is_all and not folder  # values are kept as they come

    def watches(self, name: str) -> bool:
        return name in self.asked or self.outer.watches(name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        value = self.outer(name, value)
        if name in self.asked:
            kept = self.kept(name, value)
            for asked in self.asked[name]:
                self.cache[asked] = disk.put(self.folder, asked, kept) if self.folder else kept
        return value

    def hear(self, values: Mapping[str, Tensor]) -> None:
        if self._is_plain and type(self.outer) is Tap and not torch.is_grad_enabled():
            self.cache.update(values)
        else:
            super().hear(values)

    def records(self) -> Collection[str] | None:
        if (outer := self.outer.records()) is None:
            return None
        return {*self.asked, *outer} if outer else self.asked.keys()

    def alters(self, name: str) -> bool:
        return self.outer.alters(name)


class _Editor(Tap):
    def __init__(self, outer: Tap, changes: dict[str, list[Change]]):
        self.outer = outer
        self.changes = changes
        # Some changes are only made to values that others ask for.
        waits = {n for n, each in changes.items() if all(getattr(c, "waits", False) for c in each)}
        self._asks = changes.keys() - waits
        self.made = waits
        self.is_complete = False  # whether a forward pass came to its end

    def watches(self, name: str) -> bool:
        return name in self._asks or self.outer.watches(name)

    def alters(self, name: str) -> bool:
        changes = self.changes[name] if name in self._asks else ()
        only_sees = all(getattr(each, "only_sees", False) for each in changes)
        return not only_sees or self.outer.alters(name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self.is_complete |= name == "final_norm"
        for change in self.changes.get(name, ()):
            # A copy, so that changing it in place spares what shares its memory: the value that was
            # kept under another name, or the keys before their rotation on NoPE layers.
            value = _checked(name, value, change(value.clone()))
            self.made.add(name)
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
