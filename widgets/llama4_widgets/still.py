"""Still pictures of a board's content: a plotly figure, and an SVG for pages without script."""

import base64
import html
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from llama4_widgets.panels import Axis, Content

_CIVIDIS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")
_BLUE_RED = ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
_TYPES = {"u1": np.uint8, "i2": "<i2", "f4": "<f4"}
_TALL = {"map": 260, "bars": 220, "lines": 220}
_DRAWN = ("map", "bars", "lines")


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers of `panels.pack`; those of large arrays to one of 254 steps."""
    raw = np.frombuffer(packed["data"], dtype=_TYPES[packed["dtype"]]).reshape(packed["shape"])
    if packed["dtype"] != "u1":
        return raw
    values = packed["low"] + (raw.astype(float) - 1) * (packed["high"] - packed["low"]) / 254
    return np.where(raw > 0, values, np.nan)


def picked(
    content: Content, panel: Mapping[str, Any], selection: Mapping[str, int], array: str = ""
) -> np.ndarray:
    """Return what a panel draws: the axes that it shows, the others as selected."""
    packed = content.arrays[array or panel["array"]]
    values = unpack(packed)
    at = [
        slice(None) if name in panel["axes"] else _index(content.axes[name], selection)
        for name in packed["axes"]
    ]
    left = [name for name in packed["axes"] if name in panel["axes"]]
    return np.transpose(values[tuple(at)], [left.index(name) for name in panel["axes"]])


def _index(axis: Axis, selection: Mapping[str, int]) -> int:
    chosen = selection.get(axis.select or "", 0)
    if axis.values is not None:
        return list(axis.values).index(chosen) if chosen in axis.values else 0
    return min(max(chosen, 0), axis.size - 1)


def figure(content: Content, selection: Mapping[str, int], title: str) -> go.Figure:
    """Draw a content's maps, bars and lines below each other, as the selection has them."""
    panels = [panel for panel in content.panels if panel["kind"] in _DRAWN]
    if not panels:
        return go.Figure(layout={"title": {"text": html.escape(title)}, "template": "plotly_white"})
    heights = [_TALL[panel["kind"]] for panel in panels]
    drawn = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=heights,
        vertical_spacing=90 / (sum(heights) + 90 * len(panels)),
        subplot_titles=[html.escape(panel["title"]) for panel in panels],
    )
    for row, panel in enumerate(panels, start=1):
        _DRAWERS[panel["kind"]](drawn, row, content, panel, selection)
        below, left = content.axes[panel["axes"][-1]].title, panel["scale"].get("unit", "")
        if panel["kind"] == "map":
            left = content.axes[panel["axes"][0]].title
        drawn.update_xaxes(title=below, row=row)
        drawn.update_yaxes(title=left, row=row)
    drawn.update_layout(
        title={"text": html.escape(title)},
        template="plotly_white",
        height=sum(heights) + 90 * (len(panels) + 1),
        showlegend=any(panel["kind"] == "lines" for panel in panels),
    )
    return drawn


def _places(axis: Axis) -> list[int]:
    return list(axis.values) if axis.values is not None else list(range(axis.size))


def _add_map(drawn: go.Figure, row: int, content: Content, panel: Any, selection: Any) -> None:
    values = picked(content, panel, selection).astype(float)
    down, across = (content.axes[name] for name in panel["axes"])
    tile = content.arrays[panel["array"]].get("tile")
    scale = panel["scale"]
    x: Any = _places(across)
    y: Any = [str(place) for place in _places(down)]
    if tile:
        x, y = (
            np.linspace(tile[k][0], tile[k][1], n, endpoint=False).tolist()
            for k, n in (("x", tile["cols"]), ("y", tile["rows"]))
        )
    is_category = scale["kind"] == "category"
    subplot: Any = drawn.get_subplot(row, 1)
    domain = subplot.yaxis.domain
    drawn.add_trace(
        go.Heatmap(
            z=np.where(values < 0, np.nan, values) if is_category else values,
            x=x,
            y=y,
            zmin=-0.5 if is_category else scale["low"],
            zmax=len(scale["colours"]) - 0.5 if is_category else scale["high"],
            colorscale=_colorscale(scale),
            colorbar={
                "title": {"text": "log₁₀ " * scale.get("log", False) + scale.get("unit", "")},
                "len": domain[1] - domain[0],
                "y": sum(domain) / 2,
            },
        ),
        row=row,
        col=1,
    )
    drawn.update_yaxes(autorange="reversed", row=row)


def _colorscale(scale: Mapping[str, Any]) -> list[tuple[float, str]]:
    if scale["kind"] == "category":
        colours = scale["colours"]
        edges = [(i + end) / len(colours) for i in range(len(colours)) for end in (0, 1)]
        return [(edge, colours[i // 2]) for i, edge in enumerate(edges)]
    colours = _stops(scale)
    return [(i / (len(colours) - 1), colour) for i, colour in enumerate(colours)]


def _stops(scale: Mapping[str, Any]) -> tuple[str, ...]:
    return _BLUE_RED if scale["kind"] == "diverging" else _CIVIDIS


def _add_bars(drawn: go.Figure, row: int, content: Content, panel: Any, selection: Any) -> None:
    places = [str(place) for place in _places(content.axes[panel["axes"][0]])]
    heights = picked(content, panel, selection)
    drawn.add_trace(
        go.Bar(x=places, y=heights, marker={"color": panel.get("colours")}, showlegend=False),
        row=row,
        col=1,
    )
    if panel.get("clean"):
        marks = picked(content, panel, selection, panel["clean"])
        symbol = {"symbol": "line-ew-open", "size": 16, "color": "black"}
        drawn.add_trace(
            go.Scatter(x=places, y=marks, mode="markers", marker=symbol, name="clean"),
            row=row,
            col=1,
        )


def _add_lines(drawn: go.Figure, row: int, content: Content, panel: Any, selection: Any) -> None:
    places = _places(content.axes[panel["axes"][0]])
    for one in panel["series"]:
        heights = picked(content, panel, selection, one["array"])
        line = {"color": one["colour"], "dash": "dash" if one.get("dash") else "solid"}
        drawn.add_trace(
            go.Scatter(x=places, y=heights, name=one["label"], mode="lines", line=line),
            row=row,
            col=1,
        )


_DRAWERS: dict[str, Callable[..., None]] = {
    "map": _add_map,
    "bars": _add_bars,
    "lines": _add_lines,
}


def svg(content: Content, selection: Mapping[str, int], title: str) -> str:
    """Draw the maps of a content below each other, with their names."""
    parts, y = [f'<text x="12" y="22" class="title">{html.escape(title)}</text>'], 34
    for panel in content.panels:
        if panel["kind"] != "map":
            continue
        pixels = _pixels(picked(content, panel, selection).astype(float), panel["scale"])
        tall = int(np.clip(14 * len(pixels), 60, 320))
        written = io.BytesIO()
        Image.fromarray(pixels).save(written, "PNG")
        down, across = (content.axes[name].title for name in panel["axes"])
        note = html.escape(f"{panel['title']} ({down} down, {across} across)")
        parts.append(f'<text x="12" y="{y + 14}">{note}</text>')
        parts.append(
            f'<image x="12" y="{y + 22}" width="876" height="{tall}" preserveAspectRatio="none" '
            'style="image-rendering:pixelated" href="data:image/png;base64,'
            f'{base64.b64encode(written.getvalue()).decode()}"/>'
        )
        y += tall + 34
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{y + 6}">'
    style = "<style>text{font:13px sans-serif;fill:#222}.title{font-weight:600}</style>"
    return f'{head}{style}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'


def _pixels(values: np.ndarray, scale: Mapping[str, Any]) -> np.ndarray:
    """Return ``[rows, columns, 3]`` colours; nothing there is light grey."""
    nothing = ~np.isfinite(values)
    filled = np.where(nothing, 0, values)
    if scale["kind"] == "category":
        table = np.array([_rgb(colour) for colour in scale["colours"]])
        found = table[filled.astype(int) % len(table)]
        nothing |= filled < 0
    else:
        table = np.array([_rgb(colour) for colour in _stops(scale)])
        share = (filled - scale["low"]) / ((scale["high"] - scale["low"]) or 1.0)
        at = np.clip(share, 0, 1) * (len(table) - 1)
        stops = np.arange(len(table))
        found = np.stack([np.interp(at, stops, table[:, i]) for i in range(3)], axis=-1)
    return np.where(nothing[..., None], 230, found).astype(np.uint8)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
