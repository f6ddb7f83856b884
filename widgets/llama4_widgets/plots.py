"""A plotly figure of a board's content."""

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from llama4_widgets.colours import SCALES
from llama4_widgets.panels import Axis, Content
from llama4_widgets.still import picked

_TALL = {"map": 260, "bars": 220, "lines": 220}
_ROOMY = 90  # places; with more, cells are too narrow for a name and a number


def figure(content: Content, selection: Mapping[str, int], title: str) -> go.Figure:
    """Draw a content's maps, bars and lines below each other, as the selection has them."""
    panels = [panel for panel in content.panels if panel["kind"] in _TALL]
    lines = textwrap.wrap(title, 100)
    heading = {"text": "<br>".join(map(_escaped, lines)), "yref": "container", "y": 1}
    heading |= {"yanchor": "top", "pad": {"t": 16}, "font": {"size": 15}}
    above = 70 + 20 * len(lines)
    if not panels:
        bare = {"xaxis": {"visible": False}, "yaxis": {"visible": False}, "height": above}
        return go.Figure(layout={"title": heading, "template": "plotly_white", **bare})
    heights = [_tall(content, panel) for panel in panels]
    across = [content.axes[panel["axes"][-1]] for panel in panels if panel["kind"] == "map"]
    gap = 120 if any(map(_is_named, across)) else 90
    drawn = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=heights,
        vertical_spacing=gap / (sum(heights) + gap * max(len(panels) - 1, 1)),  # below one
        subplot_titles=[_caption(panel) for panel in panels],
    )
    for row, panel in enumerate(panels, start=1):
        at: dict[str, Any] = {"row": row, "col": 1}
        _DRAWERS[panel["kind"]](drawn, at, content, panel, selection)
        below, left = content.axes[panel["axes"][-1]].title, panel["scale"].get("unit", "")
        if panel["kind"] == "map":
            left = content.axes[panel["axes"][0]].title
        drawn.update_xaxes(title=below, **at)
        drawn.update_yaxes(title=left, **at)
    below = gap - 30
    drawn.update_layout(
        title=heading,
        template="plotly_white",
        height=sum(heights) + gap * (len(panels) - 1) + above + below,
        margin={"t": above, "b": below},
        showlegend=any(panel["kind"] == "lines" for panel in panels),
    )
    return drawn


def _tall(content: Content, panel: Mapping[str, Any]) -> int:
    """Return a panel's height in pixels: of maps with few rows, what they need."""
    if panel["kind"] != "map" or "tile" in content.arrays[panel["array"]]:
        return _TALL[panel["kind"]]
    return int(np.clip(26 * content.axes[panel["axes"][0]].size, 100, _TALL["map"]))


def _is_named(axis: Axis) -> bool:
    """Whether each place has a name that a figure has room for."""
    return axis.labels is not None and axis.size <= _ROOMY


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)  # plotly would show the names of quotes


def _caption(panel: Mapping[str, Any]) -> str:
    note = panel.get("note", "")
    note = f"<span style='font-size:12px;color:#555'>  {_escaped(note)}</span>" if note else ""
    return _escaped(panel["title"]) + note


def _places(axis: Axis) -> list[int]:
    return list(axis.values) if axis.values is not None else list(range(axis.size))


def _rows(axis: Axis) -> list[str]:
    """Return what a map's rows are called: by names where nothing selects them by number."""
    is_selected = axis.labels is None or axis.select
    return list(map(str, _places(axis)) if is_selected else map(_escaped, axis.labels or ()))


def _add_map(drawn: go.Figure, at: Any, content: Content, panel: Any, selection: Any) -> None:
    values = picked(content, panel, selection).astype(float)
    down, across = (content.axes[name] for name in panel["axes"])
    tile = content.arrays[panel["array"]].get("tile")
    scale = panel["scale"]
    x: Any = _places(across)
    y: Any = _rows(down)
    if tile:
        x, y = (
            np.linspace(tile[k][0], tile[k][1], n, endpoint=False).tolist()
            for k, n in (("x", tile["cols"]), ("y", tile["rows"]))
        )
    is_category = scale["kind"] == "category"
    is_roomy = across.size <= _ROOMY and not tile
    bottom, top = _domain(drawn, at)
    drawn.add_heatmap(
        z=np.where(values < 0, np.nan, values) if is_category else values,
        x=x,
        y=y,
        zmin=-0.5 if is_category else scale["low"],
        zmax=len(scale["colours"]) - 0.5 if is_category else scale["high"],
        colorscale=_colorscale(scale),
        texttemplate="%{z}" if is_category and is_roomy else None,
        xgap=int(is_roomy),
        ygap=int(not tile),
        colorbar={
            "dtick": 1 if is_category and len(scale["colours"]) <= 16 else None,
            "title": {"text": "log₁₀ " * scale.get("log", False) + scale.get("unit", "")},
            "len": top - bottom,
            "y": (bottom + top) / 2,
        },
        **at,
    )
    if ringed := panel.get("marks") or panel.get("clean"):
        other = picked(content, panel, selection, ringed)
        rings = np.argwhere(other > 0 if panel.get("marks") else other != values)
        ring = {"symbol": "circle", "size": 6, "color": "white"}
        ring |= {"line": {"color": "black", "width": 1.5}}
        drawn.add_scatter(
            x=[x[j] for _, j in rings],
            y=[y[i] for i, _ in rings],
            mode="markers",
            marker=ring,
            showlegend=False,
            hoverinfo="skip",
            **at,
        )
    drawn.update_yaxes(autorange="reversed", showgrid=False, **at)
    drawn.update_xaxes(showgrid=False, **at)
    if _is_named(across):
        names = [name if len(name) <= 10 else f"{name[:9]}…" for name in across.labels or ()]
        ticks = {"tickvals": x, "ticktext": list(map(_escaped, names)), "tickangle": -90}
        drawn.update_xaxes(**ticks, tickfont={"size": 10}, **at)
    if is_roomy and across.select and down.select:
        i, j = down.index(selection), x[across.index(selection)]
        frame = {"type": "rect", "x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5}
        drawn.add_shape(**frame, line={"color": "black", "width": 3}, **at)


def _colorscale(scale: Mapping[str, Any]) -> Sequence[Any]:
    if scale["kind"] != "category":
        return SCALES[scale["kind"]]
    colours = scale["colours"]
    return [((i + end) / len(colours), c) for i, c in enumerate(colours) for end in (0, 1)]


def _add_bars(drawn: go.Figure, at: Any, content: Content, panel: Any, selection: Any) -> None:
    places = [str(place) for place in _places(content.axes[panel["axes"][0]])]
    heights = picked(content, panel, selection)
    one = {"axes": []}
    framed = [int(picked(content, one, selection, name)) for name in panel.get("chosen") or ()]
    is_framed = np.isin(range(len(heights)), framed)
    unit = panel["scale"].get("unit", "")
    drawn.add_bar(
        x=places,
        y=heights,
        marker={
            "color": panel.get("colours", "#6c9cfc"),
            "opacity": np.where(is_framed, 1, 0.65) if framed else 1,
            "line": {"color": "black", "width": np.where(is_framed, 2.5, 0)},
        },
        texttemplate="%{y:.3~g}" if len(heights) <= 16 else None,
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"%{{x}}: %{{y:.3~g}} {unit}<extra></extra>",
        showlegend=False,
        **at,
    )
    if even := panel.get("reference"):
        drawn.add_hline(y=even, line={"dash": "dash", "color": "#444"}, **at)
    if panel.get("clean"):
        marks = picked(content, panel, selection, panel["clean"])
        symbol = {"symbol": "line-ew-open", "size": 16, "color": "black"}
        drawn.add_scatter(x=places, y=marks, mode="markers", marker=symbol, name="clean", **at)


def _add_lines(drawn: go.Figure, at: Any, content: Content, panel: Any, selection: Any) -> None:
    places = _places(content.axes[panel["axes"][0]])
    for one in panel["series"]:
        heights, label = picked(content, panel, selection, one["array"]), one["label"]
        line = {"color": one["colour"], "dash": "dash" if one.get("dash") else "solid"}
        style: Any = {"name": label, "mode": "lines", "line": line, "showlegend": bool(label)}
        drawn.add_scatter(x=places, y=heights, **style, **at)
    if panel.get("doubles"):
        ticks = {"tickvals": places[::2], "ticktext": [f"{place:,}" for place in places[::2]]}
        drawn.update_xaxes(type="log", **ticks, **at)
    _, top = _domain(drawn, at)  # no scale is there
    drawn.update_layout(legend={"y": top, "yanchor": "top"})


def _domain(drawn: go.Figure, at: Any) -> tuple[float, float]:
    """Return where a subplot begins and ends, as shares of the height."""
    subplot: Any = drawn.get_subplot(**at)
    return subplot.yaxis.domain


_DRAWERS: dict[str, Callable[..., None]] = {"map": _add_map, "bars": _add_bars, "lines": _add_lines}
