"""Still pictures of a board's content: a plotly figure, and an SVG for pages without script."""

import base64
import html
import io
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from llama4_widgets.colours import ink
from llama4_widgets.panels import Axis, Content

_CIVIDIS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")
_BLUE_RED = ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
_TYPES = {"u1": np.uint8, "i2": "<i2", "f4": "<f4"}
_TALL = {"map": 260, "bars": 220, "lines": 220}
_DRAWN = ("map", "bars", "lines")
_ROOMY = 90  # places; with more, cells are too narrow for a name and a number
_LEFT, _RIGHT = 12, 888  # all sizes of an SVG in pixels
_CHARACTER, _LINE = 7.9, 30
_MAX_WORDS = 300  # of a strip


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
        slice(None) if name in panel["axes"] else content.axes[name].index(selection)
        for name in packed["axes"]
    ]
    left = [name for name in packed["axes"] if name in panel["axes"]]
    return np.transpose(np.asarray(values[tuple(at)]), [left.index(name) for name in panel["axes"]])


def figure(content: Content, selection: Mapping[str, int], title: str) -> go.Figure:
    """Draw a content's maps, bars and lines below each other, as the selection has them."""
    panels = [panel for panel in content.panels if panel["kind"] in _DRAWN]
    lines = textwrap.wrap(title, 100)
    heading = {"text": "<br>".join(map(html.escape, lines)), "yref": "container", "y": 1}
    heading |= {"yanchor": "top", "pad": {"t": 16}, "font": {"size": 15}}
    if not panels:
        return go.Figure(layout={"title": heading, "template": "plotly_white"})
    heights = [_tall(content, panel) for panel in panels]
    gap = 120 if any(map(_is_named, _across(content, panels))) else 90
    drawn = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=heights,
        vertical_spacing=gap / (sum(heights) + gap * max(len(panels) - 1, 1)),  # below one
        subplot_titles=[_caption(panel) for panel in panels],
    )
    for row, panel in enumerate(panels, start=1):
        _DRAWERS[panel["kind"]](drawn, row, content, panel, selection)
        below, left = content.axes[panel["axes"][-1]].title, panel["scale"].get("unit", "")
        if panel["kind"] == "map":
            left = content.axes[panel["axes"][0]].title
        drawn.update_xaxes(title=below, row=row)
        drawn.update_yaxes(title=left, row=row)
    above, below = 70 + 20 * len(lines), gap - 30
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


def _across(content: Content, panels: Sequence[Mapping[str, Any]]) -> list[Axis]:
    return [content.axes[panel["axes"][-1]] for panel in panels if panel["kind"] == "map"]


def _is_named(axis: Axis) -> bool:
    """Whether each place has a name that a figure has room for."""
    return axis.labels is not None and axis.size <= _ROOMY


def _caption(panel: Mapping[str, Any]) -> str:
    note = panel.get("note", "")
    note = f"<span style='font-size:12px;color:#555'>  {html.escape(note)}</span>" if note else ""
    return html.escape(panel["title"]) + note


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
    is_roomy = across.size <= _ROOMY and not tile
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
            texttemplate="%{z}" if is_category and is_roomy else None,
            xgap=int(is_roomy),
            ygap=int(not tile),
            colorbar={
                "dtick": 1 if is_category and len(scale["colours"]) <= 16 else None,
                "title": {"text": "log₁₀ " * scale.get("log", False) + scale.get("unit", "")},
                "len": domain[1] - domain[0],
                "y": sum(domain) / 2,
            },
        ),
        row=row,
        col=1,
    )
    if ringed := panel.get("marks") or panel.get("clean"):
        other = picked(content, panel, selection, ringed)
        at = np.argwhere(other > 0 if panel.get("marks") else other != values)
        ring = {"symbol": "circle", "size": 6, "color": "white"}
        ring |= {"line": {"color": "black", "width": 1.5}}
        drawn.add_trace(
            go.Scatter(
                x=[x[j] for _, j in at],
                y=[y[i] for i, _ in at],
                mode="markers",
                marker=ring,
                showlegend=False,
                hoverinfo="skip",
            ),
            row=row,
            col=1,
        )
    drawn.update_yaxes(autorange="reversed", showgrid=False, row=row)
    drawn.update_xaxes(showgrid=False, row=row)
    if _is_named(across):
        names = [name if len(name) <= 10 else f"{name[:9]}…" for name in across.labels or ()]
        ticks = {"tickvals": x, "ticktext": list(map(html.escape, names)), "tickangle": -90}
        drawn.update_xaxes(**ticks, tickfont={"size": 10}, row=row)
    if is_roomy and across.select and down.select:
        i, j = down.index(selection), x[across.index(selection)]
        frame = {"type": "rect", "x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5}
        drawn.add_shape(**frame, line={"color": "black", "width": 3}, row=row, col=1)


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
    one = {"axes": []}
    framed = [int(picked(content, one, selection, name)) for name in panel.get("chosen") or ()]
    is_framed = np.isin(range(len(heights)), framed)
    unit = panel["scale"].get("unit", "")
    drawn.add_trace(
        go.Bar(
            x=places,
            y=heights,
            marker={
                "color": panel.get("colours"),
                "opacity": np.where(is_framed, 1, 0.65) if framed else 1,
                "line": {"color": "black", "width": np.where(is_framed, 2.5, 0)},
            },
            texttemplate="%{y:.3~g}" if len(heights) <= 16 else None,
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"%{{x}}: %{{y:.3~g}} {unit}<extra></extra>",
            showlegend=False,
        ),
        row=row,
        col=1,
    )
    if even := panel.get("reference"):
        at: Any = {"row": row, "col": 1}
        drawn.add_hline(y=even, line={"dash": "dash", "color": "#444"}, **at)
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
    """Draw the words of a content's strips and its maps below each other, with their names."""
    lines = textwrap.wrap(title, 120)
    parts = [_text(_LEFT, 22 + 18 * i, line, "title") for i, line in enumerate(lines)]
    y = 18.0 * len(lines) + 16
    legends: list[Any] = []
    for panel in content.panels:
        draw = {"strip": _words, "map": _image}.get(panel["kind"])
        if draw is None:
            continue
        y = draw(parts, content, panel, selection, y)
        scale = panel["scale"]
        if scale["kind"] == "category" and scale not in legends:
            legends.append(scale)
    for scale in legends:
        y = _legend(parts, scale, y)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{y + 6:.0f}">'
    style = (
        "<style>text{font:13px sans-serif;fill:#222}.title{font-weight:600}"
        ".word{font:13px monospace}.number{font-size:9px}</style>"
    )
    return f'{head}{style}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, kind: str = "", colour: str = "") -> str:
    style = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{style}>{html.escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def _image(parts: list[str], content: Content, panel: Any, selection: Any, y: float) -> float:
    """Add a map as a picture; return where the next begins."""
    pixels = _pixels(picked(content, panel, selection).astype(float), panel["scale"])
    tall = int(np.clip(14 * len(pixels), 60, 320))
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    down, across = (content.axes[name].title for name in panel["axes"])
    parts.append(_text(_LEFT, y + 14, f"{panel['title']} ({down} down, {across} across)"))
    parts.append(
        f'<image x="{_LEFT}" y="{y + 22}" width="876" height="{tall}" preserveAspectRatio="none" '
        'style="image-rendering:pixelated" href="data:image/png;base64,'
        f'{base64.b64encode(written.getvalue()).decode()}"/>'
    )
    return y + tall + 34


def _words(parts: list[str], content: Content, panel: Any, selection: Any, y: float) -> float:
    """Set the words of a strip like text, each with its numbers; return where the next begins."""
    axis = content.axes[panel["axes"][0]]
    words, selected = list(axis.labels or ()), axis.index(selection)
    colours = _pixels(picked(content, panel, selection).astype(float)[None], panel["scale"])[0]
    numbers = [
        picked(content, panel, selection, name).astype(int) for name in panel.get("chosen") or ()
    ]
    parts.append(_text(_LEFT, y + 14, panel["title"]))
    x, y = float(_LEFT), y + 42
    for i, word in enumerate(words[:_MAX_WORDS]):
        cells = sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in word)
        number = ",".join(str(each[i]) for each in numbers if each[i] >= 0)
        end = cells * _CHARACTER
        width = end + 6 * len(number) + 5
        if x + width > _RIGHT:
            x, y = float(_LEFT), y + _LINE
        back = "#" + bytes(colours[i].tolist()).hex()
        frame = 'stroke="#000" stroke-width="2"' * (i == selected)
        parts += [
            _box(x, y - 15, width - 1, 23, f'fill="{back}" {frame}'),
            _text(x + 2, y, word, "word", ink(back)),
            _text(x + 3 + end, y + 3, number, "number", ink(back)),
        ]
        x += width
        if "↵" in word:
            x, y = float(_LEFT), y + _LINE
    if len(words) > _MAX_WORDS:
        parts.append(_text(x + 6, y, f"… and {len(words) - _MAX_WORDS} more"))
    return y + 24


def _legend(parts: list[str], scale: Mapping[str, Any], y: float) -> float:
    """Name the colours of experts, sixteen in a line; return where the next begins."""
    parts.append(_text(_LEFT, y + 14, scale["unit"]))
    for i, colour in enumerate(scale["colours"]):
        x, top = 70 + 50 * (i % 16), y + 20 * (i // 16)
        parts.append(_box(x, top + 3, 14, 14, f'fill="{colour}"'))
        parts.append(_text(x + 18, top + 14, str(i)))
    return y + 20 * (1 + (len(scale["colours"]) - 1) // 16) + 6


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
