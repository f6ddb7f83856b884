"""The lab: one page of linked views of a prompt in a model."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets
from tqdm.auto import tqdm

from llama4_lab.edits import Edit
from llama4_lab.model import Llama4
from llama4_lab.prompt.chat import question
from llama4_lab.prompt.images import Picture
from llama4_widgets.bar import Bar
from llama4_widgets.keeping import model_facts, record
from llama4_widgets.moment import MAX_TOKENS, Moment
from llama4_widgets.recording import BESIDE, STYLE, Recording, open_lab
from llama4_widgets.selection import Mirror, Selection
from llama4_widgets.slices import running_loop
from llama4_widgets.view import FAILURES, View, in_row
from llama4_widgets.views import VIEWS
from llama4_widgets.views.difference import DifferenceView
from llama4_widgets.words import short, visible

_ONCE = ("ablate", "generate", "planner")  # views that are no part of a comparison
_AT_ONCE = ("router", "ablate")  # views that answer a slider; the others follow when it rests
_PAUSE = 0.12  # seconds without a new wish that count as rest
_TEXT = "The old man looked at the sea.\ndef add(a, b):\n    return a + b\n12 + 7 = 19\n"


class _Several(traitlets.Tuple):
    """A tuple that can be set to one name or edit, too."""

    def validate(self, obj: Any, value: Any) -> Any:
        if isinstance(value, str | Edit):
            value = (value,)
        return super().validate(obj, tuple(value) if isinstance(value, Iterable) else value)


class LabApp(ipywidgets.VBox):
    """Runs a prompt (a text, chat messages, pictures) and shows what happened in linked views.

        >>> app = LabApp(l4.load("mini"))                      # doctest: +SKIP
        >>> app.run("two times two")                           # doctest: +SKIP
        >>> app.selection.token = 3                            # doctest: +SKIP
        >>> app.edits = [l4.edits.DropExpert(3, expert=7)]     # doctest: +SKIP
        >>> app.compare(l4.load("mini", quantize="int4"))      # doctest: +SKIP
        >>> app.save("run.lab"); LabApp.open("run.lab")        # doctest: +SKIP

    `shown` are the views on the page, by name; `views` holds all that there are.

    Raises:
        ValueError: a model without a tokenizer, a text of more than 4096 tokens, or a view that
            does not exist.
    """

    edits = _Several(help="what is different from the clean run")
    shown = _Several(help="the names of the views on the page")
    moment = traitlets.Any()

    def __init__(
        self,
        model: Llama4,
        prompt: Any = _TEXT,
        pictures: Picture | Sequence[Picture] = (),
        *,
        shown: Sequence[str] = ("router", "ablate", "attention", "lens"),
    ):
        if not isinstance(model, Llama4):
            raise TypeError(f"{model!r:.60} is no model: give one, such as llama4_lab.load('mini')")
        self.model = model
        self.selection = Selection()
        self._mirror = Mirror(self.selection)  # of what stands beside
        self.views: dict[str, View] = {}
        self._is_dragged = False
        self._timer: asyncio.Handle | None = None  # of the views that follow
        self.difference: DifferenceView | None = None
        self.beside: dict[str, View] = {}  # the other run's
        self._other: Any = None  # what it is compared with
        self._compared: Any = None  # the prompt that was here then
        super().__init__()
        self.bar = Bar(prompt if isinstance(prompt, str) else "", self.run, self.compare)
        self._chips = in_row(*self._made_chips())
        self._cells: dict[str, ipywidgets.VBox] = {}
        self._across = ipywidgets.VBox(layout={"display": "none", "margin": "0 0 12px"})
        self._grid = ipywidgets.Box()
        self._grid.add_class("l4-app-grid")
        top = ipywidgets.HTML(f"<style>{STYLE}</style>")
        self.children = [top, self.bar, self._chips, self._across, self._grid]
        self.add_class("l4-app")
        self.run(prompt, pictures)
        self.selection.layer = self.moment.first_layer
        self.selection.token = min(1, len(self.moment.tokens) - 1)  # the first begins every text
        self._see_pictures()
        self.shown = shown

    # ---- running

    def run(
        self, prompt: Any, pictures: Picture | Sequence[Picture] = (), boxes: Sequence[Any] = ()
    ) -> None:
        """Run a text or chat messages, clean and with the edits, and show it.

        A text with pictures is a question about them. `boxes` (left, top, right, bottom, name) are
        what the picture shows, in its pixels.
        """
        moment = self._moment_of(self.model, prompt, pictures, boxes)
        was_last = bool(self.moment) and self.selection.token == len(self.moment.tokens) - 1
        self._show(prompt, moment)
        self._see_pictures(was_last)

    def _see_pictures(self, was_last: bool = False) -> None:
        """Select the last token, which answers, if it was, or if what is selected sees nothing."""
        shows = (self.moment.prompt.spans.patch[0] >= 0).nonzero()
        if len(shows) and (was_last or self.selection.token < int(shows[0])):
            self.selection.token = len(self.moment.tokens) - 1

    def _show(self, asked: Any, moment: Moment) -> None:
        try:
            moment = moment.with_edits(self.edits)
        except ValueError as error:
            raise ValueError(f"{error}; Clear in Ablate takes all edits away") from error
        try:
            self.prompt, self.moment = asked, moment
        finally:
            self.bar.show(asked, moment)

    def _moment_of(
        self,
        model: Llama4,
        prompt: Any,
        pictures: Picture | Sequence[Picture],
        boxes: Sequence[Any],
    ) -> Moment:
        pictures = [pictures] if isinstance(pictures, Picture) else list(pictures)
        built = model.prompt(_asked(prompt, pictures), pictures)
        if (count := len(built.tokens)) > MAX_TOKENS:
            raise ValueError(
                f"this prompt has {count} tokens, the lab shows at most {MAX_TOKENS}: shorten it"
            )
        # Cells that run the model meanwhile must not see the edits that are computed here.
        return Moment(model.apart(), built, pictures=pictures, boxes=boxes)

    # ---- comparing

    def compare(self, other: Any) -> None:
        """Show another run beside this one, with a shared selection; None ends it.

        `other` is a prompt (text, messages), a model, or edits; ``()`` is the clean run.

        Raises:
            ValueError: a prompt or edits that the model cannot have.
            TypeError: what is none of these.
        """
        other = (other,) if isinstance(other, Edit) else other
        self._put_beside(other, self._moment_beside(other))

    def _put_beside(self, other: Any, moment: Moment | None) -> None:
        self._other, self._compared = other, self.moment.prompt
        with self._marking(), (moment or self.moment).computing():
            self._show_difference(moment)
            for view in self.beside.values():
                view.moment = moment or view.moment
            self.bar.show_beside(other, "".join(self._told()) if moment else "")
            self._show_views()

    def _show_difference(self, other: Moment | None) -> None:
        """Show how a run differs from this one.

        A page that still makes a view cannot take it away: it stays, hidden, for the next run.
        """
        view = next(iter(self._across.children), None)  # none before the first
        if other is None:
            self.difference = None
        elif not isinstance(view, DifferenceView):
            view = self.difference = DifferenceView(self.moment, self.selection, other)
            self._across.children = [view]
        else:
            self.difference, view.is_shown = view, False
            view.other, view.moment = other, self.moment
            view.refresh()  # when it is shown
        self._across.layout.display = "" if self.difference else "none"
        if view:
            view.is_shown = self.difference is not None

    def _moment_beside(self, other: Any) -> Moment | None:
        now = self.moment
        if other is None:
            return None
        if isinstance(other, Llama4) and _read_alike(self.model, other):  # token by token as here
            return Moment(other.apart(), now.prompt, pictures=now.pictures, boxes=now.boxes)
        if isinstance(other, Llama4):
            return self._moment_of(other, self.prompt, now.pictures, now.boxes)
        if _are_edits(other):
            return now.with_edits(other)
        if not isinstance(other, str | list | tuple):
            raise TypeError(
                f"{other!r:.60} cannot stand beside: give a text, messages, a model or edits"
            )
        return self._moment_of(self.model, other, now.pictures, now.boxes).with_edits(self.edits)

    def _moment_beside_again(self) -> Moment | None:
        """Return what stands beside after a change of this run; what is known of it stays."""
        view, is_same = self.difference, self._compared is self.moment.prompt
        if view is None or not is_same or _are_edits(self._other):
            return self._moment_beside(self._other)
        return view.other if isinstance(self._other, Llama4) else view.other.with_edits(self.edits)

    def _told(self) -> tuple[str, str]:
        """Say what stands beside, and whether it has the edits that are here."""
        clean, edited = (", clean", ", with the edits") if self.edits else ("", "")
        if isinstance(self._other, Llama4):
            return f"another model, {model_facts(self._other)['name']}", clean
        if isinstance(self._other, str):
            return f"the text ‘{short(visible(self._other), 200)}’", edited
        if _are_edits(self._other):
            return ", ".join(map(_spelled, self._other)) or "the clean run", ""
        return "other messages", edited

    # ---- keeping

    def save(self, path: str | Path) -> None:
        """Write what is shown into one file, which `LabApp.open` shows without a model.

        It holds the views, routing, pictures, prompt and edits, and what they were made with.
        """
        self.recording().write(path)

    def open(self: Any) -> Any:
        """Show a file of `save`: ``LabApp.open("run.lab")``.

        `llama4_widgets.recording.open_lab` does the same without torch. (An app has an `open` of
        its own, as all widgets; so this one takes the file's name where methods have `self`.)

        Raises:
            FileNotFoundError, ValueError: a file that cannot be shown, and why.
        """
        return super().open() if isinstance(self, LabApp) else open_lab(self)

    def to_html(self, path: str | Path) -> None:
        """Write the views that are shown as one page; token, layer and head can still be chosen."""
        self.recording().to_html(path)

    def recording(self) -> Recording:
        """Return what is shown, as it is kept."""
        self._catch_up()
        is_quick = len(self.moment.tokens) < 512  # less than a second
        views = tqdm(self._on_page(), "keep", unit="view", leave=False, disable=is_quick)
        states = {name: view.state() for name, view in views}
        told = "".join(self._told()) if self.difference else ""
        return record(self.prompt, self.moment, states, told)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add what the views say, for pages that run no script."""
        data, lines = super()._repr_mimebundle_(**kwargs) or {}, []
        self._catch_up()
        for _, view in self._on_page():
            view.tell()
            lines.append(f"{view.board.title}: {view.board.problem or view.board.summary}")
        data["text/plain"] = "\n".join(lines)
        return data

    def _on_page(self) -> list[tuple[str, View]]:
        """Return the views from top to bottom, those beside others right after them."""
        found: list[tuple[str, View]] = []
        if self.difference:
            found.append(("difference", self.difference))
        for name in self.shown:
            found.append((name, self.views[name]))
            if self.difference and name in self.beside:
                found.append((name + BESIDE, self.beside[name]))
        return found

    # ---- what the page does

    @traitlets.validate("edits")
    def _check_edits(self, proposal: Any) -> tuple[Edit, ...]:
        if self.moment is not None:
            self.moment.with_edits(proposal["value"])  # raises what is wrong with them
        return tuple(proposal["value"])

    @traitlets.validate("shown")
    def _check_shown(self, proposal: Any) -> tuple[str, ...]:
        if strange := [name for name in proposal["value"] if name not in VIEWS]:
            raise ValueError(f"there is no view {strange[0]!r}; choose from {', '.join(VIEWS)}")
        return tuple(dict.fromkeys(proposal["value"]))  # each once

    @traitlets.observe("edits")
    def _edit(self, _change: Any) -> None:
        if self.moment is None:
            return
        self.bar.problem.value = ""
        views: list[Any] = [view for view in self.views.values() if view.has_trait("edits")]
        # It came from a view: more of it may be on its way.
        self._is_dragged = any(view.edits == self.edits for view in views)
        for view in views:
            view.edits = self.edits  # before they are drawn
        try:
            self.moment = self.moment.with_edits(self.edits)
        finally:
            self._is_dragged = False

    @traitlets.observe("moment")
    def _show_moment(self, _change: Any) -> None:
        for view in self.views.values():  # some wait for their turn
            if view.moment is not self.moment:
                view.announce(len(self.moment.words))
        if not self._is_dragged or not self._catch_up_soon():
            self._catch_up()
        if self.difference:
            self.bar.guard(self._compare_again)

    def _compare_again(self) -> None:
        try:
            self._put_beside(self._other, self._moment_beside_again())
        except (ValueError, TypeError, RuntimeError) as error:
            for view in (self.difference, *self.beside.values()):
                if view:  # what stands there is of the prompt or the edits before
                    view.put_off(why=f"nothing can stand beside this run: {error}")
            raise

    def _catch_up_soon(self) -> bool:
        """Bring the views up to date one after the other, while no newer wish comes.

        Between two of them the kernel sends what the first one drew. Returns whether that can be:
        not outside of a notebook.
        """
        if (loop := running_loop()) is None:
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._catch_up_next(loop, self._catching_up())
        return True

    def _catch_up_next(self, loop: asyncio.AbstractEventLoop, steps: Iterator[float]) -> None:
        pause = None
        with suppress(KeyboardInterrupt), self._marking(), self.moment.computing():
            pause = next(steps, None)  # an interrupt, which the views tell, would end the loop
        if pause is not None:
            self._timer = loop.call_later(pause, self._catch_up_next, loop, steps)

    def _catching_up(self) -> Iterator[float]:
        """Bring the views up to date step by step; yield the seconds to wait before the next."""
        has_paused = False
        for name in sorted(self.views, key=lambda name: name not in _AT_ONCE):
            if not has_paused and name not in _AT_ONCE:
                has_paused = True
                yield _PAUSE
            if (view := self.views[name]).moment is self.moment:
                continue
            if view.is_shown:
                with suppress(*FAILURES):  # the view asks again, and says why
                    for _ in view.ahead(self.moment):
                        yield 0.0
            view.moment = self.moment
            yield 0.0

    def _catch_up(self) -> None:
        # Alone, or a click, which has a thread of its own, finds another moment while it is drawn.
        with self._marking(), self.moment.computing():
            for view in self.views.values():
                view.moment = self.moment

    @contextmanager
    def _marking(self) -> Iterator[None]:
        """Draw inside the block, and mark what is behind if that ends early."""
        try:
            yield
        except BaseException:  # an interrupt, too
            for view in self.views.values():
                view.put_off(self.moment)
            if self.difference:
                for view in (self.difference, *self.beside.values()):
                    view.put_off()
            raise

    @traitlets.observe("shown")
    def _show_views(self, _change: Any = None) -> None:
        for name in self.shown:
            if name not in self.views:
                view = self.views[name] = VIEWS[name](self.moment, self.selection, is_shown=False)
                if view.has_trait("edits"):
                    view.is_led = True
                    traitlets.link((self, "edits"), (view, "edits"))
                if view.has_trait("kept"):
                    view.observe(self._keep, "kept")
            if self.difference and name not in (*self.beside, *_ONCE):
                made = VIEWS[name](self.difference.other, self._mirror, may_edit=False)
                self.beside[name] = made
        # The one with the most controls first: they reach the page while the model runs.
        for name in sorted(self.views, key=lambda name: name != "ablate"):
            self.views[name].is_shown = name in self.shown
        what, how = self._told() if self.difference else ("", "")
        whose = short(what, 55) + how
        for name, view in self.beside.items():
            view.is_shown = name in self.shown and self.difference is not None
            view.board.title = f"{VIEWS[name].title}, beside: {what}{how}"
            view.stand_beside(self.views[name] if view.is_shown else None, whose)
            self.views[name].stand_beside(view if view.is_shown else None, "this run")
        self._grid.children = [self._cell(name) for name in self.shown]
        for name, chip in zip(VIEWS, self._chips.children, strict=True):
            chip.value = name in self.shown

    def _cell(self, name: str) -> ipywidgets.VBox:
        """Return what holds a view and the other run's, which stays, hidden, after a comparison."""
        if name not in self._cells:
            self._cells[name] = ipywidgets.VBox([self.views[name]])
        cell, beside = self._cells[name], self.beside.get(name)
        if beside:
            cell.children = [self.views[name], beside]
            beside.layout.display = "" if beside.is_shown else "none"
            (cell.add_class if beside.is_shown else cell.remove_class)("l4-app-pair")
        return cell

    def _keep(self, change: Any) -> None:
        if change["new"]:
            self.bar.guard(lambda: self._go_on(change["new"]))

    def _go_on(self, ids: tuple[int, ...]) -> None:
        """Show the prompt with what was written behind it, token by token as it was."""
        now, tokenizer = self.moment, self.model.tokenizer
        asked, text = _asked(self.prompt, now.pictures), tokenizer.decode(ids)
        if isinstance(asked, str):
            asked += text
        elif asked[-1].get("role") == "assistant":  # whose message goes on
            asked = [*asked[:-1], {**asked[-1], "content": f"{asked[-1]['content']}{text}"}]
        else:
            asked = [*asked, {"role": "assistant", "content": text}]
        prompt = now.prompt.followed_by(ids, [tokenizer.token_text(idx) for idx in ids])
        self._show(asked, Moment(now.model, prompt, pictures=now.pictures, boxes=now.boxes))

    def _made_chips(self) -> list[ipywidgets.ToggleButton]:
        """Return a switch for each view; they share style and layout, each a message to a page."""
        chips: list[ipywidgets.ToggleButton] = []
        for name, view in VIEWS.items():
            shared = {"style": chips[0].style, "layout": chips[0].layout} if chips else {}
            chip = ipywidgets.ToggleButton(description=view.title, tooltip=view.help, **shared)
            chip.observe(lambda change, name=name: self._toggle(name, change["new"]), "value")
            chips.append(chip)
        return chips

    def _toggle(self, name: str, is_on: bool) -> None:
        if is_on != (name in self.shown):
            others = tuple(each for each in self.shown if each != name)
            self.shown = (*others, name) if is_on else others


def _are_edits(other: Any) -> bool:
    return isinstance(other, list | tuple) and all(isinstance(each, Edit) for each in other)


def _read_alike(mine: Llama4, other: Llama4) -> bool:
    """Whether two models make the same tokens and tiles of a prompt."""
    if mine.config.vision_config != other.config.vision_config or not other.tokenizer:
        return False
    return mine.tokenizer.content == other.tokenizer.content


def _spelled(edit: Edit) -> str:
    """Return an edit as it is written in a cell, without what it leaves to the model."""
    given = (f"{name}={value!r}" for name, value in vars(edit).items() if value is not None)
    return f"{type(edit).__name__}({', '.join(given)})"


def _asked(prompt: Any, pictures: Sequence[Any]) -> Any:
    """Return a text with pictures as the question that it is about them; all else as it is."""
    is_question = isinstance(prompt, str) and len(pictures) > 0
    return question(prompt, len(pictures)) if is_question else prompt
