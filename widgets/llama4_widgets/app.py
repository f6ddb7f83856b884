"""The lab: one page of linked views of a prompt in a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets

from llama4_lab.edits import Edit
from llama4_lab.model import Llama4
from llama4_widgets.board import page
from llama4_widgets.moment import Moment
from llama4_widgets.selection import Selection
from llama4_widgets.view import View
from llama4_widgets.views import VIEWS

MAX_TOKENS = 4096
_STYLE = (Path(__file__).parent / "app.css").read_text(encoding="utf-8")
_TEXT = "The old man looked at the sea.\ndef add(a, b):\n    return a + b\n12 + 7 = 19\n"


class LabApp(ipywidgets.VBox):
    """Runs a prompt (a text, chat messages, pictures) and shows what happened in linked views.

        >>> app = LabApp(l4.load("mini"))                      # doctest: +SKIP
        >>> app.run("two times two")                           # doctest: +SKIP
        >>> app.selection.token = 3                            # doctest: +SKIP
        >>> app.edits = [l4.edits.DropExpert(3, expert=7)]     # doctest: +SKIP

    `shown` are the views on the page, by name; `views` holds all that there are.

    Raises:
        ValueError: a model without a tokenizer, or a text of more than 4096 tokens.
    """

    edits = traitlets.Tuple(help="what is different from the clean run")
    shown = traitlets.Tuple(help="the names of the views on the page")
    moment = traitlets.Any()

    def __init__(
        self,
        model: Llama4,
        prompt: Any = _TEXT,
        pictures: Sequence[Any] = (),
        *,
        shown: Sequence[str] = ("router", "attention", "lens", "ablate"),
    ):
        self.model = model
        self.selection = Selection()
        self.views: dict[str, View] = {}
        super().__init__()
        self._text = ipywidgets.Textarea(
            value=prompt if isinstance(prompt, str) else "",
            layout={"width": "100%", "height": "64px"},
        )
        self._text.add_class("l4-app-text")
        self._run = ipywidgets.Button(description="Run", button_style="primary", tooltip="Run")
        self._run.on_click(lambda _: self._guard(lambda: self.run(self._text.value)))
        self._problem = ipywidgets.HTML()
        self._chips = ipywidgets.HBox()
        self._chips.add_class("l4-app-chips")
        self._grid = ipywidgets.Box()
        self._grid.add_class("l4-app-grid")
        bar = ipywidgets.HBox([self._text, self._run])
        self.children = [
            ipywidgets.HTML(f"<style>{_STYLE}</style>"), bar, self._problem, self._chips, self._grid
        ]  # fmt: skip
        self.add_class("l4-app")
        self.run(prompt, pictures)
        self.shown = tuple(name for name in shown if name in VIEWS)

    def run(self, prompt: Any, pictures: Sequence[Any] = (), boxes: Sequence[Any] = ()) -> None:
        """Run a text or chat messages, clean and with the edits, and show it."""
        built = self.model.prompt(prompt, list(pictures))
        if (count := len(built.tokens)) > MAX_TOKENS:
            raise ValueError(
                f"this prompt has {count} tokens, the lab shows at most {MAX_TOKENS}: shorten it"
            )
        self.moment = Moment(self.model, built, self.edits, pictures=pictures, boxes=boxes)

    def to_html(self, path: str | Path) -> None:
        """Write the views that are shown as one page; token, layer and head can still be chosen."""
        boards = [self.views[name].board for name in self.shown]
        Path(path).write_text(page(boards, "Llama 4 lab"), encoding="utf-8")

    @traitlets.validate("edits")
    def _check_edits(self, proposal: Any) -> tuple[Edit, ...]:
        if self.moment is not None:
            self.moment.with_edits(proposal["value"])  # raises what is wrong with them
        return tuple(proposal["value"])

    @traitlets.observe("edits")
    def _edit(self, _change: Any) -> None:
        if self.moment is None:
            return
        made = [view.moment for view in self.views.values() if view.moment.edits == self.edits]
        made = [moment for moment in made if moment.prompt is self.moment.prompt]
        self.moment = made[0] if made else self.moment.with_edits(self.edits)

    @traitlets.observe("moment")
    def _show_moment(self, _change: Any) -> None:
        for view in self.views.values():
            view.moment = self.moment

    @traitlets.observe("shown")
    def _show_views(self, _change: Any) -> None:
        for name in self.shown:
            if name not in self.views:
                self.views[name] = VIEWS[name](self.moment, self.selection)
                if self.views[name].has_trait("edits"):
                    traitlets.link((self, "edits"), (self.views[name], "edits"))
                if self.views[name].has_trait("kept"):
                    self.views[name].observe(self._keep, "kept")
        for name, view in self.views.items():
            view.is_shown = name in self.shown
        self._grid.children = [self.views[name] for name in self.shown]
        self._chips.children = [self._chip(name) for name in VIEWS]

    def _keep(self, change: Any) -> None:
        self._text.value = change["new"]
        self._guard(lambda: self.run(change["new"]))

    def _chip(self, name: str) -> ipywidgets.ToggleButton:
        chip = ipywidgets.ToggleButton(
            value=name in self.shown, description=VIEWS[name].title, tooltip=VIEWS[name].help
        )

        def toggle(change: Any) -> None:
            chosen = {*self.shown, name} if change["new"] else {*self.shown} - {name}
            self.shown = tuple(each for each in VIEWS if each in chosen)

        chip.observe(toggle, "value")
        return chip

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._problem.value = ""
        except (ValueError, RuntimeError, traitlets.TraitError) as error:
            self._problem.value = f'<span class="l4-app-problem">{error}</span>'
