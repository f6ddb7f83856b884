"""The lab's bar: pictures, scenes, and another run beside this one."""

import asyncio
import inspect
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.decomposition import written
from llama4_lab.analysis.routing import routing_of
from llama4_lab.replay import Replay
from llama4_widgets.app import LabApp
from llama4_widgets.bar import ALONE, ANOTHER, CLEAN
from llama4_widgets.moment import Moment
from llama4_widgets.recording import open_lab
from llama4_widgets.selection import Mirror, Selection
from llama4_widgets.still import unpack
from llama4_widgets.views.ablate import AblateView
from llama4_widgets.views.counterfactual import EFFECTS
from llama4_widgets.views.difference import DifferenceView
from llama4_widgets.views.router import RouterView

TEXT = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture(scope="module")
def mini():
    return l4.load("mini")


@pytest.fixture
def app(model):
    return LabApp(model, TEXT, shown=["router"])


def upload(app, name, data):
    file = {"name": name, "type": "", "size": len(data), "content": memoryview(data)}
    app.bar.upload.value = ({**file, "last_modified": datetime.now(UTC)},)


def png(pixels):
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def test_the_name_of_a_model_is_no_model():
    with pytest.raises(TypeError, match=r"'mini' is no model: give one, such as llama4_lab\.load"):
        inspect.unwrap(LabApp.__init__)(LabApp.__new__(LabApp), "mini")


def test_a_model_whose_first_layers_are_dense_is_opened_at_its_first_router(model):
    dense_first = l4.random(model.config.replace(interleave_moe_layer_step=2))
    dense_first.tokenizer, dense_first.build_prompt = model.tokenizer, model.build_prompt
    opened = LabApp(dense_first, TEXT, shown=["router"])
    alone = RouterView(Moment(dense_first, dense_first.prompt(TEXT)))
    for selection, view in ((opened.selection, opened.views["router"]), (alone.selection, alone)):
        assert selection.layer == 1 and view.board.summary.startswith("layer 1, token ")
    dense = l4.random(model.config.replace(moe_layers=()))
    dense.tokenizer, dense.build_prompt = model.tokenizer, model.build_prompt
    assert LabApp(dense, TEXT, shown=["lens"]).selection.layer == 0


def difference(app):
    assert isinstance(app.difference, DifferenceView)
    return app.difference


# ---- pictures


def test_a_scene_asks_about_a_picture_with_known_boxes(mini):
    app = LabApp(mini, "one", shown=["router"])
    app.bar._rng = np.random.default_rng(1)
    app.bar.scene.click()
    assert app.bar.problem.value == ""
    moment = app.moment
    assert app.bar.text.value == app.prompt and app.prompt.endswith(("?", "."))
    assert len(moment.pictures) == 1 and moment.prompt.pixel_values is not None
    assert "user" in moment.prompt.spans.roles  # asked as a chat
    assert all(len(box) == 5 and " " in box[4] for box in moment.boxes)
    answer = app.bar.shown.children[-1].value
    assert answer.startswith("right answer: ")
    app.bar._run_text()  # the same once more
    assert app.moment is not moment and app.bar.shown.children[-1].value == answer
    moment = app.moment
    app.bar.text.value = "How many shapes are there?"
    assert all("right" not in getattr(each, "value", "") for each in app.bar.shown.children[1:])
    assert app.moment is not moment and app.prompt == app.bar.text.value
    assert app.moment.pictures == moment.pictures and app.moment.boxes == moment.boxes
    app.bar.shown.children[1].click()  # no picture
    assert app.moment.pictures == [] and app.bar.shown.children == ()


def test_a_picture_is_seen_by_the_token_that_is_selected(mini):
    app = LabApp(mini, "The sea is calm.", shown=("image",))
    app.bar.scene.click()
    assert app.selection.token == len(app.moment.tokens) - 1  # the first ones stand before it
    app.selection.token = shown = len(app.moment.tokens) - 3
    app.bar.scene.click()
    assert app.selection.token == min(shown, len(app.moment.tokens) - 1)
    picture = np.zeros((48, 48, 3), np.uint8)
    app.selection.token = len(app.moment.tokens) - 1
    for question, given in (("How?", [picture]), ("What is left of the star?", picture)):
        app.run(question, given)
        assert len(app.moment.pictures) == 1  # also where it came alone
        assert app.selection.token == len(app.moment.tokens) - 1  # it stays the last
    assert LabApp(mini, "What is this?", [picture], shown=()).selection.token > 36


def test_pictures_can_be_uploaded_and_what_is_none_is_explained(mini):
    app = LabApp(mini, "What shape is red?", shown=["router"])
    pixels = np.full((48, 48, 3), 200, np.uint8)
    upload(app, "grey.png", png(pixels))
    assert app.bar.problem.value == ""
    assert np.array_equal(np.asarray(app.moment.pictures[0]), pixels)
    before = app.moment
    upload(app, "<b>.png", b"no picture")
    assert "&lt;b&gt;.png is no PNG or JPEG picture that can be read" in app.bar.problem.value
    assert app.moment is before
    said, run = [], app.bar._ask
    app.bar._ask = lambda *asked: (said.append(app.bar.problem.value), run(*asked))
    app.bar.text.value = "What shape is blue?"
    assert said == [""]  # while it runs, nothing of a wish before


def test_the_button_for_pictures_counts_them(mini):
    app = LabApp(mini, "What shape is red?", shown=["router"])
    data = png(np.full((48, 48, 3), 200, np.uint8))
    counts = []
    for name, content in (("a.png", data), ("a.png", data), ("b.png", b"no picture")):
        upload(app, name, content)
        counts.append((len(app.bar.upload.value), len(app.moment.pictures)))
    assert counts == [(1, 1), (2, 2), (2, 2)]
    assert all(not len(file["content"]) for file in app.bar.upload.value)  # not sent to pages
    app.bar.shown.children[-1].click()  # no picture
    assert app.bar.upload.value == ()


def test_a_model_without_eyes_says_so(app):
    before = app.moment
    app.bar.scene.click()
    if app.model.config.vision_config is None:
        assert "this model reads only text" in app.bar.problem.value and app.moment is before


# ---- running


def press_run(app):
    """Press the button, or Enter, beside a text that was run before."""
    app.bar.text._handle_custom_msg({"again": True}, [])


def test_the_same_text_can_be_run_again(app):
    before = app.moment
    press_run(app)
    assert app.moment is not before and app.moment.tokens == before.tokens


def test_edits_that_do_not_fit_a_text_say_how_to_go_on(app):
    app.edits = (E.RemoveTokens((9,)),)
    before = app.moment
    app.bar.text.value = "two"
    assert "there is no token 9: the prompt has 2 (0 to 1)" in app.bar.problem.value
    assert "Clear in Ablate takes all edits away" in app.bar.problem.value
    assert app.moment is before and app.prompt == TEXT
    app.edits = ()
    assert app.bar.problem.value == ""
    press_run(app)
    assert app.bar.problem.value == "" and app.prompt == "two"
    app.edits = (E.RemoveTokens((1,)),)
    app.bar.text.value = TEXT
    assert app.bar.problem.value == "" and app.prompt == TEXT


def test_the_bar_says_that_a_chat_is_shown(app):
    app.run([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}])
    assert app.bar.text.value == "" and app.bar.problem.value == ""
    assert app.bar.shown.children[0].value == "a chat of 2 messages is shown"
    before = app.moment
    press_run(app)  # with nothing typed: the chat once more
    assert app.moment is not before and app.moment.tokens == before.tokens
    assert [message["role"] for message in app.prompt] == ["user", "assistant"]
    app.bar.text.value = TEXT
    assert app.prompt == TEXT and app.bar.shown.children == ()
    app.bar.text.value = ""  # a text, too
    assert app.prompt == "" and len(app.moment.tokens) == 1


@pytest.mark.parametrize("prompt", ["\N{SLIGHTLY SMILING FACE} he", "picture", "chat"])
def test_new_text_is_looked_at_as_it_was_written(mini, prompt):
    app = LabApp(mini, "two", shown=["router", "generate"])
    if prompt == "picture":
        app.bar.scene.click()
    else:
        app.run([{"role": "user", "content": "12 + 7 = "}] if prompt == "chat" else prompt)
    before, view = app.moment, app.views["generate"]
    view.step()
    view.step()
    ids = [one.id for one in view.written if one.id not in mini.config.stop_token_ids]
    view.keep()
    assert ids and list(view.kept) == ids and view.written == []
    assert app.bar.problem.value == ""
    now = app.moment.prompt
    assert now.input_ids[0].tolist() == [*before.prompt.input_ids[0].tolist(), *ids]
    assert (now.spans.message[0, -2:] == before.prompt.spans.message[0, -1]).all()
    assert app.moment.pictures == before.pictures and app.moment.boxes == before.boxes
    logits = mini(now.input_ids, before.prompt.pixel_values)[0]
    torch.testing.assert_close(app.moment.replay.logits, logits, atol=1e-4, rtol=0)
    if prompt == "picture":
        assert [message["role"] for message in app.prompt] == ["user", "assistant"]


# ---- comparing


def test_a_clean_run_stands_beside_an_edited_one(app, model):
    app.edits = (E.SkipLayer(1),)
    app.compare(())
    view = difference(app)
    effect = app.moment.edited_run.effect
    with E.edited(model, app.edits):
        edited = routing_of(model, app.moment.prompt)
    flips = (edited.expert != routing_of(model, app.moment.prompt).expert).any(-1)
    assert np.array_equal(view.flips(), flips)
    shown = unpack(view.board.content.arrays["flips"])
    assert np.array_equal(shown, flips.sum(axis=1))
    p, q = (
        logits.double().log_softmax(-1)
        for logits in (app.moment.replay.logits, app.moment.edited_run.logits)
    )
    expected = (p.exp() * (p - q)).sum(-1).numpy()
    np.testing.assert_allclose(unpack(view.board.content.arrays["kl"]), expected, atol=1e-5)
    assert expected.max() > 0.01 and effect.kl.max() > 0.01
    clean = app.beside["router"].board.content.arrays["chosen"]
    assert np.array_equal(unpack(clean), routing_of(model, app.moment.prompt).expert[..., 0])
    assert app.beside["router"].board.title == "Router, beside: the clean run"


def test_the_selection_is_shared_as_far_as_it_goes(app):
    app.compare("two")
    assert len(app.moment.tokens) > 3 and len(app.beside["router"].moment.tokens) == 2
    app.selection.token, app.selection.layer = 3, 2
    mine, other = app.views["router"], app.beside["router"]
    assert other.selection.token == 1 and other.selection.layer == 2
    assert app.selection.token == 3
    assert mine.board.group == other.board.group
    chosen = {**app.selection.shared, "layer": 0, "seq": app.selection.shared["seq"] + 1}
    other.board.set_state({"selection": chosen})  # a click there, in a page whose token is 3
    assert app.selection.layer == 0 and other.board.problem == mine.board.problem == ""


def test_of_a_shorter_run_beside_browsers_hear_what_is_selected_in_the_longer_one():
    selection = Selection(token=5)
    selection.bounds = dict.fromkeys(("token", "layer", "head", "expert"), 9)
    mirror = Mirror(selection)
    mirror.bounds = selection.bounds | {"token": 2}
    assert mirror.token == 1 and mirror.shared["token"] == 5
    selection.token = 7  # both have told of it by the same count
    assert mirror.token == 1 and mirror.shared == selection.shared
    mirror.layer = 3
    assert (selection.token, selection.layer) == (7, 3) and mirror.shared == selection.shared
    mirror.follow(mirror.shared | {"head": 2, "seq": mirror.shared["seq"] + 1})  # from a browser
    assert (selection.token, selection.head, mirror.token, mirror.head) == (7, 2, 1, 2)
    mirror.token = 0
    assert selection.token == 0 and mirror.shared == selection.shared


def test_a_mirror_with_less_leaves_the_other_where_it_is_and_finds_back():
    selection = Selection(token=7)
    mirror = Mirror(selection)
    mirror.bounds = {"token": 2}
    assert (selection.token, mirror.token) == (7, 1)
    mirror.bounds = {"token": 9}
    assert (selection.token, mirror.token) == (7, 7)  # found again where there is more
    mirror.bounds = {"token": 2}
    mirror.token = 0
    assert selection.token == 0


def test_prompts_of_other_lengths_are_explained_not_subtracted(app):
    app.compare("two")
    board = difference(app).board
    counts = f"{len(app.moment.tokens)} and 2 tokens"
    assert f"the prompts have {counts}, so that no token has a counterpart" in board.summary
    assert [panel["name"] for panel in board.content.panels] == ["answers"]


def test_runs_beside_each_other_have_one_scale(app):
    def scales(view):
        panels = {panel["name"]: panel.get("scale") for panel in view.board.content.panels}
        return panels["loads"]["high"], panels["load"]["high"]

    app.shown = ("experts",)
    view = app.views["experts"]
    alone = scales(view)
    app.compare("= = = = = = = =")  # nearly all for one expert
    beside = app.beside["experts"]
    highest = 100 * float(beside.moment.clean(routing_of).load.max())
    assert highest > alone[0] and scales(view)[0] == pytest.approx(highest)
    assert scales(view) == scales(beside)
    app.selection.layer = 2  # drawn anew
    assert scales(view) == scales(beside)
    app.compare(app.prompt)
    assert scales(view) == scales(beside) and scales(view)[0] < highest
    app.compare(None)
    app.selection.layer = 0
    assert scales(view) == alone


def test_equal_runs_are_told_equal(app):
    app.compare(app.prompt)
    said = "the predictions are the same, up to rounding"
    assert said in difference(app).board.summary and "nats" not in difference(app).board.summary


def test_prompts_of_one_length_are_compared_place_by_place(app):
    app.run("3 + 4 =")
    app.compare("3 + 5 =")
    assert "1 of 6 tokens differ: compared place by place" in difference(app).board.summary
    kl = unpack(difference(app).board.content.arrays["kl"])
    assert abs(kl[:4]).max() < 1e-5 < kl[-1]


def test_another_model_runs_the_same_prompt(app):
    app.compare(l4.load("nano", quantize="int4"))
    view = difference(app)
    assert app.bar.sides.value == "beside another model, nano (int4)"
    assert view.other.model is not app.model and view.other.tokens == app.moment.tokens
    assert view.kl().max() > 0
    app.run("two times two")
    assert difference(app).other.tokens == app.moment.tokens
    assert difference(app).board.problem == ""


def test_models_of_other_makes_say_what_cannot_be_compared(app):
    other = l4.random(app.model.config.replace(num_local_experts=2), 0)
    other.tokenizer, other.build_prompt = app.model.tokenizer, app.model.build_prompt
    app.compare(other)
    view = difference(app)
    assert "other MoE layers or experts: choices cannot be compared" in view.board.summary
    assert "flips" not in view.board.content.arrays and "kl" in view.board.content.arrays


def test_the_bar_chooses_what_stands_beside(app):
    app.edits = (E.SkipLayer(1),)
    assert app.bar.sides.value == ALONE
    app.bar.sides.value = CLEAN
    assert difference(app).other.edits == () and app.beside["router"].moment.edits == ()
    app.bar.sides.value = ANOTHER
    assert difference(app).other.tokens == app.moment.tokens
    app.bar.beside.value = "two"
    assert difference(app).other.tokens[1:] == ["two"]
    assert difference(app).other.edits == app.edits
    app.bar.beside.value = "x" * 9000
    assert "the lab shows at most 4096" in app.bar.problem.value
    app.edits = ()
    assert app.bar.beside.value == "x" * 9000  # what was typed stays
    app.bar.sides.value = ALONE
    assert app.difference is None and not app.beside["router"].is_shown


def test_an_empty_field_ends_the_comparison(app):
    app.compare("two")
    app.bar.beside.value = ""
    assert app.difference is None and app.bar.sides.value == ALONE
    app.bar.sides.value = ANOTHER  # begins with the text that is shown
    assert app.bar.beside.value == TEXT and difference(app).other.tokens == app.moment.tokens


def test_a_comparison_takes_nothing_from_the_page(app):
    """What a page is told to take away while it still makes it is an error there."""
    app.shown = ("router", "ablate", "lens")
    changes: list[Any] = []
    for box in (app, app._across, app._grid, *app._grid.children):
        box.observe(lambda change: changes.append((change["old"], change["new"])), "children")
    app.compare(())
    view, other = difference(app), app.beside["router"]
    assert app._across.layout.display == other.layout.display == ""
    app.compare(None)
    assert app._across.layout.display == other.layout.display == "none"
    assert not view.is_shown and not other.is_shown
    app.compare("two")
    assert difference(app) is view and view.is_shown and len(view.other.tokens) == 2
    assert f"{len(app.moment.tokens)} and 2 tokens" in view.board.summary
    assert app._across.layout.display == other.layout.display == ""
    assert len(changes) == 3  # what is across, and two pairs
    assert all(new[: len(old)] == old for old, new in changes)


def test_a_comparison_says_whose_run_is_where(app):
    def headings():
        return app.views["router"].children[0].value, app.beside["router"].children[0].value

    app.compare("<b>")
    assert "<i>this run</i>" in headings()[0] and "<i>the text ‘&lt;b&gt;’</i>" in headings()[1]
    app.compare(None)
    assert "<i>" not in headings()[0]


def test_a_long_text_beside_is_cut_not_left_out(app):
    def told():
        return app.beside["router"].children[0].value, app.recording().about["beside"]

    app.compare("def two(a):\n    return two(a)\n" * 9)
    assert "<i>the text ‘def·two(a):↵····return·two(a)↵def·two(a):↵··…</i>" in told()[0]
    assert told()[1].startswith("the text ‘def·two(a):↵····return") and told()[1].endswith("…’")
    assert len(told()[1]) == 200 + len("the text ‘’")


def test_a_comparison_says_which_run_has_the_edits(app):
    def told():
        return app.recording().about["beside"]

    app.edits = (E.SkipLayer(1),)
    app.compare(l4.load("nano"))
    assert app.beside["router"].moment.edits == ()
    assert told() == "another model, nano (float32), clean"
    assert app.bar.sides.value == "beside another model, nano (float32), clean"
    app.compare("two " * 90)
    assert app.beside["router"].moment.edits == app.edits and told().endswith("…’, with the edits")
    assert "…, with the edits</i>" in app.beside["router"].children[0].value
    app.compare(())
    assert told() == "the clean run"
    app.edits = ()
    app.compare("two")
    assert told() == "the text ‘two’"


def test_what_cannot_stand_beside_is_told(app):
    for strange in (5, 2.5, {"a": 1}):
        with pytest.raises(TypeError, match="cannot stand beside: give a text, messages, a model"):
            app.compare(strange)
    assert app.difference is None
    app.compare(E.SkipLayer(1))  # one is enough
    assert difference(app).other.edits == (E.SkipLayer(1),)


def test_the_bar_shows_what_code_puts_beside(app):
    app.compare("two")
    assert (app.bar.sides.value, app.bar.beside.value) == (ANOTHER, "two")
    assert app.bar.beside.layout.display == ""
    app.compare([E.SkipLayer(0)])
    assert app.bar.sides.value.startswith("beside SkipLayer(layer=0)")
    before = difference(app)
    app.edits = [E.SkipLayer(1)]
    assert app.bar.sides.value.startswith("beside Skip") and difference(app) is before
    app.bar.sides.value = CLEAN
    assert difference(app).other.edits == () and app.bar.beside.layout.display == "none"
    app.compare([E.SkipLayer(0)])
    app.compare(None)
    assert app.bar.sides.value == ALONE
    assert app.bar.sides.options == (ALONE, CLEAN, ANOTHER)  # the others only code can bring


def test_a_comparison_is_kept(app, tmp_path):
    app.compare("two")
    app.save(tmp_path / "a.lab")
    kept = open_lab(tmp_path / "a.lab")
    assert list(kept.boards) == ["difference", "router", "router beside"]
    assert kept.recording.about["beside"] == "the text ‘two’"
    assert len({board.group for board in kept.boards.values()}) == 1


def test_threads_take_turns_with_the_model(model):
    """JupyterLab hands clicks to one thread while another runs cells."""
    moment = Moment(model, model.prompt(TEXT), [E.SkipLayer(1)])
    others = [moment.with_edits([E.Scale("layers.1.attn.out", x / 10)]) for x in range(8)]
    alone = [Replay(model, moment.prompt).edited(each.edits).hidden for each in others]

    def hold() -> None:  # whole runs with edits, as the lens makes them
        for i in range(20):
            moment.edited(lambda model, prompt, i=i: model.hidden(prompt.input_ids))

    with ThreadPoolExecutor() as pool:
        held = pool.submit(hold)
        found = [each.edited_run.hidden for each in others]
        held.result()
    for mine, expected in zip(found, alone, strict=True):
        assert torch.equal(mine, expected)
    assert torch.equal(Replay(model, moment.prompt).hidden, moment.replay.hidden)


def test_pictures_that_were_shown_leave_no_widgets_behind(mini):
    app = LabApp(mini, TEXT, shown=[])
    one, two = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    app.run("What is it?", [one, two])
    count = len(ipywidgets.widgets.widget._instances)
    app.run("What is it?", [two])
    app.run("What is it?", [two, one])
    shown = [each for each in app.bar.shown.children if isinstance(each, ipywidgets.Image)]
    found = [Image.open(io.BytesIO(each.value)).getpixel((0, 0)) for each in shown]
    assert found == [(0, 0, 255), (255, 0, 0)]
    assert len(ipywidgets.widgets.widget._instances) == count


def test_a_cell_gives_no_other_prompt_to_what_is_drawn(model, monkeypatch):
    app = LabApp(model, TEXT, shown=["router"])
    view, first, seen = app.views["router"], app.moment, []
    content = type(view).content

    def draw_meanwhile(self):
        if not seen:
            running.append(pool.submit(app.run, "two"))
            while app.moment is first:
                time.sleep(0.001)
            time.sleep(0.05)  # for what must not happen
            seen.append(self.moment)
        return content(self)

    monkeypatch.setattr(type(view), "content", draw_meanwhile)
    running: list[Any] = []
    with ThreadPoolExecutor() as pool:
        view.refresh()
        running[0].result()
    assert seen == [first]
    assert view.moment is app.moment is not first


def test_cells_do_not_see_the_edits_of_a_lab(model):
    prompt = model.prompt(TEXT)
    alone = model(**prompt)
    app = LabApp(model, TEXT, shown=["router"])
    app.edits = (E.SkipLayer(1), E.Rope(0, False))

    def work() -> None:
        for i in range(20):
            app.moment.edited(lambda model, prompt, i=i: model.hidden(prompt.input_ids))

    with ThreadPoolExecutor() as pool:
        working = pool.submit(work)
        while not working.done():
            assert torch.equal(model(**prompt), alone)
        working.result()
    with E.edited(model, [E.SkipLayer(1)]), pytest.raises(ValueError, match="leave the block"):
        app.run("other")
    model.norm.weight.data.mul_(2.0)
    try:
        app.run(TEXT)
        assert not torch.allclose(app.moment.replay.logits, alone[0], atol=0.1)
    finally:
        model.norm.weight.data.div_(2.0)


def warmth(ablate: Any) -> ipywidgets.SelectionSlider:
    names = {control.widget.description: control.widget for control in ablate._controls}
    return names["router temperature"]


def test_a_newer_wish_comes_before_the_rest_of_a_slow_view(model):
    async def drag() -> list[tuple[E.Edit, ...]]:
        app = LabApp(model, TEXT, shown=["router", "lens", "ablate"])
        slider, lens, drawn = warmth(app.views["ablate"]), app.views["lens"], []
        lens.observe(lambda change: drawn.append(change["new"].edits), "moment")
        slider.value = 2.0
        while not any(question[0] is written for question in app.moment._edited):
            await asyncio.sleep(0)
        assert lens.moment is not app.moment  # it has begun
        slider.value = 3.0
        assert app.views["router"].moment is app.moment
        while lens.moment is not app.moment:
            await asyncio.sleep(0)
        return drawn

    assert asyncio.run(drag()) == [(E.RouterTemperature(0, 3.0),)]


def test_a_dragged_slider_is_answered_before_slower_views_follow(model):
    async def drag() -> list[list[bool]]:
        app = LabApp(model, TEXT, shown=["router", "lens", "ablate"])
        ablate: Any = app.views["ablate"]
        slider = warmth(ablate)
        slider.value = 2.0
        slider.value = 3.0
        found = []
        for _ in range(2):
            found.append([app.views[n].moment is app.moment for n in ("router", "ablate", "lens")])
            await asyncio.sleep(0.001)
        while app.views["lens"].moment is not app.moment:
            await asyncio.sleep(0.01)
        assert app.edits == (E.RouterTemperature(0, 3.0),)
        return [*found, [view.moment is app.moment for view in app.views.values()]]

    at_once, next_turn, later = asyncio.run(drag())
    assert at_once == [True, False, False]  # between the two, the kernel sends the first
    assert next_turn == [True, True, False]
    assert later == [True, True, True]


def test_what_can_no_longer_stand_beside_is_marked(app):
    app.compare("Hi")
    app.edits = [E.SkipLayer(1)]
    app.edits = [E.Route(2, 6, 1)]  # of a token that the text beside does not have
    assert app.views["router"].moment.edits == app.edits and not app.views["router"].board.problem
    for view in (difference(app), *app.beside.values()):
        assert view.board.problem.startswith("nothing can stand beside this run: Route(layer=2")
        assert not view.board.summary
    assert "there is no token 6" in app.bar.problem.value
    app.edits = [E.SkipLayer(1)]
    assert not difference(app).board.problem and "tokens" in difference(app).board.summary


def test_views_of_other_prompts_follow_one_selection_as_far_as_they_go(model):
    selection = Selection()
    short, long = (
        AblateView(Moment(model, model.prompt(text)), selection) for text in ("Hi", TEXT)
    )
    selection.token = 1
    assert long.selection.token == 1
    long.selection.token = 8
    assert short.selection.token == len(short.moment.words) - 1 and not short.board.problem
    assert long.selection.token == 8 and "token 8" in long.board.content.panels[-1]["title"]


def test_a_place_that_another_view_made_room_for_is_told_in_words(model):
    selection = Selection()
    first, second = (AblateView(Moment(model, model.prompt("Hi")), selection) for _ in range(2))
    second.moment = Moment(model, model.prompt(TEXT))
    selection.token = 8
    count = len(first.moment.words)
    assert first.board.problem == f"token 8 is selected, and this run has {count} tokens"
    assert "token 8" in second.board.content.panels[-1]["title"]
    selection.token = 0
    assert not first.board.problem


def test_a_chat_that_was_gone_on_with_has_one_answer_and_stands_beside_other_models(model, mini):
    chat = [{"role": "user", "content": "3 + 4 ="}]
    app = LabApp(model, chat, shown=["router", "generate"])
    for _ in range(2):
        app.views["generate"].step()
        app.views["generate"].keep()
    assert [message["role"] for message in app.prompt] == ["user", "assistant"]
    same = l4.load("nano", quantize="int8")
    app.compare(same)
    assert difference(app).other.tokens == app.moment.tokens
    assert "KL from" in difference(app).board.summary


def test_pictures_of_a_chat_are_left_to_code(mini):
    chat = [{"role": "user", "content": "two times two"}]
    app = LabApp(mini, chat, shown=["router"])
    assert "a chat of 1 message is shown" in str([each.value for each in app.bar.shown.children])
    upload(app, "a.png", png(np.zeros((48, 48, 3), np.uint8)))
    assert "pictures of a chat are given in code" in app.bar.problem.value
    assert app.prompt == chat and not app.moment.pictures


def test_what_is_drawn_meanwhile_takes_no_edit_back(model):
    edit = E.SkipLayer(1)

    async def use(act: Callable[[LabApp], Any]) -> tuple[E.Edit, ...]:
        app = LabApp(model, TEXT, shown=["router", "ablate", "counterfactual"])
        app.shown = ["router", "ablate"]
        app.views["ablate"].edits = (edit,)
        act(app)
        while app.views["counterfactual"].moment is not app.moment:
            await asyncio.sleep(0.01)
        return app.edits

    def show(app):
        app.shown = ["router", "ablate", "counterfactual"]

    def colour(app):
        show(app)
        app.views["counterfactual"].effect = EFFECTS[1]

    assert [asyncio.run(use(act)) for act in (show, colour)] == [(edit,), (edit,)]


def test_a_larger_model_can_be_followed_by_a_smaller_one_beside(mini, model):
    app = LabApp(mini, TEXT, shown=["router", "counterfactual"])
    app.compare(model)
    app.selection.layer = 7
    app.compare(())
    assert not app.bar.problem.value and not any(v.board.problem for v in app.beside.values())
    assert app.beside["router"].board.title.endswith("the clean run")
    assert app.beside["counterfactual"]._add.layout.display == "none"


def test_what_stands_beside_is_not_run_again_at_each_edit(model, mini, monkeypatch):
    app = LabApp(model, TEXT, shown=["router"])
    for other in (mini, "Hi there"):
        app.compare(other)
        made = difference(app).other
        monkeypatch.setattr(Moment, "replay", cached_property(lambda _: pytest.fail("run again")))
        Moment.replay.__set_name__(Moment, "replay")
        app.edits = [E.SkipLayer(1)]
        monkeypatch.undo()
        assert difference(app).other._clean is made._clean
        app.edits = []
        app.run(TEXT + " ")
        assert difference(app).other._clean is not made._clean


def test_what_is_kept_tells_of_what_is_selected(model, tmp_path):
    app = LabApp(model, TEXT, shown=["router"])
    app.selection.token, app.selection.layer = 4, 2
    app.save(tmp_path / "run.lab")
    kept = open_lab(tmp_path / "run.lab").boards["router"]
    told = app.views["router"].summary()
    assert kept.summary.endswith(told) and told.startswith("layer 2, token 4")
