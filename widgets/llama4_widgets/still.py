"""A still picture of a board's content, for pages without script."""

import base64
import html
import io
import textwrap
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from llama4_widgets.colours import SCALES, ink
from llama4_widgets.panels import Content

_TYPES = {"u1": np.uint8, "i2": "<i2", "f4": "<f4"}
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


def png(picture: Image.Image) -> bytes:
    """Return the file of a picture."""
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def _text(x: float, y: float, text: str, kind: str = "", colour: str = "") -> str:
    style = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{style}>{html.escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def _image(parts: list[str], content: Content, panel: Any, selection: Any, y: float) -> float:
    """Add a map as a picture; return where the next begins."""
    pixels = _pixels(picked(content, panel, selection).astype(float), panel["scale"])
    tall = int(np.clip(14 * len(pixels), 60, 320))
    down, across = (content.axes[name].title for name in panel["axes"])
    where = f"{down} down, " * bool(down) + f"{across} across"
    parts.append(_text(_LEFT, y + 14, f"{panel['title']} ({where})"))
    parts.append(
        f'<image x="{_LEFT}" y="{y + 22}" width="876" height="{tall}" preserveAspectRatio="none" '
        'style="image-rendering:pixelated" href="data:image/png;base64,'
        f'{base64.b64encode(png(Image.fromarray(pixels))).decode()}"/>'
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
        table = np.array(list(map(ImageColor.getrgb, scale["colours"])))
        found = table[filled.astype(int) % len(table)]
        nothing |= filled < 0
    else:
        table = np.array(list(map(ImageColor.getrgb, SCALES[scale["kind"]])))
        share = (filled - scale["low"]) / ((scale["high"] - scale["low"]) or 1.0)
        at = np.clip(share, 0, 1) * (len(table) - 1)
        places = np.arange(len(table))
        found = np.stack([np.interp(at, places, table[:, i]) for i in range(3)], axis=-1)
    return np.where(nothing[..., None], 230, found).astype(np.uint8)
