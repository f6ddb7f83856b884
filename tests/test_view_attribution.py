"""The attribution view: nothing runs before the button, and then captum's values are shown."""

import asyncio
import threading

import numpy as np
import pytest
from boards import shown

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.attribution import attribute
from llama4_lab.analysis.expert_features import expert_features
from llama4_lab.analysis.features import Target, patch_features, token_features
from llama4_lab.train.scenes import sample
from llama4_widgets import slices
from llama4_widgets.moment import Moment
from llama4_widgets.slices import sliced
from llama4_widgets.views.attribution import AttributionView

TEXT = "two times two"


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def moment(model):
    return Moment(model, model.prompt(TEXT))


def test_nothing_runs_before_the_button(moment):
    view = AttributionView(moment)
    assert view.board.content.panels == []
    said = "is not explained by tokens and integrated_gradients yet"
    assert view.board.summary.endswith(f"{said}: press Run, it takes seconds.")
    assert view.board.state()["summary"].endswith(f"{said}.")  # a kept page has no button


@pytest.mark.parametrize("method", ["feature_ablation", "integrated_gradients"])
def test_the_strip_is_captums_values_for_tokens(moment, model, method):
    view = AttributionView(moment)
    view.method = method
    view.work.begin.click()
    found = attribute(token_features(model, moment.prompt), method)
    np.testing.assert_allclose(shown(view, "clean"), found.values, atol=1e-5)
    error = f"miss the change by {found.completeness_error:.2%}"
    assert error in view.board.summary and view.board.busy == ""
    assert view.work.stop.disabled and not view.work.begin.disabled


def test_the_question_follows_the_selected_token_and_word(moment, model):
    view = AttributionView(moment)
    view.method, view.after, view.word = "feature_ablation", "selected token", "·two"
    view.selection.token = 1
    view.work.start()
    idx = model.tokenizer.encode(" two")[0]
    found = attribute(token_features(model, moment.prompt, Target(idx, 1)), "feature_ablation")
    np.testing.assert_allclose(shown(view, "clean"), found.values, atol=1e-5)
    view.selection.token = 0
    assert view.board.content.panels == []  # another question
    view.selection.token = 1
    assert len(view.board.content.panels) == 1
    view.word = "two times"
    assert "give one of them" in view.board.problem


def test_experts_of_the_clean_and_the_edited_run_stand_side_by_side(moment, model):
    edits = (E.SkipLayer(1),)
    view = AttributionView(moment.with_edits(edits))
    view.method, view.features = "feature_ablation", "experts"
    view.work.start()
    features = expert_features(model, moment.prompt)
    clean = attribute(features, "feature_ablation")
    with E.edited(model, edits):
        edited = attribute(expert_features(model, moment.prompt, clean.target), "feature_ablation")
    np.testing.assert_allclose(shown(view, "clean map").ravel(), clean.values, atol=1e-5)
    np.testing.assert_allclose(shown(view, "edited map").ravel(), edited.values, atol=1e-5)
    assert abs(clean.values - edited.values).max() > 1e-3
    (table,) = [each for each in view.board.content.panels if each["name"] == "clean"]
    best = int(abs(clean.values).argmax())
    assert table["rows"][0][0] == clean.labels[best]
    assert table["choices"][0] == dict(zip(("layer", "expert"), clean.places[best], strict=True))


def test_patches_lie_over_the_picture(model):
    picture = sample(np.random.default_rng(0)).images[0]
    prompt = model.prompt("What colour is it?", [picture])
    view = AttributionView(Moment(model, prompt))
    view.method, view.features = "feature_ablation", "image patches"
    view.work.start()
    assert view.board.problem == ""
    found = attribute(patch_features(model, prompt), "feature_ablation")
    is_patch = prompt.spans.patch[0].numpy() >= 0
    values = shown(view, "clean")
    np.testing.assert_allclose(values[is_patch], found.values, atol=1e-5)
    assert np.isnan(values[~is_patch]).all()
    panel = view.board.content.panels[0]
    assert panel["source"].startswith("data:image/") and len(panel["positions"]) == len(
        found.values
    )
    assert panel["note"].startswith("red: for the answer; blue: against it; strongest: ")


def test_pictures_of_an_attribution_are_of_one_size(model):
    prompt = model.prompt("Which way?", [sample(np.random.default_rng(0)).images[0]] * 3)
    view = AttributionView(Moment(model, prompt))
    view.method, view.features = "feature_ablation", "image patches"
    view.work.start()
    assert [panel["share"] for panel in view.board.content.panels] == [1 / 3] * 3


def test_patches_of_a_text_are_refused_in_words(moment):
    view = AttributionView(moment)
    view.features = "image patches"
    view.work.start()
    said = "this prompt has no picture: choose tokens or experts under Parts"
    assert view.board.problem == said


def test_work_can_be_cancelled_and_leaves_the_model_as_it_was(moment, model):
    view = AttributionView(moment)
    before = model(**moment.prompt)

    async def press() -> None:
        view.work.start()
        await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert view.board.busy.startswith("integrated_gradients: ")
        view.work.stop.click()
        await asyncio.sleep(0.02)

    asyncio.run(press())
    assert view.board.busy == "" and view.board.content.panels == []
    assert (model(**moment.prompt) == before).all()
    assert threading.active_count() < 50


def test_an_interrupt_of_the_kernel_stops_work_which_can_begin_anew(moment):
    view = AttributionView(moment)

    async def press() -> None:
        view.work.start()
        await asyncio.sleep(0.02)
        slices._hear()
        while view.work.begin.disabled:
            await asyncio.sleep(0.01)

    asyncio.run(press())
    assert view.board.summary == "Stopped: the kernel was interrupted."
    assert view.board.busy == "" and view.board.content.panels == []
    view.work.start()
    assert "nats with all parts off" in view.board.summary and len(view.board.content.panels) == 1


def test_sliced_work_moves_only_while_it_is_waited_for():
    log = []

    def work(pause):
        for i in range(3):
            log.append(i)
            pause(str(i))
        return "done"

    steps = sliced(work)
    assert next(steps) == "0"
    assert log == [0]
    next(steps)
    assert log == [0, 1]
    steps.close()
    assert log == [0, 1]

    def fails(pause):
        pause("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(sliced(fails))
