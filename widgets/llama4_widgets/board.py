"""The one widget that draws all views: panels of arrays, linked by a shared selection."""

import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from llama4_widgets.panels import Content
from llama4_widgets.selection import Selection


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class Board(anywidget.AnyWidget):
    """Draws a `Content`; clicks and keys move the selection, which other boards share."""

    _esm = _read("elements.js") + _read("board.js")
    _css = _read("board.css")

    title = traitlets.Unicode().tag(sync=True)
    help = traitlets.Unicode(help="what the view teaches, in two sentences").tag(sync=True)
    summary = traitlets.Unicode(help="what is on screen, in words").tag(sync=True)
    problem = traitlets.Unicode(help="what went wrong, in words").tag(sync=True)
    busy = traitlets.Unicode(help="what is under way").tag(sync=True)
    group = traitlets.Unicode(help="boards of a group share the selection").tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)
    content = traitlets.Instance(Content).tag(
        sync=True, to_json=lambda content, _: content.message()
    )

    def __init__(self, selection: Selection, **traits: Any):
        self._selection = selection
        start = {"group": selection.group, "selection": selection.shared}
        super().__init__(**({"content": Content()} | start | traits))
        selection.observe(self._follow, "shared")

    def _follow(self, change: Any) -> None:
        self.selection = change["new"]

    @traitlets.observe("selection")
    def _lead(self, change: Any) -> None:
        try:
            self._selection.follow(change["new"])
        except traitlets.TraitError as error:
            self.problem = str(error)

    def state(self) -> dict[str, Any]:
        """Return the traits that a page without a kernel needs."""
        names = ("title", "help", "summary", "group", "selection")
        found = {name: getattr(self, name) for name in names}
        return found | {"problem": "", "busy": "", "content": self.content.message()}


def page(boards: Sequence[Board], title: str) -> str:
    """Return boards as one HTML page that works by itself: no kernel, no network."""
    states = json.dumps([board.state() for board in boards], default=_base64)
    parts = {
        "TITLE": html.escape(title[:80]),
        "STYLE": Board._css,
        "SCRIPT": Board._esm.replace("export default { render };", ""),
        "STATES": states.replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("boards.html"))


def _base64(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}
