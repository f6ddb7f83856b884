"""A field for a text, which Enter hands over."""

import anywidget
import traitlets

from llama4_widgets.board import Board, read


class Prompt(anywidget.AnyWidget):
    """A text field; `value` is what was last handed over, by Enter or its button, or set."""

    _esm = read("elements.js") + read("prompt.js")
    _css = Board._css

    value = traitlets.Unicode(help="the text").tag(sync=True)
