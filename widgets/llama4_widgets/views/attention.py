"""Where does each head look, how far, and across which borders?"""

import math
from collections.abc import Collection, Set
from functools import partial
from typing import Any

import ipywidgets
import numpy as np
import torch

from llama4_lab.analysis.attention import Window
from llama4_lab.edits import AttentionTemperature
from llama4_lab.model.text import temperature
from llama4_widgets.panels import Axis, Content, around_zero, pack
from llama4_widgets.patterns import Layer, attended, decades, glance, in_decades, pooled
from llama4_widgets.view import View, in_row
from llama4_widgets.words import counted

_WHOLE = 220_000  # numbers in all, below which every head and row of the layer goes to the browser
_LINE, _AROUND = 4096, 1024  # tokens: the longest text that is shown whole, and what is else
_THUMBS = 32_768  # numbers in the small maps
_CURVE = 257  # points of the temperature's curve


class AttentionView(View):
    """Any head of any layer as a map that can be zoomed; all heads; the selected token's row."""

    title = "Attention (iRoPE)"
    help = (
        "Three layers of four have RoPE and look back only inside their own chunk of the text; "
        "every fourth has no positions (NoPE) and looks at the whole past, its queries made "
        "sharper late in the text by a temperature. Each row of a map is a query that shares out "
        "a sum of 1 over keys: upright lines are keys that many look at, slanted ones a fixed "
        "distance."
    )
    follows = ("layer", "head", "token")
    _side = 256  # cells of a map, at most

    def controls(self) -> list[ipywidgets.Widget]:
        self._window: tuple[int, Window, Window] | None = None  # tokens in all, queries, keys
        self._layer = ipywidgets.Dropdown(description="Layer", layout={"width": "220px"})
        self._layer.observe(self._choose_layer, "value")
        self._pooling = ipywidgets.ToggleButtons(
            options=[("largest", "max"), ("mean", "mean")],
            description="Cell shows",
            tooltips=["of the shares that a cell stands for"] * 2,
            style={"button_width": "70px", "description_width": "initial"},
            layout={"width": "auto", "flex": "none"},
        )
        self._pooling.observe(lambda _: self.refresh(), "value")
        return [in_row(self._layer, self._pooling)]

    def content(self) -> Content:
        config, count = self.moment.model.config, len(self.moment.words)
        runs = self._runs()
        main = runs[-1][1]
        self._offer_layers()
        labels = self.moment.words if count <= 512 else None
        content = Content({
            "head": Axis("head", config.num_attention_heads, "head"),
            "query": Axis("query", count, "token", labels=labels),
            "key": Axis("key", count, labels=labels),
        })  # fmt: skip
        is_whole = main.pattern is not None
        self._pooling.layout.display = "none" if is_whole else ""
        which = f"layer {self.selection.layer}" + (
            "" if is_whole else f", head {self.selection.head}"
        )
        self._add_strips(content, runs)
        self._add_maps(content, runs, which)
        self._add_heads(content, runs)
        if not main.uses_rope:
            self._add_temperature(content, count)
        return content

    def summary(self) -> str:
        layer, token = self._runs()[-1][1], self.selection.token
        row = np.nan_to_num(layer.row(self.selection.head, token))
        best = int(row.argmax())
        sight = "its chunk" if layer.chunk else "the whole past"
        seen = f"{sight} and looks most at {self.moment.called(best)}, share {row[best]:.2g}"
        return (
            f"layer {self.selection.layer} ({_kind(layer)}), head {self.selection.head}: "
            f"{self.moment.called(token)} sees "
            + (seen if row[best] else "nothing, for edits hide all of it")
        )

    def region(self, wish: dict[str, Any]) -> None:
        count = len(self.moment.words)
        queries, keys = (
            (max(int(wish[x][0]), 0), min(int(np.ceil(wish[x][1])), count)) for x in ("y", "x")
        )
        self._window = count, queries, keys
        arrays, notes = {}, {}
        with self.working("reading the region" * (count > 16_384)):
            for name, values, tile, note in self._maps(self._runs(), queries, keys):
                packed = pack(values)
                arrays[f"{name} finer"] = packed | {"axes": ["query", "key"], "tile": tile}
                notes[name] = note
        self.board.answer(wish["panel"], arrays, notes)

    # ---- what is shown of which run

    def _runs(self) -> list[tuple[str, Layer]]:
        """Return the layer of the clean run, and of the edited one if there are edits."""
        size = self.moment.model.config.num_attention_heads * len(self.moment.words) ** 2
        is_whole = size * (5 if self.moment.edits else 2) <= _WHOLE
        return attended(self.moment, self.selection.layer, is_whole)

    def _add_strips(self, content: Content, runs: list[tuple[str, Layer]]) -> None:
        count, head, token = len(self.moment.words), self.selection.head, self.selection.token
        shown = range(count)
        if count > _LINE:
            shown = range(max(0, token - _AROUND), min(count, token + _AROUND // 4))
        content.axes["token"], part = self.some(shown)
        for run, layer in runs:
            name = f"row {run}".strip()
            if layer.pattern is not None:
                axes, values = ("head", "query", "token"), layer.pattern
                whose = "the selected head looks from the selected token"
            else:
                axes, values = ("token",), layer.row(head, token)[shown.start : shown.stop]
                whose = f"head {head} looks from {self.moment.called(token)}"
            note = f"layer {self.selection.layer} ({_kind(layer)}); slanted words are out of sight"
            content.add(
                name, f"Where {whose}{f', {run}' * bool(run)}", in_decades(values), axes,
                decades(count), kind="strip", shown=("token",), note=note + part,
            )  # fmt: skip
        if part:
            row = np.nan_to_num(runs[-1][1].row(head, token))
            best = np.argsort(-row, kind="stable")[:12].tolist()
            content.table(
                "most", "Most of it goes to", ["token", "", "share"],
                [[str(i), self.moment.words[i], float(row[i])] for i in best],
                [{"token": i} for i in best], wide=False,
            )  # fmt: skip

    def _add_maps(self, content: Content, runs: list[tuple[str, Layer]], which: str) -> None:
        count = len(self.moment.words)
        titles = {"": "Attention", "clean": "Clean", "edited": "Edited", "change": "Edited − clean"}
        main, make = runs[-1][1], partial(self._maps, runs, (0, count), (0, count))
        if main.pattern is not None:
            axes, found = ("head", "query", "key"), make()
        else:
            axes = ("query", "key")
            question = ("maps", main, self.selection.head, self._pooling.value, self._side)
            found = self.moment.once(question, make)
        for name, values, tile, note in found:
            run = name[4:]
            content.array(name, values, axes, **tile)
            step = self._step(runs[0][1] if run == "clean" else main)
            edges = range(0, count, step) if step < count else []
            content.add(
                name, f"{titles[run]}, {which}", None, axes,
                around_zero(values, "share") if run == "change" else decades(count),
                shown=("query", "key"), square=True, wide=False, diagonal=True,
                zoom="map", region=f"{name} finer" if tile else None,
                borders=[[i, min(i + step, count)] for i in edges], note=note,
            )  # fmt: skip
        if found[0][2] and self._window and self._window[0] == count:
            panels = {panel["name"]: panel for panel in content.panels}
            for name, values, tile, note in self._maps(runs, *self._window[1:]):
                content.array(f"{name} finer", values, axes, **tile)
                panels[name]["note"] = note

    def _maps(
        self, runs: list[tuple[str, Layer]], queries: Window, keys: Window
    ) -> list[tuple[str, np.ndarray, dict[str, Any], str]]:
        """Return for each map of a window: its name, cells, place, and what is said of it.

        Patterns that are there as a whole have no place, and all heads.
        """
        side = self._side if len(runs) == 1 else self._side * 5 // 8
        how = str(self._pooling.value)
        shares, found = [], []
        for run, layer in runs:
            cells, tile, note = layer.pattern, {}, ""
            if layer.kept is not None:
                cells, block, is_all = pooled(layer, self.selection.head, queries, keys, side, how)
                sides = zip("yx", (queries, keys), cells.shape, block, strict=True)
                tile = {axis: (begin, begin + n * size) for axis, (begin, _), n, size in sides}
                name = "largest" if how == "max" else "mean"
                note = f"a cell is the {name} of {block[0]} × {block[1]} queries × keys"
                if not is_all:
                    note = f"a cell is the {name} of {block[1]} keys, for one query in {block[0]}"
                if block == (1, 1):
                    note = "every query and key"
            assert cells is not None
            shares.append(cells)
            found.append((f"map {run}".strip(), in_decades(cells), tile, self._note(layer, note)))
        if len(runs) > 1:
            found.append(("map change", _difference(*shares), found[-1][2], found[-1][3]))
        return found

    def _note(self, layer: Layer, cell: str = "") -> str:
        """Say of a map what its layer's rule is, what is dashed, and what a cell is."""
        dashed = "; dashed: chunks" + (not layer.chunk) * " of RoPE layers, crossed here"
        is_dashed = self._step(layer) < len(self.moment.words)
        return _kind(layer) + dashed * is_dashed + (cell and f"; {cell}")

    def _step(self, layer: Layer) -> int:
        """Return the tokens between two dashed lines: of a layer without chunks, the others'."""
        return (
            layer.chunk or self.moment.model.config.attention_chunk_size or len(self.moment.words)
        )

    def _add_heads(self, content: Content, runs: list[tuple[str, Layer]]) -> None:
        config = self.moment.model.config
        count = config.num_attention_heads
        side = max(16, min(64, int((_THUMBS / count) ** 0.5)))
        border = config.attention_chunk_size
        glances = [
            layer.once((glance, border, side), partial(glance, layer, border, side))
            for _, layer in runs
        ]
        maps, averages, step = glances[-1]
        main = runs[-1][1]
        axes = ("head", "query", "key")
        array = f"map {runs[-1][0]}".strip()
        if main.pattern is None:
            content.array(array := "heads", in_decades(maps), axes)
        some = "" if step == 1 else f"; of one query in {step}"
        content.add(
            "heads", f"All heads of layer {self.selection.layer}", None, axes,
            decades(len(self.moment.words)), kind="multiples", shown=axes, array=array, wide=False,
            note=f"a click chooses one{some}",
        )  # fmt: skip
        names = ["distance", "entropy", "sink", "across chunks"]
        columns = ["head", *names]
        if len(runs) > 1:
            columns += [f"clean {name}" for name in names]
            averages = np.concatenate([averages, glances[0][1]], axis=1)
        rows = [[f"{head}", *map(float, each)] for head, each in enumerate(averages)]
        sink = "the first token of the chunk" if main.chunk else "the first token"
        content.table(
            "summaries", "What the heads do", columns, rows,
            [{"head": head} for head in range(count)],
            note=f"means over queries{some}: tokens back, nats, shares; sink: {sink}",
        )  # fmt: skip

    def _add_temperature(self, content: Content, count: int) -> None:
        config = self.moment.model.config
        places = np.unique(np.linspace(0, max(count, 4 * config.floor_scale), _CURVE).astype(int))
        content.axes["position"] = Axis("position in tokens", len(places), values=places.tolist())
        position = torch.from_numpy(np.append(places, count - 1))
        factor = temperature(config, position)
        lines: list[Any] = [("the model's", factor, "#1f77b4", None)]
        edits = [
            edit
            for edit in self.moment.edits
            if isinstance(edit, AttentionTemperature) and edit.layer == self.selection.layer
        ]
        if edits:
            factor = factor * math.prod(edit.factor(config, position) for edit in edits)
            lines.append(("edited", factor, "#d55e00", "5 4"))
        series = []
        for label, values, colour, dash in lines:
            content.array(label, values[:-1].numpy(), ("position",))
            series.append({"array": label, "label": label, "colour": colour, "dash": dash})
        is_tuned, most = config.attn_temperature_tuning or bool(edits), float(factor[-1])
        content.add(
            "temperature", "Temperature of this NoPE layer", None, ("position",),
            {"kind": "sequential", "low": 1.0, "unit": "factor"}, kind="lines",
            series=series, array=series[0]["array"], wide=False,
            note=f"its queries are multiplied by this, {most:.3g} at the end of this prompt"
            if is_tuned else "off in this model",
        )  # fmt: skip

    # ---- controls

    def _offer_layers(self) -> None:
        config = self.moment.model.config
        options = [
            (f"{i} · {'RoPE' if config.uses_rope(i) else 'NoPE'}", i)
            for i in range(config.num_hidden_layers)
        ]
        self._is_offering = True
        if list(self._layer.options) != options:
            self._layer.options = options
        self._layer.value = self.selection.layer
        self._is_offering = False

    def _choose_layer(self, change: Any) -> None:
        if not self._is_offering:
            self.selection.layer = change["new"]

    def fixed(self, content: Content) -> Collection[str]:
        return ("layer",) if _has_all_rows(content) else self.follows

    def turn(self, chosen: Set[str]) -> None:
        if _has_all_rows(self.board.content) and "layer" not in chosen:
            self.board.summary = self.summary()  # the browser has all heads and rows
        else:
            self.refresh()


def _has_all_rows(content: Content) -> bool:
    """Whether the browser has the rows of all heads and tokens of the layer."""
    rows = (array for name, array in content.arrays.items() if name.startswith("row"))
    return all("query" in array["axes"] for array in rows) and bool(content.arrays)


def _kind(layer: Layer) -> str:
    name = "RoPE" if layer.uses_rope else "NoPE"
    chunks = f"chunks of {counted(layer.chunk, 'token')}" if layer.chunk else "no chunks"
    return f"{name}, {chunks}"


def _difference(clean: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """Return edited minus clean; what only one of them sees counts as 0 in the other."""
    change = np.nan_to_num(edited) - np.nan_to_num(clean)
    return np.where(np.isnan(clean) & np.isnan(edited), np.nan, change)
