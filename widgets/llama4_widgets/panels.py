"""What a board draws: named axes, arrays over them, and panels that show them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Shaped

from llama4_widgets.colours import colour, ink

_EXACT = 8192  # numbers; larger arrays are sent in 254 steps
_WHOLE = 65_536  # bytes of all arrays that are `paged`; if they are more, they are sent in parts


@dataclass(frozen=True)
class Axis:
    """An axis of arrays; a click on one of its places sets `select` of the selection.

    `values` are the selection's numbers of the places, where those are not 0, 1, 2, …
    """

    title: str
    size: int
    select: str | None = None
    labels: Sequence[str] | None = None
    values: Sequence[int] | None = None

    def index(self, selection: Mapping[str, int]) -> int:
        """Return the place that is selected; the first where none is."""
        chosen = selection.get(self.select or "", 0)
        if self.values is not None:
            return max((i for i, value in enumerate(self.values) if value == chosen), default=0)
        return min(max(chosen, 0), self.size - 1)


def near(token: int, count: int, most: int) -> range:
    """Return the places of a text to show around a token, `most` of them if there are so many.

    They move by half of that, when the token comes close to an end of them.

    >>> near(3, 100, 40), near(30, 100, 40), near(99, 100, 40), near(3, 30, 40)
    (range(0, 40), range(10, 50), range(60, 100), range(0, 30))
    """
    half = max(most // 2, 1)
    low = max(0, min(token // half * half - half // 2, count - 2 * half))
    return range(low, min(low + 2 * half, count)) if count > most else range(count)


@dataclass
class Content:
    """Everything that a board shows.

    `sentence` says what is selected: ``{axis}`` and ``{array}`` stand for what is selected there,
    ``{array:2}`` for hundredths, written with two decimals, and a part in ``[…]`` is left out where
    a number in it is negative. `otherwise` is said where an axis does not have what is selected.
    `kept` is what was selected when this was made, of fields for which nobody can make it anew.

    >>> content = Content({"layer": Axis("layer", 2, "layer"), "token": Axis("token", 3, "token")})
    >>> content.add("map", "Scores", np.zeros((2, 3)), ("layer", "token"), sequential(0, 1))
    >>> content.message()["arrays"]["map"]["shape"]
    [2, 3]
    """

    axes: dict[str, Axis] = field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    panels: list[dict[str, Any]] = field(default_factory=list)
    sentence: str = ""
    otherwise: str = ""
    kept: Mapping[str, int] = field(default_factory=dict)

    def array(
        self,
        name: str,
        values: Shaped[np.ndarray, "..."],
        axes: Sequence[str],
        *,
        paged: bool = False,
        **tile: Any,
    ) -> None:
        """Add an array; not-a-number is "nothing there"; large ones take one byte a number.

        Where `paged` arrays are large together, a browser gets of them what is selected on the
        first axis, when it is selected: no panel may draw that axis. `tile` says that the array
        stands for a part of its last two axes, pooled: ``x=(from, to)``, ``y=(from, to)`` in places
        of the axes.
        """
        assert values.ndim == len(axes), (name, values.shape, axes)
        packed = pack(values)
        if paged:
            packed["paged"] = True
        if tile:
            packed["tile"] = tile | {"rows": values.shape[-2], "cols": values.shape[-1]}
        self.arrays[name] = packed | {"axes": list(axes)}

    def add(
        self,
        name: str,
        title: str,
        values: Shaped[np.ndarray, "..."] | None,
        axes: Sequence[str],
        scale: Mapping[str, Any] | None = None,
        *,
        kind: str = "map",
        shown: Sequence[str] | None = None,
        array: str | None = None,
        paged: bool = False,
        **options: Any,
    ) -> None:
        """Add a panel and its array, or a panel for an `array` that is there.

        `shown` are the axes that it draws (one of a strip, bars, lines or picture, two of a map,
        down and across); the others are picked by the selection. None: the last one or two.
        """
        if values is not None:
            self.array(name, values, axes, paged=paged)
        count = 2 if kind in ("map", "words") else 1
        panel = {"name": name, "kind": kind, "title": title, "array": array or name}
        panel |= {"axes": list(shown or axes[-count:]), "scale": dict(scale or sequential(0, 1))}
        self.panels.append(panel | options)

    def table(
        self,
        name: str,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        choices: Sequence[Mapping[str, int] | None] | None = None,
        **options: Any,
    ) -> None:
        """Add rows of words and numbers; a click on row i sets ``choices[i]``, if there is one.

        `bars` are the numbers that fill a bar, by column; None for a column without bars. What is
        not finite is told as no number.
        """
        panel = {"name": name, "kind": "table", "title": title, "columns": list(columns)}
        panel |= {"rows": [list(map(_finite, row)) for row in rows]}
        panel |= {"choices": choices and list(choices)}
        if "bars" in options:
            options["bars"] = list(map(_finite, options["bars"]))
        self.panels.append(panel | options)

    def beside(self, other: "Content") -> "Content":
        """Return the same with scales that hold the numbers of another one's panels, too."""
        theirs = {panel["name"]: panel.get("scale", {}) for panel in other.panels}
        panels = [
            {**panel, "scale": _wider(panel["scale"], theirs[panel["name"]])}
            if "scale" in panel and panel["name"] in theirs
            else panel
            for panel in self.panels
        ]
        return replace(self, panels=panels)

    def message(self, *, is_whole: bool = True) -> dict[str, Any]:
        """Return plain values and bytes, as a browser takes them; `pages` of arrays follow."""
        axes = {name: dict(vars(axis)) for name, axis in self.axes.items()}
        later = {} if is_whole else self._paged()
        arrays = {
            name: {
                key: value for key, value in packed.items() if name not in later or key != "data"
            }
            for name, packed in self.arrays.items()
        }
        said = {"sentence": self.sentence, "otherwise": self.otherwise, "kept": self.kept}
        return {"axes": axes, "arrays": arrays, "panels": self.panels} | said

    def pages(self, selection: Mapping[str, int]) -> dict[str, Any]:
        """Return the parts of paged arrays that a selection needs."""
        found = {}
        for name, packed in self._paged().items():
            page = self.axes[packed["axes"][0]].index(selection)
            size = len(packed["data"]) // packed["shape"][0]
            found[name] = {"page": page, "data": packed["data"][page * size :][:size]}
        return found

    def _paged(self) -> dict[str, dict[str, Any]]:
        """Return the arrays that are sent in parts."""
        found = {name: packed for name, packed in self.arrays.items() if "paged" in packed}
        return found if sum(len(packed["data"]) for packed in found.values()) > _WHOLE else {}


def _wider(one: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scale that holds what both hold; the first where they are not of one kind."""
    if one.keys() != other.keys() or any(one[key] != other[key] for key in ("kind", "unit")):
        return one
    ends = {"low": min, "high": max}
    return one | {key: end(one[key], other[key]) for key, end in ends.items() if key in one}


def _finite(value: Any, otherwise: Any = None) -> Any:
    """Return the same, but for numbers that JSON does not know."""
    return otherwise if isinstance(value, float) and not math.isfinite(value) else value


def pack(values: Shaped[np.ndarray, "..."]) -> dict[str, Any]:
    """Return an array as bytes: whole numbers and small arrays exactly, large ones in 254 steps."""
    shape = list(values.shape)
    if values.dtype.kind in "bui":
        low = int(values.min(initial=0))
        if (most := values.max(initial=0)) - low > 254:
            kind = "i2" if low >= -(2**15) and most < 2**15 else "f4"
            return {"dtype": kind, "shape": shape, "data": values.astype(f"<{kind}").tobytes()}
        high, finite = low + 254, np.array(True)
    elif values.size <= _EXACT:
        return {"dtype": "f4", "shape": shape, "data": values.astype("<f4").tobytes()}
    else:
        finite = np.isfinite(values)
        low = float(values[finite].min()) if finite.any() else 0.0
        high = float(values[finite].max()) if finite.any() else 0.0
    share = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
    steps = np.where(finite, 1 + np.rint(254 * share), 0).astype(np.uint8)
    return {"dtype": "u1", "shape": shape, "low": low, "high": high, "data": steps.tobytes()}


def experts(count: int) -> dict[str, Any]:
    """Return the colours of experts, with their numbers as a legend."""
    colours = [colour(i) for i in range(count)]
    inks = list(map(ink, colours))
    return {"kind": "category", "unit": "expert", "colours": colours, "inks": inks}


def sequential(low: float, high: float, unit: str = "", label: str = "") -> dict[str, Any]:
    """Return a scale from dark (low) to bright (high)."""
    low = _finite(float(low), 0.0)
    kind = {"kind": "sequential", "low": low, "high": _finite(float(high), low + 1)}
    return kind | {"unit": unit, "label": label}


def diverging(bound: float, unit: str = "", label: str = "") -> dict[str, Any]:
    """Return a scale from blue (below zero) over white, or dark grey, to red (above)."""
    bound = _finite(float(bound)) or 1.0
    kind = {"kind": "diverging", "low": -bound, "high": bound}
    return kind | {"unit": unit, "label": label}


def above_zero(values: Shaped[np.ndarray, "..."], unit: str, least: float = 1e-3) -> dict[str, Any]:
    """Return a scale from zero to the largest of some values, or to `least`, if that is more."""
    return sequential(0, max(float(values.max()), least), unit)


def around_zero(
    values: Shaped[np.ndarray, "..."], unit: str, least: float = 1e-3
) -> dict[str, Any]:
    """Return a scale as far on both sides of zero as values go, or as `least`, if that is more."""
    return diverging(max(float(np.nanmax(abs(values), initial=0.0)), least), unit)
