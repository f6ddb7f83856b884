"""The edited runs of one batch: where each begins, what it changes, and what came of it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4_lab.edits import Edit, Run, bound, changes_of
from llama4_lab.edits.base import See, Touch
from llama4_lab.model import Llama4
from llama4_lab.points import Tap
from llama4_lab.witness import Witness


@dataclass(frozen=True)
class Evidence:
    """Whether the model saw a change at a point.

    `changed` is the largest difference to the value before. `used_by` names the operation that
    next read the value, with the checksum that it had when it was handed out; None if none did.
    """

    changed: float
    used_by: str | None


class Variant:
    """One edited run: its changes by point, and where it begins.

    `index` is its place among the runs asked for, `first` the first position that it computes, and
    `begin` a layer and which of its parts: 0 `DecoderLayer.mix`, 1 `write`, 2 `feed`. Runs share a
    pass if they have the same `rules`.
    """

    def __init__(self, index: int, edits: Sequence[Edit], model: Llama4, values: Any, length: int):
        config = model.config
        self.index = index
        self.edits = edits
        self.changes = changes_of(edits, config)
        self.run = Run(model, values)
        touches = [edit.touches(config) for edit in edits]
        first = min((touch.token for touch in touches), default=0)
        self.first = min(first, length - 1)  # what begins behind the prompt changes nothing in it
        self.begin = min(map(_stage, touches), default=(config.num_hidden_layers, 0))
        self.rules = repr([edit for edit in edits if edit.rules(model)])

    def kind(self) -> tuple[str, int]:
        return self.rules, self.first

    def change(self, point: str) -> Callable[[Tensor], Tensor]:
        """Return all changes at a point as one function."""
        return bound({point: self.changes.get(point, [])}, self.run)[point]


class Rows(Tap):
    """Changes each row of a batch by the edits of its variant, and notes what came of it."""

    def __init__(self, variants: list[Variant], keep: Collection[str]):
        self.witness = Witness()
        self.kept: dict[str, Shaped[Tensor, "b t *axes"]] = {}
        self._keep = frozenset(keep)
        self._changed: list[dict[str, float]] = [{} for _ in variants]
        self._by_point: dict[str, list[tuple[int, Callable[[Tensor], Tensor]]]] = {}
        self._seen_by: dict[str, list[tuple[int, Callable[[Tensor], Tensor]]]] = {}
        for row, variant in enumerate(variants):
            for point, changes in variant.changes.items():
                only_sees = all(isinstance(change, See) for change in changes)
                found = self._seen_by if only_sees else self._by_point
                found.setdefault(point, []).append((row, variant.change(point)))

    def watches(self, name: str) -> bool:
        return name in self._by_point or name in self._seen_by or name in self._keep

    def alters(self, name: str) -> bool:
        return name in self._by_point

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self.witness.settle()
        for row, see in self._seen_by.get(name, ()):
            see(value[row : row + 1])
        if changes := self._by_point.get(name):
            with self.witness.looking_away():
                rows = list(value.split(1))
                for row, change in changes:
                    new = change(rows[row])
                    self._changed[row][name] = _distance(new, rows[row])
                    rows[row] = new
                new = rows[0] if len(rows) == 1 else torch.cat(rows)
            self.witness.follow(name, new, instead_of=value)
            value = new
        if ".router." in name or name in self._keep:
            self.kept[name] = value
        return value

    def watched(self, row: int, point: str) -> Callable[[Tensor], Tensor]:
        """Return a row's change of a point that has no axis of rows."""
        (change,) = [change for each, change in self._by_point[point] if each == row]

        def changed(value: Tensor) -> Tensor:
            with self.witness.looking_away():
                new = change(value)
                self._changed[row][point] = _distance(new, value)
            self.witness.follow(point, new, instead_of=value)
            return new

        return changed

    def evidence(self, row: int) -> dict[str, Evidence]:
        """Return what is known of each of a row's changes."""
        return {
            point: Evidence(changed, self.witness.used_by.get(point))
            for point, changed in self._changed[row].items()
        }


def _stage(touch: Touch) -> tuple[int, int]:
    """Return where a run must `begin`."""
    part = touch.point.split(".", 2)[-1]
    if not touch.point.startswith("layers."):
        return touch.layer, 0
    if part in ("attn.z", "attn.out"):
        return touch.layer, 1
    return touch.layer, 0 if part == "resid_pre" or part.startswith("attn.") else 2


def _distance(new: Tensor, old: Tensor) -> float:
    apart = (new - old).abs_()
    if (most := apart.max().item()) == most:
        return most
    return apart.masked_fill_(new == old, 0).max().item()  # equal infinities
