"""Type a text and see which experts its tokens choose."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets
import traitlets

from llama4_lab.analysis.routing import Routing, routing_of
from llama4_lab.model import Llama4
from llama4_widgets.moment import MAX_TOKENS, Moment
from llama4_widgets.prompt import Prompt
from llama4_widgets.views.router import RouterView

_TEXT = """\
The old man looked at the sea.
def add(a, b):
    return a + b
12 + 7 = 19
Старик смотрел на море."""


def explore(
    model: Llama4, text: str = _TEXT, *, layer: int | None = None, token: int | None = None
) -> "RouterExplorer":
    """Show which experts each token of a text chooses; other texts can be typed in.

    Args:
        layer, token: to begin with; else the first layer with experts and the first word.

    Raises:
        ValueError: a model without experts or tokenizer, or a text of more than 4096 tokens.
        TraitError: a layer without experts, or a token outside the text.
    """
    return RouterExplorer(model, text, layer, token)


class RouterExplorer(RouterView):
    """The router's view of a text that can be typed anew.

    `layer`, `token` and `text` are traits: set them, observe them, or read them in the next cell.
    Setting `text`, or typing one and pressing Enter, runs it.
    """

    layer = traitlets.Int(help="layer of the model; one that has experts")
    token = traitlets.Int(help="position in the prompt")
    text = traitlets.Unicode(help="the text that is shown")

    def __init__(
        self, model: Llama4, text: str, layer: int | None = None, token: int | None = None
    ):
        self._model = model.apart()
        self._ran = text
        self._field = Prompt(value=text)
        self._field.observe(self._type, "value")
        moment = self._moment_of(text)
        super().__init__(moment, text=text)
        for name in ("layer", "token"):
            traitlets.link((self, name), (self.selection, name))
        self.layer = self.routing.layers[0] if layer is None else layer
        second = min(1, len(moment.tokens) - 1)  # behind begin-of-text
        self.token = second if token is None else token

    @property
    def routing(self) -> Routing:
        """The decisions on screen."""
        return self.moment.clean(routing_of)

    def controls(self) -> list[ipywidgets.Widget]:
        return [self._field]

    def _moment_of(self, text: str) -> Moment:
        prompt = self._model.prompt(text)
        if (count := len(prompt.tokens)) > MAX_TOKENS:
            raise ValueError(
                f"this text has {count} tokens, the explorer shows at most {MAX_TOKENS}: shorten it"
            )
        moment = Moment(self._model, prompt)
        moment.clean(routing_of)  # raises what hinders it
        return moment

    def _type(self, change: Any) -> None:
        self.board.problem = ""
        with self.working("the model is working"):
            self.text = change["new"]

    @traitlets.validate("text")
    def _run(self, proposal: Any) -> str:
        """Run a text and show it; one that cannot be run changes nothing."""
        text = proposal["value"]
        if text != self._ran:
            with _explained():
                self.moment = self._moment_of(text)
            self._ran = text
        return text

    @traitlets.observe("text")
    def _show_text(self, _change: Any) -> None:
        self._field.value = self.text

    @traitlets.validate("layer")
    def _check_layer(self, proposal: Any) -> int:
        with _explained():
            self.routing.row(proposal["value"])
        return proposal["value"]

    @traitlets.validate("token")
    def _check_token(self, proposal: Any) -> int:
        with _explained():
            return self.routing.position(proposal["value"])


@contextmanager
def _explained() -> Iterator[None]:
    """Raise the error that traitlets knows, with the same sentence."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise traitlets.TraitError(str(error)) from error
