"""The experts view shows the library's loads, flows and specialisation."""

import numpy as np
import pytest
from boards import panel

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.routing import routing_of
from llama4_widgets.moment import Moment
from llama4_widgets.still import unpack
from llama4_widgets.views import experts
from llama4_widgets.views.experts import ExpertsView

TEXT = "def add(a, b):\n    return a + b\nThe old man looked at the sea."


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def view(model):
    texts = {"code": "for i in range(9):\n    print(i)\n" * 60, "prose": "It rained again. " * 120}
    return ExpertsView(Moment(model, model.prompt(TEXT)), domains=texts)


def test_load_and_flow_are_counted_over_the_prompt(view, model):
    routing = routing_of(model, view.moment.prompt)
    content = view.board.content
    np.testing.assert_allclose(unpack(content.arrays["load"]), 100 * routing.load, atol=1e-4)
    flow = unpack(content.arrays["flow"])
    first, then = routing.expert[1, :, 0], routing.expert[2, :, 0]
    for expert in set(first.tolist()):
        share = np.bincount(then[first == expert], minlength=routing.num_experts)
        np.testing.assert_allclose(flow[1, expert], 100 * share / share.sum(), atol=1e-4)
    assert np.isnan(flow[-1]).all()  # nothing follows the last layer
    unused = sorted(set(range(routing.num_experts)) - set(first.tolist()))
    assert unused and np.isnan(flow[1, unused]).all()
    note = "of the tokens of an expert of the layer (down); empty: it has none"
    assert panel(view, "flow")["note"] == note
    view.moment = view.moment.with_edits([E.TopK(1, 2)])
    assert panel(view, "flow")["note"].endswith(", first choices only")


def test_the_context_of_a_token_leaves_it_in_sight():
    words = ["<|begin_of_text|>", "<|header_start|>", "user", "<|header_end|>", "What"]
    assert experts._context(words, 2) == "ader_start|>[user]<|header_end"


def test_the_tokens_of_the_selected_expert_are_listed_in_context(view, model):
    routing = routing_of(model, view.moment.prompt)
    view.selection.layer, view.selection.expert = 2, int(routing.expert[2, 3, 0])
    rows, choices = panel(view, "tokens")["rows"], panel(view, "tokens")["choices"]
    taken = np.flatnonzero(routing.expert[2, :, 0] == view.selection.expert)
    assert [choice["token"] for choice in choices] == taken.tolist()
    at = taken.tolist().index(3)
    assert rows[at][1] == pytest.approx(float(routing.score[2, 3, 0]), abs=0.006)
    assert f"[{view.moment.words[3]}]" in rows[at][2] and view.moment.words[2] in rows[at][2]


def test_edits_stand_beside_the_clean_load(view):
    view.moment = view.moment.with_edits([E.DropExpert(1, expert=0)])
    content = view.board.content
    assert unpack(content.arrays["load"])[1, 0] == 0.0
    clean = view.moment.clean(routing_of)
    np.testing.assert_allclose(unpack(content.arrays["clean load"]), 100 * clean.load, atol=1e-4)
    assert "marks: clean" in panel(view, "load")["note"]


def test_kinds_of_text_are_measured_on_request(view):
    assert "domains" not in [panel["name"] for panel in view.board.content.panels]
    view.measure()
    found = view.specialised
    shown = unpack(view.board.content.arrays["domains"])
    above = 100 * (found.share - found.mixed)
    np.testing.assert_allclose(shown, np.moveaxis(above, 1, 0), atol=1e-4)
    assert panel(view, "domains")["scale"]["unit"] == "points"
    assert all("of the clean model" in panel(view, name)["note"] for name in ("domains", "bits"))
    np.testing.assert_allclose(
        unpack(view.board.content.arrays["bits"]), found.mutual_information, atol=1e-6
    )
    assert found.domains == ("code", "prose") and view.board.busy == ""


def test_short_texts_are_measured_and_empty_ones_named(view):
    view._domains = {"code": "def f(x): return x", "prose": "A short text."}
    view.measure()
    assert view.board.problem == "" and panel(view, "bits")
    view._domains = {"code": "def f(x): return x", "prose": ""}
    view.measure()
    assert view.board.problem == "the text of 'prose' has 0 tokens: give it 4 or more"


def test_a_dense_layer_is_called_dense(model):
    config = model.config.replace(interleave_moe_layer_step=2, moe_layers=None)
    mixed = l4.random(config)
    mixed.build_prompt, mixed.tokenizer = model.build_prompt, model.tokenizer
    view = ExpertsView(Moment(mixed, mixed.prompt(TEXT)))
    dense = next(i for i in range(4) if not config.is_moe(i))
    view.selection.layer = dense
    assert view.board.summary.startswith(f"Layer {dense} is dense: it has no experts.")
    assert [choice["layer"] for choice in panel(view, "balance")["choices"]] == [
        i for i in range(4) if config.is_moe(i)
    ]
