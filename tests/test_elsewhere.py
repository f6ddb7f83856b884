"""A model on a device that is not the CPU: what is found and shown of it is what is here."""

import re

import numpy as np
import pytest
import torch
from elsewhere import elsewhere

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis import (
    attention,
    attribution,
    counterfactual,
    decomposition,
    features,
    lens,
    margins,
    patching,
    pruning,
    routing,
)
from llama4_lab.experts import BACKENDS, choose_backend, probe
from llama4_lab.generate import tokens
from llama4_lab.replay import Replay
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


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_runs_there(monkeypatch, backend):
    monkeypatch.setattr(probe, "CHOSEN", "auto")
    model = l4.load("nano")
    prompt = model.prompt(TEXT)
    expected = model(**prompt)
    with elsewhere() as device:
        model.to(device)
        assert choose_backend(model.embed_tokens.weight) == "loop"
        model.backend = backend
        found = model(**prompt.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_wide_weights_are_narrowed_on_the_way_there(tmp_path):
    l4.save(l4.load("nano", dtype=torch.float64), tmp_path)
    with elsewhere() as device:
        model = l4.load(tmp_path, device=device, dtype=torch.float32)
        assert model.device == device
        found = model.lm_head.weight.cpu()
    torch.testing.assert_close(found, l4.load("nano").lm_head.weight, rtol=0, atol=0)


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
    for key, array in arrays.items():  # other kernels round otherwise: 1e-4 of a share, in percent
        found = unpack(there.board.content.arrays[key])
        np.testing.assert_allclose(found, unpack(array), rtol=1e-3, atol=2e-2)


def apart(text: str) -> tuple[list[str], list[float]]:
    """Take the numbers out of a sentence."""
    parts = re.split(r"([+−-]?\d+(?:\.\d+)?(?:e[+−-]\d+)?)", text)
    return parts[::2], [float(number.replace("−", "-")) for number in parts[1::2]]


def patched(model: l4.Llama4) -> object:
    clean, other = (model.prompt(f"def add({name}, b): return b") for name in ("a", "c"))
    return patching.patch_heads(model, clean, other, patching.logit_difference(5, 9))


ANALYSES = {
    "routing": lambda model: routing.routing_of(model, model.prompt(TEXT)),
    "lens": lambda model: lens.logit_lens(model, model.prompt(TEXT), keep_logprobs=True),
    "logit": lambda model: decomposition.decompose_logit(model, model.prompt(TEXT)),
    "router": lambda model: decomposition.decompose_router(model, model.prompt(TEXT), 1),
    "effects": lambda model: counterfactual.counterfactual(Replay(model, model.prompt(TEXT)), 3),
    "heads": lambda model: attention.head_summaries(model, model.prompt(TEXT)),
    "margins": lambda model: margins.margins(model, model.prompt(TEXT), "int4"),
    "survey": lambda model: pruning.survey(model, [torch.arange(300, 340)[None]]),
    "shares": lambda model: attribution.attribute(
        features.token_features(model, model.prompt(TEXT)), "feature_ablation"
    ),
    "patching": patched,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_finds_the_same(name):
    expected = ANALYSES[name](l4.load("nano"))
    with elsewhere() as device:
        found = ANALYSES[name](l4.load("nano").to(device))
    assert type(found) is type(expected)
    arrays = vars(expected) if hasattr(expected, "__dict__") else {"all": expected}
    compared = 0
    for key, value in arrays.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            mine = getattr(found, key) if key != "all" else found
            # Of logits of order ten, after other kernels: some 1e-6 of them, added up over layers.
            np.testing.assert_allclose(mine, value, rtol=1e-3, atol=2e-4)
            compared += 1
    assert compared
