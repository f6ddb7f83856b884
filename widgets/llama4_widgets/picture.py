"""A still picture of a prompt's routing, for pages that run no script (GitHub's, for one)."""

import html
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

from llama4_widgets.colours import colour
from llama4_widgets.words import describe, visible

if TYPE_CHECKING:
    from llama4_lab.analysis.routing import Routing

_LEFT, _RIGHT = 16, 884  # all sizes in pixels
_CHARACTER, _LINE = 7.9, 30
_MAX_WORDS = 300  # the map below them shows every token
_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}">
<style>text {{ font: 13px monospace; fill: #222 }} .title {{ font: 600 14px sans-serif }}
.note {{ font: 12px sans-serif; fill: #555 }} .number {{ font: 9px sans-serif }}</style>
<rect width="100%" height="100%" fill="#fff"/>
"""


def svg(routing: "Routing", layer: int, token: int) -> str:
    """Draw the words coloured by one layer's choices, the map of all layers, and the legend."""
    row = routing.row(layer)
    parts = [_text(_LEFT, 24, describe(routing, layer, token), "title")]
    y = _add_words(parts, routing.tokens, routing.expert[row, :, 0].tolist(), token) + 40
    parts.append(_text(_LEFT, y, "Chosen expert, by layer (down) and token (across)", "note"))
    y = _add_map(parts, routing, row, token, y + 10) + 24
    y = _add_legend(parts, routing.num_experts, y)
    return _HEAD.format(height=y + 16) + "\n".join(parts) + "\n</svg>"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def _add_words(parts: list[str], tokens: list[str], experts: list[int], selected: int) -> float:
    """Set the tokens like text, each with its expert's number; return the last baseline."""
    x, y = float(_LEFT), 60.0
    for i, (token, expert) in enumerate(zip(tokens[:_MAX_WORDS], experts, strict=False)):
        word = visible(token)
        cells = sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in word)
        end, number = cells * _CHARACTER, str(expert)
        width = end + 6 * len(number) + 5
        if x + width > _RIGHT:
            x, y = float(_LEFT), y + _LINE
        frame = 'stroke="#000"' if i == selected else ""
        style = f'fill="{colour(expert)}"'
        parts += [
            _box(x, y - 15, width - 1, 23, f'{style} fill-opacity="0.3" {frame}'),
            _box(x, y + 6, width - 1, 2.5, style),
            _text(x + 2, y, word, "word"),
            _text(x + 3 + end, y + 3, number, "number"),
        ]
        x += width
        if "\n" in token:
            x, y = float(_LEFT), y + _LINE
    if len(tokens) > _MAX_WORDS:
        parts.append(_text(x + 6, y, f"… and {len(tokens) - _MAX_WORDS} more", "note"))
    return y


def _add_map(parts: list[str], routing: "Routing", row: int, token: int, top: float) -> float:
    """Draw one cell for every layer and token; return the lower edge."""
    left = _LEFT + 24
    expert = routing.expert[..., 0]
    height, width = 14, min(16.0, (_RIGHT - left) / expert.shape[1])
    for i, layer in enumerate(routing.layers):
        parts.append(_text(_LEFT, top + height * i + 11, str(layer), "note"))
    parts.append(f'<g transform="translate({left} {top}) scale({width:.4f} {height})">')
    for e in np.unique(expert).tolist():
        cells = zip(*(expert == e).nonzero(), strict=True)
        path = "".join(f"M{x} {y}h1v.93h-1z" for y, x in cells)
        parts.append(f'<path fill="{colour(e)}" d="{path}"/>')
    parts.append("</g>")
    frame = 'fill="none" stroke="#000" stroke-width="2"'
    parts.append(_box(left + width * token, top + height * row, width, height, frame))
    return top + height * len(routing.layers)


def _add_legend(parts: list[str], num_experts: int, y: float) -> float:
    """Name the experts' colours, sixteen in a line; return the last baseline."""
    parts.append(_text(_LEFT, y, "expert", "note"))
    for e in range(num_experts):
        x, line = 70 + 50 * (e % 16), y + 20 * (e // 16)
        parts.append(_box(x, line - 11, 14, 14, f'fill="{colour(e)}"'))
        parts.append(_text(x + 18, line, str(e), "note"))
    return y + 20 * ((num_experts - 1) // 16)
