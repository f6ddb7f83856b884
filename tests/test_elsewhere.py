"""A model on a device that is not the CPU: the lab shows of it what it shows here."""

import re

import numpy as np
import pytest
import torch
from elsewhere import elsewhere

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.generate import tokens
from llama4_widgets.app import VIEWS, LabApp
from llama4_widgets.still import unpack
from llama4_widgets.view import View
from llama4_widgets.views.generate import GenerateView

TEXT = "def add(a, b):\n    return a + b"
EDITS = [E.TopK(2, 2)]  # a rule: nobody there can tell who has read a value
AT_ONCE = [name for name in VIEWS if name not in ("image", "attribution")]  # without a thread


@torch.no_grad()
def test_logits_and_text_are_the_same():
    model = l4.load("nano")
    prompt = model.prompt(TEXT)
    expected, written = model(**prompt), [int(i) for i in tokens(model, prompt, 8, seed=1)]
    with elsewhere() as device:
        model.to(device)
        found = model(**prompt.to(device))
        assert found.device == device
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)
        assert [int(i) for i in tokens(model, prompt, 8, seed=1)] == written


@pytest.mark.slow
@pytest.mark.parametrize("name", AT_ONCE)
def test_a_view_shows_the_same(name):
    def shown(model: l4.Llama4) -> View:
        app = LabApp(model, TEXT, shown=[name])
        app.edits = EDITS
        view = app.views[name]
        if isinstance(view, GenerateView):
            view.step(), view.step()
        assert view.board.problem == ""
        return view

    here = shown(l4.load("nano"))
    with elsewhere() as device:
        there = shown(l4.load("nano").to(device))
        words, numbers = apart(there.summary())
    assert words == apart(here.summary())[0]
    assert numbers == pytest.approx(apart(here.summary())[1], rel=1e-2, abs=1e-4)
    arrays = here.board.content.arrays
    assert arrays.keys() == there.board.content.arrays.keys()
    for key, array in arrays.items():
        found = unpack(there.board.content.arrays[key])
        np.testing.assert_allclose(found, unpack(array), rtol=1e-3, atol=2e-2)


def apart(text: str) -> tuple[list[str], list[float]]:
    """Take the numbers out of a sentence."""
    parts = re.split(r"([+−-]?\d+(?:\.\d+)?(?:e[+−-]\d+)?)", text)
    return parts[::2], [float(number.replace("−", "-")) for number in parts[1::2]]
