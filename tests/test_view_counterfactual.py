"""The counterfactual view: every expert at every layer for the selected token."""

import asyncio

import numpy as np
import pytest
import torch
from boards import panel, shown

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.counterfactual import counterfactual
from llama4_widgets.app import LabApp
from llama4_widgets.moment import Moment
from llama4_widgets.selection import Selection
from llama4_widgets.views.counterfactual import CounterfactualView

TEXT = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def moment(model):
    return Moment(model, model.prompt(TEXT))


def test_cells_are_the_librarys_effects_and_words(moment, model):
    view = CounterfactualView(moment, read="last token")
    view.selection.token = 4
    found = counterfactual(l4.Replay(model, moment.prompt), 4)
    np.testing.assert_allclose(shown(view, "effect"), found.kl, atol=1e-6)
    assert np.array_equal(shown(view, "choice"), found.is_choice)
    text = panel(view, "words")["text"]
    marked = np.array([[cell.startswith("● ") for cell in row] for row in text])
    assert np.array_equal(marked, found.is_choice)
    word = model.tokenizer.token_text(int(found.top[1, 2])).replace(" ", "·").replace("\n", "↵")
    assert text[1][2].removeprefix("● ") == word
    view.effect = "change of its top word"
    change = found.change(int(found.clean.argmax()))
    np.testing.assert_allclose(shown(view, "effect"), change, atol=1e-6)
    assert panel(view, "effect")["scale"]["kind"] == "diverging"
    row, expert = np.unravel_index(found.kl.argmax(), found.kl.shape)
    assert f"expert {expert} in layer {found.layers[row]}, KL" in view.board.summary


def test_edits_that_leave_no_answer_are_told_in_words(moment):
    view = CounterfactualView(moment.with_edits([E.Scale("logits", 1e39)]))
    assert view.board.summary.startswith(
        "Edits make logits that are no numbers: there is no answer"
    )
    assert view.board.content.panels == []


def test_the_word_after_the_token_itself_can_be_read(moment, model):
    view = CounterfactualView(moment)
    view.selection.token = 3
    view.read = "selected token"
    found = counterfactual(l4.Replay(model, moment.prompt), 3, read=3)
    np.testing.assert_allclose(shown(view, "effect"), found.kl, atol=1e-6)
    assert "after token 3" in panel(view, "effect")["note"]


def test_under_edits_all_runs_have_them(moment, model):
    edits = (E.SkipLayer(1), E.TopK(2, 2))
    view = CounterfactualView(moment.with_edits(edits), read="last token")
    view.selection.token = 2
    found = counterfactual(l4.Replay(model, moment.prompt), 2, edits=edits)
    np.testing.assert_allclose(shown(view, "effect"), found.kl, atol=1e-6)
    with E.edited(model, edits), torch.no_grad():
        clean = model(**moment.prompt)[0, -1].log_softmax(-1)
    np.testing.assert_allclose(found.clean, clean.numpy(), atol=1e-4)
    with E.edited(model, [*edits, E.Route(3, 2, 5)]), torch.no_grad():
        other = model(**moment.prompt)[0, -1].log_softmax(-1)
    np.testing.assert_allclose(found.logprobs[3, 5], other.numpy(), atol=1e-4)
    assert found.is_choice.sum(axis=1).tolist() == [1, 1, 2, 1]
    assert view.board.summary.endswith("all with the edits.")


def test_the_button_adds_the_selected_route(moment):
    view = CounterfactualView(moment)
    view.selection.token, view.selection.layer, view.selection.expert = 5, 2, 3
    assert view._add.description == "Send token 5 to expert 3 in layer 2"
    view._add.click()
    assert view.edits == view.moment.edits == (E.Route(2, 5, 3),)
    assert shown(view, "choice")[2, 3] == 1


def test_in_the_lab_the_route_reaches_all_views(model):
    app = LabApp(model, TEXT, shown=["router", "counterfactual"])
    app.selection.token, app.selection.layer, app.selection.expert = 5, 2, 3
    view = app.views["counterfactual"]
    assert isinstance(view, CounterfactualView)
    view.add_route()
    assert app.edits == app.moment.edits == (E.Route(2, 5, 3),)
    assert app.views["router"].moment.edits == app.edits
    app.edits = ()
    assert view.edits == ()


def test_many_runs_wait_for_the_button(model):
    view = CounterfactualView(Moment(model, model.prompt("a b c d e f g h " * 200)))
    assert view.board.summary.startswith("Not computed yet: ")
    assert view.board.summary.endswith("tokens in all take a while: press Run.")
    assert view.board.state()["summary"].endswith("tokens in all take a while.")
    assert view.board.content.panels == []
    assert view.work.begin.layout.display == ""
    view.selection.token = len(view.moment.words) - 3
    assert view.board.content.panels and view.work.begin.layout.display == "none"
    view.selection.token = 100
    view.work.begin.click()
    assert view.board.problem == "" and view.board.busy == ""
    assert view.board.summary.startswith("Of 32 ways to send token 100")


def test_of_many_layers_a_few_tokens_wait_for_the_button(model):
    deep = l4.random(
        model.config.replace(
            num_hidden_layers=48, num_local_experts=32, hidden_size=16, intermediate_size=8
        )
    )
    deep.tokenizer = model.tokenizer
    prompt = model.prompt("a b c d e f g h")
    selection = Selection(token=len(prompt.tokens) - 3)
    view = CounterfactualView(Moment(deep, prompt), selection)
    told = "1,536 runs of 4,608 tokens in all take a while: press Run."
    assert view.board.summary == f"Not computed yet: {told}"


def test_many_runs_say_how_far_they_are_and_can_be_cancelled(model):
    view = CounterfactualView(Moment(model, model.prompt("a b c d e f g h " * 200)))
    view.selection.token = 100
    told: list[str] = []
    view.board.observe(lambda change: told.append(change["new"]), "busy")
    before = model(view.moment.prompt.input_ids)

    async def press() -> None:
        view.work.begin.click()
        while not told:
            await asyncio.sleep(0.01)
        assert view.work.begin.disabled and not view.work.stop.disabled
        view.work.stop.click()
        await asyncio.sleep(0.05)

    asyncio.run(press())
    assert told[0] == "1 of 32 runs …" and told[-1] == ""
    assert view.board.content.panels == [] and view.board.problem == ""
    assert (model(view.moment.prompt.input_ids) == before).all()
    view.selection.token = 101  # another question stops what is under way, too
    assert not view.work.begin.disabled
