"""What all views are: a board and its controls, drawn from a moment and a selection."""

import html
import time
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets
import traitlets

from llama4_widgets.board import Board, write_page
from llama4_widgets.panels import Axis, Content
from llama4_widgets.selection import Mirror, Selection
from llama4_widgets.still import svg

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llama4_widgets.moment import Moment


FAILURES = (ValueError, KeyError, RuntimeError)
"""What the model and the analyses refuse something with; a view says it."""
STOPPED = "Stopped: the kernel was interrupted."  # what is on screen stays
_DRAWING = "drawing …"
_LATE = "interrupted: run the prompt again to draw this"
_KEPT = 6_000_000  # bytes of a view on a page, before they are packed
_LONG = 256  # tokens; what is shorter is drawn before anybody would read that
_SLOW = 0.3  # seconds; likewise


class View(ipywidgets.VBox):
    """A view of a moment; several share a `selection`, and each works alone in a cell.

    A kind of view says in `content` what is drawn, and in `summary` the same in a sentence. It is
    drawn anew when the moment changes, and when a field of the selection changes that it `follows`;
    what only picks from arrays that are there happens in the browser.
    """

    title = ""
    help = ""
    follows: tuple[str, ...] = ()
    moment = traitlets.Any(help="the llama4_widgets.moment.Moment that is shown")
    is_led = traitlets.Bool(False, help="whether a lab makes the moments of changed edits")
    is_shown = traitlets.Bool(True, help="a view that is not shown computes nothing")
    may_edit = traitlets.Bool(True, help="whether its controls change edits")

    def __init__(self, moment: "Moment", selection: Selection | None = None, **traits: Any):
        if not hasattr(moment, "bounds"):
            raise TypeError(
                f"a view shows a Moment(model, model.prompt(text)), not {type(moment).__name__}"
            )
        if selection is None:
            token = min(1, len(moment.tokens) - 1)  # the first begins every text
            selection = Selection(layer=moment.first_layer, token=token)
        # Beside a view of less or more, it moves with the selection as far as it goes.
        is_apart = bool(selection.bounds) and selection.bounds != moment.bounds
        self.selection = Mirror(selection) if is_apart else selection
        self.board = Board(self.selection, title=self.title, help=self.help)
        self._is_stale = True  # what is on screen is not what is to be seen
        self._is_held = False  # takes a moment without drawing it
        self._is_announced = False  # and drawn later, whatever is selected meanwhile
        self._own = Content()  # what is drawn, with scales of its own
        self._beside: View | None = None
        self._seconds = 0.0  # that it took to draw last
        super().__init__(**traits)
        self._heading = ipywidgets.HTML()
        self._say_whose("")
        self.children = [self._heading, *self.controls(), self.board]
        self.selection.observe(self._follow, "shared")
        self.board.on_msg(self._receive)
        self.add_class("l4-view")
        self.moment = moment

    # ---- what a kind of view says

    def controls(self) -> list[ipywidgets.Widget]:
        """Return the widgets above the board."""
        return []

    def content(self) -> Content:
        """Return what is drawn of `moment`."""
        raise NotImplementedError

    def summary(self) -> str:
        """Say what is on screen."""
        return ""

    def ahead(self, moment: "Moment") -> Iterator[None]:
        """Compute step by step what this will ask a moment that is not shown yet.

        For what takes long: between two steps the kernel hears of newer wishes.
        """
        yield from ()

    def turn(self, chosen: Set[str]) -> None:
        """Draw what was chosen; a click can choose several of what a view `follows`."""
        self.refresh()

    def whole(self) -> Content | None:
        """Return the content with all of a text of which a part is on screen, for who keeps it."""

    def fixed(self, content: Content) -> Collection[str]:
        """Return the fields of the selection for which alone a content was made."""
        return self.follows

    def region(self, wish: dict[str, Any]) -> None:
        """Draw a part of a panel finer: ``{"panel", "x": [from, to], "y": [from, to]}``."""

    # ---- what all views do

    def refresh(self) -> None:
        """Draw anew what is on screen, or tell there what went wrong."""
        self._is_announced = False
        self._is_stale = True
        if not self.is_shown or self._is_held:
            return
        self._say_busy(len(self.moment.words))
        begin = time.monotonic()
        try:
            self._refresh()
        except BaseException:  # an interrupt, too
            self.board.problem, self.board.summary = _LATE, ""
            raise
        finally:
            self._seconds = time.monotonic() - begin
            self.withdraw()

    def _refresh(self) -> None:
        with self.moment.computing():  # and shown, so that the newest is shown last
            try:
                content, summary = self.content(), self.summary()
            except FAILURES as error:
                self.board.problem = str(error.args[0] if error.args else error)
                return
            except IndexError:
                if not (beyond := self._beyond()):
                    raise
                self.board.problem, self.board.summary = beyond, ""
                return
            with self.board.hold_sync():
                self.board.problem = ""
                self._own = content
                self._draw()
                self.board.summary = summary
            self._is_stale = False
            if self._beside:
                self._beside._draw()

    def _beyond(self) -> str:
        """Say what is selected that this run does not have; others may share the selection."""
        for field, count in self.moment.bounds.items():
            if (value := getattr(self.selection, field)) >= count:
                return f"{field} {value} is selected, and this run has {count} {field}s"
        return ""

    def announce(self, tokens: int) -> None:
        """Say that a prompt of so many tokens is about to be shown; until then nothing is drawn."""
        self._is_announced = True
        self._say_busy(tokens)

    def withdraw(self) -> None:
        """Take back what was announced: it is drawn, or will not be."""
        self._is_announced = False
        if self.board.busy == _DRAWING:
            self.board.busy = ""

    def put_off(self, moment: "Moment | None" = None, why: str = _LATE) -> None:
        """Hold a moment that could not be drawn, and mark what is on screen, if that is older.

        It is drawn when the next one comes or a control asks for it; None marks what is there.
        The mark says `why`.
        """
        self.withdraw()
        self._is_held = True
        self.moment = moment or self.moment
        self._is_held = False
        if moment is None or self._is_stale:
            self._is_stale = self._is_announced = True
            self.board.problem, self.board.summary = why, ""

    def _say_busy(self, tokens: int) -> None:
        if self.is_shown and not self.board.busy and (tokens > _LONG or self._seconds > _SLOW):
            self.board.busy = _DRAWING

    def stand_beside(self, other: "View | None", whose: str) -> None:
        """Share the scales with a view of the same kind, and say whose run is here; or with none.

        A view that was put off shares them when it is drawn.
        """
        self._beside = other
        self._say_whose(whose if other else "")
        self._draw()

    def _say_whose(self, whose: str) -> None:
        said = whose and f"<i>{html.escape(whose)}</i>"
        self._heading.value = (
            f"<details class='l4-heading'><summary><b>{self.title}</b><span>?</span>{said}"
            f"</summary><p>{self.help}</p></details>"
        )

    def _draw(self) -> None:
        """Hand over what is drawn, where that is new or has other scales than it had."""
        content = self._own.beside(self._beside._own) if self._beside else self._own
        drawn = self.board.content
        if content.arrays is not drawn.arrays or content.panels != drawn.panels:
            self.board.content = content

    @contextmanager
    def working(self, what: str = "") -> Iterator[None]:
        """Say in the view what is under way, if it takes a while, and what went wrong with it."""
        self.board.busy = what and f"{what} …"
        try:
            yield
        except (*FAILURES, OSError, traitlets.TraitError) as error:
            self.board.problem = str(error.args[0] if error.args else error)
        except KeyboardInterrupt:
            self.board.summary = STOPPED
            raise
        finally:
            self.board.busy = ""

    def axes(self) -> dict[str, Axis]:
        """Return the axes that most views share."""
        moe = self.moment.model.config.routed_layers
        axes = {name: Axis(name, size, name) for name, size in self.moment.bounds.items()}
        axes["token"] = replace(axes["token"], labels=self.moment.words)
        return axes | {"moe layer": Axis("layer", len(moe), "layer", values=[*moe])}

    def some(self, tokens: range) -> tuple[Axis, str]:
        """Return the axis of some tokens of the text, and words that say which, if not all."""
        words, count = self.moment.words[tokens.start : tokens.stop], len(self.moment.words)
        if len(words) == count:
            return self.axes()["token"], ""
        axis = Axis("token", len(words), "token", words, [*tokens])
        return axis, f"; tokens {tokens.start} to {tokens.stop - 1} of {count}"

    def linked(self, **texts: str) -> list[Any]:
        """Return a control for each of these traits, after a text; what is chosen is drawn."""
        controls: list[Any] = []
        for name, text in texts.items():
            if isinstance(trait := self.traits()[name], traitlets.Enum):
                made = ipywidgets.Dropdown(options=trait.values, description=text)
            elif isinstance(trait, traitlets.Bool):
                made = ipywidgets.Checkbox(description=text, indent=False)
            else:
                empty = trait.metadata.get("empty", "")  # what stands there while it is
                asked = {"placeholder": empty, "continuous_update": False}
                made = ipywidgets.Text(description=text, **asked)
            traitlets.link((self, name), (made, "value"))
            controls.append(made)
        self.observe(lambda _: self.refresh(), list(texts))
        return controls

    def figure(self) -> "go.Figure":
        """Return what is on screen as one static figure."""
        from llama4_widgets.plots import figure  # plotly takes a while to import

        told = self._told()  # first: it draws what has waited
        return figure(self.board.content, self.selection.shared, told)

    def to_html(self, path: str | Path) -> None:
        """Write the view as one page that works by itself, without kernel and network.

        Raises:
            FileNotFoundError: no folder to write it to.
        """
        write_page(path, [self.state()], self.title)

    def state(self) -> dict[str, Any]:
        """Return what a page without a kernel needs: of a long text all, as far as it has room."""
        self.tell()
        found = self.board.state()
        if not self.board.problem:
            with self.moment.computing():
                content = self.whole()
            size = sum(len(array["data"]) for array in content.arrays.values()) if content else 0
            content = content if content and size <= _KEPT else self._own
            kept = {field: self.selection.shared[field] for field in self.fixed(content)}
            content = content.beside(self._beside._own) if self._beside else content
            found["content"] = replace(content, kept=kept).message()
        return found

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add a picture and a sentence, for pages that run no script."""
        data = super()._repr_mimebundle_(**kwargs) or {}
        data["text/plain"] = self._told()
        data["image/svg+xml"] = svg(self.board.content, self.selection.shared, self._told())
        return data

    def tell(self) -> None:
        """Say in the board what is selected now; what waited to be drawn for that is drawn."""
        if self._is_announced and not self.board.problem:
            self.refresh()
        if not self.board.problem:
            self.board.summary = self.summary()

    def _told(self) -> str:
        self.tell()
        return f"{self.title}: {self.board.problem or self.board.summary}"

    @traitlets.observe("moment")
    def _show(self, _change: Any) -> None:
        self._is_announced = True
        self.selection.bounds = self.moment.bounds
        self.refresh()

    @traitlets.observe("is_shown")
    def _wake(self, _change: Any) -> None:
        if self.is_shown and self._is_stale:
            self.refresh()

    def _follow(self, change: Any) -> None:
        old, new = change["old"], change["new"]
        chosen = {name for name in self.follows if old[name] != new[name]}
        if not chosen or self._is_announced:
            return
        if self._is_stale:  # nothing there that could be turned
            self.refresh()
        else:
            self.turn(chosen)

    def _receive(self, _board: Any, message: dict[str, Any], _buffers: Any) -> None:
        wish = message.get("region")
        if wish and self._is_stale:
            self.board.answer(wish["panel"], {}, {})  # a page waits for it; none of what it shows
        elif wish:
            self.region(wish)


class EditingView(View):
    """A view whose controls change `edits`; a lab makes the moments of them, else the view does."""

    edits = traitlets.Tuple(help="what is different from the clean run")

    def take_edits(self) -> None:
        """Show the moment's edits; a lab's are newer than a moment that is still to come."""
        if not self.is_led:
            self.edits = self.moment.edits

    @traitlets.validate("edits")
    def _check_edits(self, proposal: Any) -> tuple[Any, ...]:
        if self.moment is not None:
            self.moment.with_edits(proposal["value"])  # raises what is wrong with them
        return proposal["value"]

    @traitlets.observe("edits")
    def _apply_edits(self, _change: Any) -> None:
        if self.moment is not None and not self.is_led and self.moment.edits != self.edits:
            self.moment = self.moment.with_edits(self.edits)


def in_row(*controls: ipywidgets.Widget) -> ipywidgets.HBox:
    """Return controls beside each other, in several lines where they need them."""
    made = ipywidgets.HBox(controls)
    made.add_class("l4-app-chips")
    return made


def button(text: str, tip: str | None, act: Callable[[], Any], **options: Any) -> ipywidgets.Button:
    """Return a button that does `act` when it is pressed."""
    made = ipywidgets.Button(description=text, tooltip=tip, layout={"width": "auto"}, **options)
    made.on_click(lambda _: act())
    return made
