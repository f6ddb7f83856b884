"""The bar above the lab's views: text, pictures, and what stands beside."""

import datetime
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import numpy as np
import traitlets
from PIL import Image, ImageOps

from llama4_lab.prompt.images import open_picture
from llama4_lab.train import scenes
from llama4_widgets.moment import Moment
from llama4_widgets.prompt import Prompt
from llama4_widgets.still import png
from llama4_widgets.view import button, in_row
from llama4_widgets.words import counted, short

_FILE = {  # one that was uploaded; what is in it is kept elsewhere
    "name": "", "type": "", "size": 0, "content": memoryview(b""),
    "last_modified": datetime.datetime.fromtimestamp(0, datetime.UTC),
}  # fmt: skip
ALONE, CLEAN, ANOTHER = _SIDES = ("alone", "beside the clean run", "beside another text")


class Bar(ipywidgets.VBox):
    """Asks for runs, ``run(text, pictures, boxes)``, and comparisons; says why one cannot be."""

    def __init__(self, text: str, run: Callable[..., None], compare: Callable[[Any], None]):
        self._ask, self._ask_beside = run, compare
        self._pictures: list[Any] = []
        self._boxes: list[Any] = []
        self._rng = np.random.default_rng()
        self._chat: Any = ""  # the messages that are shown, where the prompt is no text
        self._beside: str | None = None  # the text that stands beside
        self._scene: tuple[str, Sequence[Any], str] = "", (), ""  # question, pictures, answer
        self._is_led = False  # while code, and nobody on the page, chooses what is shown
        super().__init__()
        room = {"flex": "1 1 300px", "min_width": "0", "width": "auto"}
        self.text = Prompt(value=text, layout=room)
        self.text.observe(lambda _: self._is_led or self._run_text(), "value")
        self.text.on_msg(lambda *_: self._run_text())  # the same once more
        self.beside = Prompt(label="text to compare with", act="Compare", layout=room)
        self.beside.layout.display = "none"
        self.beside.observe(self._choose_text, "value")
        self.upload = ipywidgets.FileUpload(
            accept=".png,.jpg,.jpeg",
            multiple=True,
            description="Picture",
            tooltip="add PNG or JPEG files to the text",
            layout={"width": "auto"},
        )
        self.upload.observe(self._take_files, "value")
        self.scene = button("Scene", "a random picture of shapes, and a question", self._draw_scene)
        self.sides = ipywidgets.Dropdown(
            options=_SIDES,
            description="Show it",
            style={"description_width": "initial"},
            layout={"width": "auto"},
        )
        self.sides.observe(self._choose_sides, "value")
        self.shown = ipywidgets.HBox()
        self.shown.add_class("l4-app-pictures")
        self._images: list[ipywidgets.Image] = []
        self._told, self._right = ipywidgets.Label(), ipywidgets.Label()
        self._alone = button("No picture", "run the text alone", self._run_alone)
        self.problem = ipywidgets.HTML()
        tools = in_row(self.upload, self.scene, self.sides, self.shown)
        self.children = [in_row(self.text, self.beside), tools, self.problem]

    def show(self, prompt: Any, moment: Moment) -> None:
        """Show what was run: the text, or how many messages there were, and the pictures."""
        self._is_led = True
        is_text = isinstance(prompt, str)
        self.text.value, self._chat = (prompt, "") if is_text else ("", prompt)
        self._is_led = False
        self._pictures, self._boxes = moment.pictures, moment.boxes
        self._told.value = (
            "" if is_text else f"a chat of {counted(len(prompt), 'message')} is shown"
        )
        # The same widgets each time: a page and a kernel keep all that were ever made.
        self._images += [ipywidgets.Image() for _ in moment.pictures[len(self._images) :]]
        images = self._images[: len(moment.pictures)]
        for image, picture in zip(images, moment.pictures, strict=True):
            image.value = png(open_picture(picture))
        answer = self._answer(prompt, moment.pictures)
        self._right.value = f"right answer: {answer}"
        told, alone, right = [self._told], [self._alone], [self._right]
        self.shown.children = [
            *told * (not is_text), *images, *alone * bool(images), *right * bool(answer)
        ]  # fmt: skip
        self._count()

    def _count(self) -> None:
        """Say on the upload's button how many pictures there are: it counts its files."""
        self._is_led = True
        self.upload.value = [_FILE] * len(self._pictures)
        self._is_led = False

    def show_beside(self, other: Any, told: str) -> None:
        """Show what stands beside; what only code can ask for, as it is `told`."""
        self._is_led = True
        chosen = ALONE if other is None else f"beside {short(told, 60)}"
        if isinstance(other, str):
            chosen = ANOTHER
            if other != self._beside:  # else what was typed there stays
                self.beside.value = other
        self._beside = other if isinstance(other, str) else None
        self.sides.options = _SIDES if chosen in _SIDES else (*_SIDES, chosen)
        self.sides.value = chosen
        self.beside.layout.display = "" if chosen == ANOTHER else "none"
        self._is_led = False

    def guard(self, work: Callable[[], Any]) -> None:
        """Do work, or say what is wrong with it."""
        self.problem.value = ""  # of a wish before
        try:
            work()
        except (ValueError, TypeError, RuntimeError, OSError, traitlets.TraitError) as error:
            text = html.escape(str(error))
            self.problem.value = f'<span class="l4-app-problem">{text}</span>'

    def _run(self, asked: Any, pictures: Sequence[Any], boxes: Sequence[Any]) -> None:
        """Ask for a run, and show meanwhile that it is under way."""
        self.text.is_busy = True
        try:
            self._ask(asked, pictures, boxes)
        finally:
            self.text.is_busy = False

    def _run_text(self) -> None:
        asked = self.text.value or self._chat  # once more, while nothing is typed
        self.guard(lambda: self._run(asked, self._pictures, self._boxes))

    def _run_alone(self) -> None:
        self.guard(lambda: self._run(self._text_for_pictures(), (), ()))
        self.upload.focus()  # the button goes with its picture

    def _text_for_pictures(self) -> str:
        """Return the text; a chat says itself where its pictures are.

        Raises:
            ValueError: a chat is shown, and nothing is typed.
        """
        if self._chat and not self.text.value:
            raise ValueError(
                "pictures of a chat are given in code, as in app.run(messages, [picture]): type a "
                "text to ask about pictures here"
            )
        return self.text.value

    def _take_files(self, change: Any) -> None:
        if self._is_led or not change["new"]:
            return
        files = change["new"]

        def ask() -> None:
            text = self._text_for_pictures()
            self._run(text, [*self._pictures, *map(_picture, files)], ())

        self.guard(ask)
        self._count()

    def _draw_scene(self) -> None:
        """Ask about a random picture of coloured shapes, of which the boxes are known."""
        example = scenes.sample(self._rng, str(self._rng.choice(scenes.ONE_PICTURE)))
        boxes = [(*thing.box, str(thing)) for thing in example.scenes[0].objects]
        question, pictures, _ = self._scene = example.question, example.images, example.answer
        self.guard(lambda: self._run(question, pictures, boxes))

    def _answer(self, prompt: Any, pictures: Sequence[Any]) -> str:
        """Return the right answer, where the scene that was drawn last is asked about."""
        question, drawn, answer = self._scene
        is_asked = prompt == question and list(map(id, pictures)) == list(map(id, drawn))
        return answer if is_asked else ""

    def _choose_sides(self, _change: Any) -> None:
        chosen = str(self.sides.value)
        others = {ALONE: None, CLEAN: (), ANOTHER: self.beside.value or self.text.value}
        if not self._is_led and chosen in others:
            self.guard(lambda: self._ask_beside(others[chosen]))

    def _choose_text(self, change: Any) -> None:
        """Compare with what was typed; an empty field ends the comparison."""
        if not self._is_led:
            self.guard(lambda: self._ask_beside(change["new"] or None))


def _picture(file: Any) -> Image.Image:
    """Return an uploaded picture, as `open_picture` takes its file."""
    try:
        found = Image.open(io.BytesIO(bytes(file["content"])), formats=("PNG", "JPEG"))
        return open_picture(ImageOps.exif_transpose(found))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file['name']} is no PNG or JPEG picture that can be read") from error
