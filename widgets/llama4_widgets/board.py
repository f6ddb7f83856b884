"""The one widget that draws all views: panels of arrays, linked by a shared selection."""

import base64
import gzip
import html
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from llama4_widgets.colours import SCALES
from llama4_widgets.panels import Content
from llama4_widgets.selection import Selection

_PRESS = re.compile(r": press [A-Z].*", re.DOTALL)  # a button that no kept page has


def read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class Board(anywidget.AnyWidget):
    """Draws a `Content`; clicks and keys move the selection, which other boards share."""

    _esm = read("elements.js") + f"const SCALES = {json.dumps(SCALES)};\n" + read("board.js")
    _css = read("board.css")

    title = traitlets.Unicode().tag(sync=True)
    help = traitlets.Unicode(help="what the view teaches, in two sentences").tag(sync=True)
    summary = traitlets.Unicode(help="what is on screen, in words").tag(sync=True)
    problem = traitlets.Unicode(help="what went wrong, in words").tag(sync=True)
    busy = traitlets.Unicode(help="what is under way").tag(sync=True)
    group = traitlets.Unicode(help="boards of a group share the selection").tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)
    content = traitlets.Instance(Content).tag(
        sync=True, to_json=lambda content, _: content.message(is_whole=False)
    )
    pages = traitlets.Dict(help="parts of the content's arrays, for what is selected").tag(
        sync=True
    )
    finer = traitlets.Dict(help="arrays of a region, drawn over the content's").tag(sync=True)

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
            self._selection.hear(change["new"])
        except traitlets.TraitError as error:
            self.problem = str(error)
        self.selection = self._selection.shared

    @traitlets.observe("content", "selection")
    def _turn(self, _change: Any) -> None:
        self.pages = self.content.pages(self.selection)

    def answer(self, panel: str, arrays: Mapping[str, Any], notes: Mapping[str, str]) -> None:
        """Answer a wish for a region: packed arrays, and what the panels say about them."""
        count = self.finer.get("count", 0) + 1  # a trait tells only of changes
        finer = {"arrays": dict(arrays), "notes": dict(notes)}
        self.finer = finer | {"panel": panel, "count": count}

    def state(self) -> dict[str, Any]:
        """Return the traits that a page without a kernel needs; what failed shows only why."""
        names = ("title", "help", "group", "selection")
        found = {name: getattr(self, name) for name in names}
        content = Content() if self.problem else self.content
        said = {
            name: text and f"When this was kept: {_PRESS.sub('.', text)}"
            for name, text in (("summary", self.summary), ("problem", self.problem))
        }
        return found | said | {"busy": "", "content": content.message()}


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a name to write to; that file gets its `path` when the block ends, and not if it fails.

    Raises:
        FileNotFoundError: no folder to write it to.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_page(path: str | Path, *content: Any) -> None:
    """Write what `page_of` returns.

    Raises:
        FileNotFoundError: no folder to write it to.
    """
    text = page_of(*content)
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def page_of(states: Sequence[Mapping[str, Any]], title: str, about: Sequence[str] = ()) -> str:
    """Return states of boards as one HTML page that works by itself: no kernel, no network.

    `about` are paragraphs before them, which say what it is.
    """
    text, data = flat(states)
    packed = gzip.compress(struct.pack("<I", len(text)) + text + data, mtime=0)
    parts = {
        "TITLE": html.escape(title[:80]),
        "ABOUT": "".join(f"<p>{html.escape(line)}</p>" for line in about),
        "STYLE": Board._css,
        "SCRIPT": Board._esm.replace("export default { render };", ""),
        "STATES": base64.b64encode(packed).decode(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read("boards.html"))


def flat(value: Any) -> tuple[bytes, bytes]:
    """Return a value as JSON, and its arrays one after the other; the JSON says where each lies."""
    places: dict[bytes, int] = {}  # equal arrays are written once
    end = 0

    def place(data: Any) -> dict[str, list[int]]:
        nonlocal end
        if not isinstance(data, bytes):
            raise TypeError(f"{type(data).__name__} {data!r:.60} cannot be written as JSON")
        if data not in places:
            places[data], end = end, end + len(data)
        return {"bytes": [places[data], len(data)]}

    text = json.dumps(value, default=place, ensure_ascii=False, allow_nan=False)
    return text.encode(), b"".join(places)


def unflat(text: bytes, data: bytes) -> Any:
    """Return the value of `flat`.

    Raises:
        ValueError: text that is no JSON, or names places that the data does not have.
    """

    def take(found: dict[str, Any]) -> Any:
        if found.keys() != {"bytes"}:
            return found
        start, length = found["bytes"]
        if not 0 <= start <= start + length <= len(data):
            raise ValueError("arrays are missing")
        return data[start : start + length]

    return json.loads(text, object_hook=take)
