"""What the board of a view shows."""

from typing import Any

import numpy as np

from llama4_widgets.still import unpack
from llama4_widgets.view import View


def panel(view: View, name: str) -> dict[str, Any]:
    """Return the panel of a name."""
    (found,) = [each for each in view.board.content.panels if each["name"] == name]
    return found


def shown(view: View, name: str) -> np.ndarray:
    """Return an array as a browser gets it."""
    return unpack(view.board.content.arrays[name])
