"""Labs that are kept: what the views showed, in one file that opens without a model or torch.

A .lab file is a zip of ``lab.json`` (all but the arrays), ``arrays.bin`` (what the views drew, as
they drew it), ``routing/*.npy`` and ``pictures/*.png``; nothing in it can run.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np
from PIL import Image

from llama4_widgets.board import Board, flat, unflat, whole, write_page
from llama4_widgets.panels import Axis, Content
from llama4_widgets.selection import FIELDS, Selection
from llama4_widgets.still import png, unpack
from llama4_widgets.words import counted

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMAT = 1
BESIDE = " beside"  # ends the name of a view of the other run, which follows this one's
STYLE = (Path(__file__).parent / "app.css").read_text(encoding="utf-8")
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, RuntimeError)
_KERNEL = (
    "Tokens, layers and heads can be chosen here. What a kernel computes when it is asked (finer "
    "parts of zoomed maps, buttons, sums about another token) is a picture of how it was, and the "
    "view says for what it was kept."
)


@dataclass(frozen=True, eq=False)
class Recording:
    """What a lab showed, and what it was about; `Recording.read` reads what `write` has written.

    `about` holds prompt, tokens, ids, edits (JSON of `llama4_lab.edits.dumps`), pictures' boxes,
    model, versions and date; `states` the boards' traits by view; `routing` the arrays of
    `llama4_lab.analysis.routing.Routing`, empty for a model without experts.
    """

    about: dict[str, Any]
    states: dict[str, dict[str, Any]]
    routing: dict[str, np.ndarray] = field(default_factory=dict)
    pictures: list[Image.Image] = field(default_factory=list)

    def write(self, path: str | Path) -> None:
        """Write one file, whole or not at all.

        Raises:
            FileNotFoundError: no folder to write it to.
        """
        text, data = flat({"format": FORMAT, "about": self.about, "states": self.states})
        with whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("lab.json", text)
            file.writestr("arrays.bin", data)
            for name, values in self.routing.items():
                with file.open(f"routing/{name}.npy", "w") as array:
                    np.save(array, values, allow_pickle=False)
            for i, picture in enumerate(self.pictures):
                file.writestr(f"pictures/{i}.png", png(picture))

    @classmethod
    def read(cls, path: str | Path) -> "Recording":
        """Read a file, all of it before anything is shown.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is none of ours, is damaged, or is of a newer llama4_lab.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with zipfile.ZipFile(path) as file:
                found = unflat(file.read("lab.json"), file.read("arrays.bin"))
                if (version := found["format"]) == FORMAT:
                    return cls(found["about"], _checked(found["states"]), *_blobs(file))
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is no file of LabApp.save, or it is damaged: {error.args[0]}"
            ) from error
        raise ValueError(
            f"{path} has format {version}, and this llama4_lab reads {FORMAT}: "
            "open it with the one that wrote it, or a newer one"
        )

    def to_html(self, path: str | Path) -> None:
        """Write one page that works by itself, without kernel and network.

        Raises:
            FileNotFoundError: no folder to write it to.
        """
        states = [state | {"wide": self.is_wide(name)} for name, state in self.states.items()]
        write_page(path, states, "Llama 4 lab", [*self.told(), _KERNEL])

    def is_wide(self, name: str) -> bool:
        """Whether a view stands across both columns of a comparison."""
        is_one_of_two = name.endswith(BESIDE) or name + BESIDE in self.states
        return bool(self.about.get("beside")) and not is_one_of_two

    def told(self) -> list[str]:
        """Say what was run, on what, and when."""
        about, model = self.about, self.about["model"]
        prompt = about["prompt"] if isinstance(about["prompt"], str) else "".join(about["tokens"])
        short = prompt if len(prompt) <= 400 else f"{prompt[:400]} …"
        pictures = f" with {counted(len(self.pictures), 'picture')}" if self.pictures else ""
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines = [f"Prompt, {counted(len(about['tokens']), 'token')}{pictures}: {short.strip()}"]
        lines += [f"Edits: {about['edits']}" if about["edits"] != "[]" else "No edits."]
        if about.get("beside"):
            lines += [f"Beside it: {about['beside']}"]
        lines += [f"Model: {model['name']}; sha256 {model['sha256'][:16]}… of {model['of']}."]
        return [*lines, f"Written on {about['date']} with {versions}."]


def _checked(states: Mapping[str, Any]) -> dict[str, Any]:
    """Return states whose arrays are all there, in their sizes."""
    for state in states.values():
        for array in state["content"]["arrays"].values():
            unpack(array)
    return dict(states)


def _blobs(file: zipfile.ZipFile) -> tuple[dict[str, np.ndarray], list[Image.Image]]:
    routing, pictures = {}, []
    for name in file.namelist():
        if name.startswith("routing/"):
            values = np.load(io.BytesIO(file.read(name)), allow_pickle=False)
            routing[Path(name).stem] = values
        elif name.startswith("pictures/"):
            picture = Image.open(io.BytesIO(file.read(name)))
            picture.load()
            pictures.append(picture)
    return routing, pictures


class KeptLab(ipywidgets.VBox):
    """Shows a recording: its boards, linked by one `selection`, which moves without a model."""

    def __init__(self, recording: Recording):
        self.recording = recording
        states = recording.states.values()
        start = next((state["selection"] for state in states), {})
        self.selection = Selection(**{name: start[name] for name in FIELDS if name in start})
        self.boards: dict[str, Board] = {}
        for name, state in recording.states.items():
            shown = {key: state[key] for key in ("title", "help", "summary", "problem")}
            content = _content(state["content"])
            self.boards[name] = Board(self.selection, content=content, **shown)
        axes = [axis for board in self.boards.values() for axis in board.content.axes.values()]
        self.selection.bounds = {
            name: max(
                (max(axis.values or [axis.size - 1]) + 1 for axis in axes if axis.select == name),
                default=1,
            )
            for name in FIELDS
        }
        super().__init__()
        about = "\n".join(recording.told())
        grid = ipywidgets.Box([ipywidgets.VBox([board]) for board in self.boards.values()])
        grid.add_class("l4-app-grid")
        for name, box in zip(self.boards, grid.children, strict=True):
            box.add_class("l4-kept")
            if recording.is_wide(name):
                box.add_class("l4-app-wide")
        if recording.about.get("beside"):
            grid.add_class("l4-app-sides")
        text = ipywidgets.Label(about)
        text.add_class("l4-app-about")
        self.children = [ipywidgets.HTML(f"<style>{STYLE}</style>"), text, grid]
        self.add_class("l4-app")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add what was run, for pages that run no script."""
        data = super()._repr_mimebundle_(**kwargs) or {}
        data["text/plain"] = "\n".join(self.recording.told())
        return data

    def figure(self, name: str) -> "go.Figure":
        """Return what a view showed as one static figure, for what is selected now."""
        from llama4_widgets.plots import figure

        board = self.boards[name]
        return figure(board.content, self.selection.shared, board.title)

    def to_html(self, path: str | Path) -> None:
        """Write one page that works by itself: no kernel, no network."""
        self.recording.to_html(path)


def open_lab(path: str | Path) -> KeptLab:
    """Show a file of `LabApp.save`; this needs no model and does not import torch.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be shown, and why.
    """
    return KeptLab(Recording.read(path))


def _content(message: Mapping[str, Any]) -> Content:
    axes = {name: Axis(**axis) for name, axis in message["axes"].items()}
    said = {name: message[name] for name in ("sentence", "otherwise", "kept") if name in message}
    return Content(axes, dict(message["arrays"]), list(message["panels"]), **said)
