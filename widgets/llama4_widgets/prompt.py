"""A field for a text, which Enter hands over."""

import anywidget
import traitlets

from llama4_widgets.board import Board, read


class Prompt(anywidget.AnyWidget):
    """A text field; `value` is what was last handed over, by Enter or its button, or set.

    `label` names the field, and `act` what its button does.
    """

    _esm = read("elements.js") + read("prompt.js")
    _css = Board._css

    value = traitlets.Unicode(help="the text").tag(sync=True)
    label = traitlets.Unicode("prompt").tag(sync=True)
    act = traitlets.Unicode("Run").tag(sync=True)
    is_busy = traitlets.Bool(False, help="whether the text is being run").tag(sync=True)
