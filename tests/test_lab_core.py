"""The core of the lab without a browser: selection, panels, board, moment, the router's view."""

import asyncio
import base64
import gzip
import re
import time
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import traitlets

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.decomposition import written
from llama4_lab.analysis.routing import routing_of
from llama4_widgets import slices
from llama4_widgets.app import LabApp
from llama4_widgets.board import Board, page_of, unflat
from llama4_widgets.moment import Moment
from llama4_widgets.panels import Axis, Content, diverging, pack, sequential
from llama4_widgets.plots import figure
from llama4_widgets.selection import Selection
from llama4_widgets.slices import sliced
from llama4_widgets.still import picked, svg, unpack
from llama4_widgets.views.attention import AttentionView
from llama4_widgets.views.difference import DifferenceView
from llama4_widgets.views.experts import ExpertsView
from llama4_widgets.views.lens import LensView
from llama4_widgets.views.router import RouterView

TEXT = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def moment(model):
    return Moment(model, model.prompt(TEXT))


def test_a_choice_in_one_board_reaches_selection_and_other_boards():
    selection = Selection()
    boards = [Board(selection), Board(selection)]
    chosen = {**selection.shared, "token": 4, "seq": selection.shared["seq"] + 1}
    boards[0].set_state({"selection": chosen})  # what a browser sends
    assert selection.token == 4
    assert boards[1].selection == chosen
    selection.layer = 2
    assert boards[0].selection["layer"] == boards[1].selection["layer"] == 2
    assert boards[0].selection["seq"] > chosen["seq"]


def test_an_older_choice_does_not_undo_a_newer_one():
    selection = Selection()
    board = Board(selection)
    old = {**selection.shared, "token": 4}
    selection.token = 7
    board.set_state({"selection": old})
    assert selection.token == 7


def test_boards_agree_after_choices_that_crossed_on_their_way():
    selection = Selection()
    boards = [Board(selection), Board(selection)]
    start = selection.shared
    selection.token = 7  # while a click is on its way
    crossing = {**start, "token": 4, "seq": start["seq"] + 1}
    boards[0].set_state({"selection": crossing})
    assert selection.token == 4
    assert selection.shared["seq"] > crossing["seq"]  # or browsers would not listen
    selection.layer = 2
    boards[0].set_state({"selection": {**crossing, "layer": 1}})
    assert selection.layer == 2
    assert [board.selection for board in boards] == [selection.shared] * 2


def test_browsers_hear_that_a_prompt_does_not_have_what_they_chose():
    selection = Selection()
    selection.bounds = {"token": 5}  # of which a page has not heard
    board = Board(selection)
    chosen = {**selection.shared, "token": 9, "seq": selection.shared["seq"] + 1}
    board.set_state({"selection": chosen})
    assert board.selection == selection.shared
    assert selection.token == selection.shared["token"] == 4
    assert selection.shared["seq"] > chosen["seq"]  # or they would not listen


def test_a_choice_outside_the_prompt_is_explained(moment):
    view = RouterView(moment)
    with pytest.raises(traitlets.TraitError, match=r"layer 9 is out of range: .* \(0 to 3\)"):
        view.selection.layer = 9
    assert view.selection.layer == 0


def test_arrays_arrive_exactly_or_within_half_a_step():
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(3, 5)), rng.normal(size=(300, 300))
    large[0, 0] = np.nan
    assert np.array_equal(unpack(pack(small)), small.astype(np.float32))
    assert np.array_equal(unpack(pack(np.arange(5))), np.arange(5))
    for ends in ((-(2**15), 2**15 - 1), (-(2**15) - 1, 0), (0, 2**15), (-200, 54), (-200, 55)):
        whole = np.array([*ends, 7])
        assert np.array_equal(unpack(pack(whole)), whole)
    back = unpack(pack(large))
    step = (np.nanmax(large) - np.nanmin(large)) / 254
    assert np.isnan(back[0, 0]) and np.nanmax(abs(back - large)) <= step / 2 + 1e-12
    assert len(pack(large)["data"]) == large.size  # a byte each


def test_scales_side_by_side_hold_the_numbers_of_both():
    def content(scale):
        one = Content({"y": Axis("y", 2), "x": Axis("x", 3)})
        one.add("one", "One", np.zeros((2, 3)), ("y", "x"), scale)
        return one

    def beside(one, other):
        scale = content(one).beside(content(other)).panels[0]["scale"]
        return scale["low"], scale["high"]

    assert beside(sequential(0, 3), sequential(-2, 1)) == (-2, 3)
    assert beside(diverging(1), diverging(4)) == (-4, 4)
    assert beside(sequential(0, 3), diverging(4)) == (0, 3)  # of another kind
    assert beside(sequential(0, 3, "nats"), sequential(0, 9, "bits")) == (0, 3)


def test_work_in_steps_has_ended_when_its_steps_are_closed():
    begun, ended = [], []

    def work(pause):
        try:
            for i in range(3):
                begun.append(i)
                pause(f"step {i}")
        finally:
            time.sleep(0.05)
            ended.append(True)

    steps = sliced(work)
    assert (next(steps), next(steps)) == ("step 0", "step 1")
    steps.close()
    assert (begun, ended) == ([0, 1], [True])


def test_work_that_fails_in_a_step_raises_there():
    def work(pause):
        pause("begun")
        raise ValueError("no such thing")

    steps = sliced(work)
    assert next(steps) == "begun"
    with pytest.raises(ValueError, match="no such thing"):
        next(steps)


def test_of_large_arrays_a_browser_gets_the_page_that_is_selected():
    values = np.random.default_rng(0).integers(0, 200, (3, 200, 150))
    axes = {"layer": Axis("layer", 3, "layer", values=[1, 3, 5]), "y": Axis("y", 200)}
    content = Content(axes | {"x": Axis("x", 150)})
    content.array("map", values, ("layer", "y", "x"), paged=True)
    assert "data" not in content.message(is_whole=False)["arrays"]["map"]
    whole = content.message()["arrays"]["map"]
    for place, layer in enumerate((1, 3, 5)):
        found = content.pages({"layer": layer})["map"]
        assert found["page"] == place
        one = whole | {"data": found["data"], "shape": [200, 150]}
        assert np.array_equal(unpack(one), values[place])


def test_a_place_that_an_axis_does_not_have_is_its_nearest_or_its_first():
    plain, named = Axis("token", 3, "token"), Axis("layer", 2, "layer", values=[1, 5])
    assert [plain.index({"token": i}) for i in (-1, 0, 2, 3, 9)] == [0, 0, 2, 2, 2]
    assert [named.index({"layer": i}) for i in (1, 5, 3, 6)] == [0, 1, 0, 0]
    assert plain.index({}) == 0


def test_the_likeliest_words_of_two_runs_are_ordered_by_one(moment):
    one, other = torch.zeros(2, moment.model.config.vocab_size)
    one[[40, 41]], other[[41, 42]] = torch.tensor([0.7, 0.3]), torch.tensor([0.1, 0.9])
    for by, ids in ((0, [40, 41, 42]), (1, [42, 41, 40])):
        found = moment.likeliest(one, other, by=by)[:3]
        percents = {40: [70, 0], 41: [30, 10], 42: [0, 90]}
        assert found == [[moment.word(i), *map(pytest.approx, percents[i])] for i in ids]


def test_a_panel_picks_what_it_does_not_show():
    values = np.arange(24).reshape(2, 3, 4)
    content = Content(
        {"layer": Axis("layer", 2, "layer", values=[1, 5]), "y": Axis("y", 3), "x": Axis("x", 4)}
    )
    content.add("one", "One", values, ("layer", "y", "x"), sequential(0, 1), shown=("x", "y"))
    found = picked(content, content.panels[0], {"layer": 5})
    assert np.array_equal(found, values[1].T)


def test_a_moment_runs_once_for_all_who_look_at_it(moment):
    for each in (moment, moment.with_edits([E.SkipLayer(1)])):
        assert each.edited_run is each.edited_run


def test_a_run_with_other_edits_keeps_what_was_asked_before(moment):
    first = moment.with_edits([E.SkipLayer(1)])
    for question in (routing_of, written):
        first.edited(question)
    second = first.with_edits([E.SkipLayer(2)])
    second.edited(routing_of)
    run = second.edited_run
    second.edited(written)
    assert second.edited_run is run


def test_the_router_view_shows_the_librarys_numbers(moment, model):
    view = RouterView(moment)
    routing = routing_of(model, moment.prompt)
    shown = unpack(view.board.content.arrays["chosen"])
    assert np.array_equal(shown, routing.expert[..., 0])
    probability = unpack(view.board.content.arrays["probability"])
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-routing.logits)), atol=1e-6)
    assert view.board.summary.startswith("layer 0, token 1 ‘def’: expert")


def test_an_edited_moment_is_the_edited_model_beside_the_clean_one(moment, model):
    edits = [E.DropExpert(0, expert=int(routing_of(model, moment.prompt).expert[0, 3, 0]))]
    other = moment.with_edits(edits)
    with E.edited(model, edits):
        expected = routing_of(model, moment.prompt)
    assert np.array_equal(other.edited(routing_of).expert, expected.expert)
    assert other.clean(routing_of) is moment.clean(routing_of)
    assert (other.edited(routing_of).expert != other.clean(routing_of).expert).any()
    views = [RouterView(each).board.content for each in (other, moment)]
    shown = [unpack(views[0].arrays[name]) for name in ("chosen", "clean chosen")]
    assert np.array_equal(shown[0], expected.expert[..., 0])
    assert np.array_equal(shown[1], moment.clean(routing_of).expert[..., 0])
    flips = int((shown[0] != shown[1]).sum())
    notes = [next(p["note"] for p in view.panels if p["name"] == "chosen") for view in views]
    assert flips and notes[0].startswith(f"rings: {flips} flips") and "rings" not in notes[1]


def test_the_router_view_says_which_scores_an_edit_made(moment):
    edits = [E.SkipLayer(1, tokens=(0, 2)), E.RouterTemperature(2, 0.5)]
    views = [RouterView(each).board.content for each in (moment, moment.with_edits(edits))]
    notes = [next(p["note"] for p in view.panels if p["name"] == "score") for view in views]
    assert "differ" not in notes[0]
    assert notes[1].endswith("; 2 differ from the probability, by an edit")
    assert (unpack(views[1].arrays["score"])[1, [0, 2]] == 0).all()


@pytest.mark.parametrize("k", [2, 8])
def test_views_show_a_layer_that_chooses_more_experts(moment, k):
    other = moment.with_edits([E.TopK(1, k)])
    views = [RouterView(other), ExpertsView(other), DifferenceView(moment, Selection(), other)]
    for view in views:
        assert view.board.problem == ""
        assert view.summary()
    flips = views[2].flips()
    assert flips[1].all() and not flips[0].any()
    note = next(p["note"] for p in views[0].board.content.panels if p["name"] == "chosen")
    count = sum(other.edited_run.effect.flips.values())
    assert note.startswith(f"rings: {count} flips") and count == flips.sum()
    assert np.array_equal(unpack(views[0].board.content.arrays["flips"]), flips)
    scale = next(p["scale"] for p in views[2].board.content.panels if p["name"] == "flips")
    assert scale["high"] % 4 == 0 and 0 <= scale["high"] - flips.sum(axis=1).max() < 4


def test_the_difference_from_the_clean_run_is_what_an_edit_does(moment):
    edited = moment.with_edits([E.SkipLayer(1)])
    expected = edited.edited_run.effect.kl.numpy()
    for pair, source in (((edited, moment), "the run beside"), ((moment, edited), "this run")):
        view = DifferenceView(pair[0], Selection(), pair[1])
        np.testing.assert_allclose(view.kl(), expected, atol=1e-5)
        mean = f"mean {expected.mean():.3g} over all {len(expected)} tokens"
        assert f"KL from {source}: {mean}, most " in view.summary()


def test_a_difference_from_what_is_no_number_is_told_in_words(moment):
    view = DifferenceView(moment.with_edits([E.Scale("logits", 1e39)]), Selection(), moment)
    assert "edits make logits that are no numbers: no predictions are left" in view.board.summary
    names = [panel["name"] for panel in view.board.content.panels]
    assert "kl" not in names and "answers" in names


def test_a_view_of_a_model_says_what_it_shows(model):
    with pytest.raises(TypeError, match=r"a view shows a Moment\(model, .*\), not Llama4"):
        RouterView(model)


def test_a_hidden_view_computes_when_it_is_shown(moment, model):
    view = RouterView(moment)
    view.is_shown = False
    before = view.board.content
    view.moment = Moment(model, model.prompt("two times two"))
    assert view.board.content is before
    view.is_shown = True
    assert view.board.content is not before


def test_a_failing_view_says_why_in_words(moment):
    class Broken(RouterView):
        def content(self):
            raise ValueError("this model has no experts")

    assert Broken(moment).board.problem == "this model has no experts"


@pytest.mark.parametrize("content", [RouterView.content, None])
def test_what_takes_a_while_to_draw_is_announced(model, moment, content):
    class Watched(RouterView):
        def content(self):
            told.append("drawn")
            return content(self) if content else {}["missing"]

    told: list[str] = []
    view = Watched(moment)
    view.board.observe(lambda change: told.append(change["new"]), "busy")
    view._seconds = 0.0  # that it took to draw the last time, however busy this machine is
    view.refresh()
    assert told == ["drawn", "drawn"]
    view._seconds = 1.0
    view.refresh()
    assert told[2:] == ["drawing …", "drawn", ""]
    view.moment = Moment(model, model.prompt("word " * 300))
    assert told[5:] == ["drawing …", "drawn", ""]


def test_a_choice_draws_those_once_that_follow_it(model, moment):
    class Watched(LensView):
        def content(self):
            drawn.append((self.selection.layer, self.selection.token))
            return super().content()

    class Still(RouterView):
        def content(self):
            drawn.append("router")
            return super().content()

    drawn: list[Any] = []
    selection = Selection()
    lens, _ = Watched(moment, selection), Still(moment, selection)
    assert drawn == [(0, 0), "router"]
    chosen = {**selection.shared, "token": 4, "layer": 2, "seq": selection.shared["seq"] + 1}
    lens.board.set_state({"selection": chosen})  # what a browser sends
    assert drawn[2:] == [(2, 4)]
    selection.head = 1
    assert len(drawn) == 3
    lens.moment = Moment(model, model.prompt("a"))  # of fewer tokens
    assert drawn[3:] == [(2, 1)]


def test_views_that_wait_for_their_turn_say_so(model):
    app, told = LabApp(model, TEXT, shown=["router", "lens"]), []
    for name in ("router", "lens"):
        board = app.views[name].board
        board.observe(lambda change, name=name: told.append((name, change["new"])), "busy")
    app.run("word " * 300)
    assert told == [
        ("router", "drawing …"), ("lens", "drawing …"), ("router", ""), ("lens", ""),
    ]  # fmt: skip


def test_an_interrupt_marks_what_is_behind(model, monkeypatch):
    app = LabApp(model, TEXT, shown=["router", "attention", "lens", "ablate"])
    app.compare("two")
    old = app.views["lens"].board.content
    assert app.difference is not None
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AttentionView, "content", Mock(side_effect=KeyboardInterrupt))
        app.run("word " * 300)
    views = [*app.views.values(), app.difference, *app.beside.values()]
    behind = ["interrupted: run the prompt again to draw this"] * (len(views) - 1)
    assert [view.board.problem for view in views] == ["", *behind]
    assert {view.board.busy for view in views} == {""}
    assert app.bar.text.value == app.prompt == "word " * 300
    app.selection.token = 250  # outside of what is drawn there
    board = app.views["attention"].board
    board._handle_custom_msg({"region": {"panel": "map", "x": [0, 9], "y": [0, 9]}}, [])
    assert board.finer["count"] == 1 and board.finer["arrays"] == {}  # nothing of the new prompt
    assert [view.board.problem for view in views] == ["", *behind]
    assert {view.board.summary for view in views[1:]} == {""}
    assert app.views["lens"].board.content is old
    kept = app.recording().states
    assert [bool(kept[name]["content"]["panels"]) for name in ("router", "lens")] == [True, False]
    app.bar.text._handle_custom_msg({"again": True}, [])  # Run
    assert {view.board.problem for view in views} == {""}
    assert {view.moment for view in app.views.values()} == {app.moment}
    app.selection.token = 3
    assert "After token 3 " in app.views["lens"].board.summary


def heeded(content):
    """Return a view's content, during which the kernel is interrupted."""
    return lambda view: (slices._hear(), content(view))[1]


def test_an_interrupt_between_cells_ends_what_is_drawn(model, monkeypatch):
    app = LabApp(model, TEXT, shown=["router", "attention", "lens"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AttentionView, "content", heeded(AttentionView.content))
        app.run("one two three")
    behind = ["interrupted: run the prompt again to draw this"] * 2
    assert [view.board.problem for view in app.views.values()] == ["", *behind]
    app.run("one two")
    assert {view.board.problem for view in app.views.values()} == {""}


def test_an_interrupt_leaves_the_loop_that_draws_behind_a_slider(model, monkeypatch):
    async def drag() -> None:
        app = LabApp(model, TEXT, shown=["ablate", "attention", "lens"])
        attention, lens, ablate = (app.views[n] for n in ("attention", "lens", "ablate"))
        with monkeypatch.context() as patched:
            patched.setattr(AttentionView, "content", heeded(AttentionView.content))
            ablate.edits = (E.SkipLayer(1),)
            while not lens.board.problem:
                await asyncio.sleep(0.01)
        assert "interrupted" in attention.board.problem
        ablate.edits = ()
        while lens.board.problem:
            await asyncio.sleep(0.01)

    asyncio.run(drag())


def test_measuring_is_stopped_by_an_interrupt(moment, monkeypatch):
    view = ExpertsView(moment, domains={"a": TEXT * 90, "b": TEXT * 90})
    monkeypatch.setattr(view, "_texts", lambda: (slices._hear(), view._domains)[1])
    with pytest.raises(KeyboardInterrupt):
        view.measure()
    assert view.board.summary == "Stopped: the kernel was interrupted."
    assert view.state()["content"]["panels"]


def test_a_control_draws_what_an_interrupt_left(model, monkeypatch):
    app = LabApp(model, TEXT, shown=["router", "attention"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RouterView, "content", Mock(side_effect=KeyboardInterrupt))
        app.run("one two three")
    view: Any = app.views["attention"]
    view._pooling.value = "mean"
    assert view.board.problem == "" and view.board.content.axes["query"].size == 4
    app.shown = ("attention",)
    app.shown = ("attention", "router")
    assert app.views["router"].board.content.axes["token"].size == 4


def test_a_view_alone_draws_anew_what_an_interrupt_left(moment, monkeypatch):
    view = AttentionView(moment)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(AttentionView, "content", Mock(side_effect=KeyboardInterrupt))
        view.selection.layer = 3
    assert "interrupted" in view.board.problem
    view.selection.token = 2  # else only turned, in the browser
    assert view.board.problem == "" and "layer 3" in view.board.summary


def test_the_begin_is_not_kept_where_it_was_alone(model):
    app = LabApp(model, TEXT, shown=["router"])
    found = []
    for prompt in ("", TEXT, "one two three"):
        app.run(prompt)
        found.append(app.selection.token)
        app.selection.token = len(app.moment.tokens) - 1
    assert found == [0, 1, len(app.moment.tokens) - 1]
    app.selection.token = 2
    app.run(TEXT)
    assert app.selection.token == 2


def test_the_page_holds_everything_it_needs(moment):
    view = RouterView(moment)
    text = page_of([view.board.state()], "A title")
    states = text.split('id="states">')[1].split("</script>")[0]
    own = text.replace(states, "")  # packed letters may spell anything
    assert "{{" not in own.replace("${{", "")
    assert {*re.findall(r"https?://[^\s\"'`]+", own)} == {"http://www.w3.org/2000/svg"}
    packed = gzip.decompress(base64.b64decode(states))
    end = 4 + int.from_bytes(packed[:4], "little")
    (state,) = unflat(packed[4:end], packed[end:])
    assert state["content"]["axes"]["token"]["size"] == len(moment.tokens)
    assert state["content"]["arrays"] == view.board.content.arrays


def test_stills_show_every_view_without_a_browser(moment):
    view = RouterView(moment)
    view.selection.layer = 2
    chosen: Any = view.figure().data[0]
    assert np.array_equal(chosen.z, moment.clean(routing_of).expert[..., 0])
    bundle = view._repr_mimebundle_()
    assert bundle["text/plain"].startswith("Router: layer")
    assert bundle["image/svg+xml"].count("<image") == 3


def test_the_lab_says_what_it_shows_without_a_browser(model, tmp_path):
    app = LabApp(model, TEXT, shown=["router", "lens"])
    app.compare("two")
    app.selection.token = 2
    lines = app._repr_mimebundle_()["text/plain"].splitlines()
    whose = ["Difference", "Router", "Router, beside: the text ‘two’", "Lens", "Lens, beside: the"]
    assert all(line.startswith(said) for line, said in zip(lines, whose, strict=True))
    assert lines[1].startswith("Router: layer 0, token 2 ")
    app.save(tmp_path / "a.lab")
    kept = LabApp.open(tmp_path / "a.lab")
    assert kept._repr_mimebundle_()["text/plain"].startswith(f"Prompt, {len(app.moment.tokens)} ")


def test_the_lab_runs_texts_and_edits(model):
    app = LabApp(model, TEXT, shown=["router"])
    assert app.views["router"].moment is app.moment
    app.edits = (E.SkipLayer(1),)
    assert app.moment.edits == (E.SkipLayer(1),)
    before = app.moment
    app.bar.text.value = "x" * 9000
    assert "shows at most 4096: shorten it" in app.bar.problem.value
    assert app.moment is before and not app.bar.text.is_busy
    with pytest.raises(ValueError, match="layer 40 is out of range"):
        app.edits = (E.SkipLayer(40),)
    app.bar.text.value = TEXT  # what was run last
    assert app.moment.tokens == before.tokens and app.bar.problem.value == ""
    app.run("two")
    assert app.bar.text.value == "two"
    assert app.moment.edits == (E.SkipLayer(1),) and len(app.moment.tokens) == 2
    assert torch.equal(app.moment.prompt.input_ids, model.prompt("two").input_ids)


def test_a_figure_of_one_low_map_can_be_drawn():
    content = Content({"y": Axis("y", 2), "x": Axis("x", 3, labels=["a", "b", "c"])})
    content.add("one", "One", np.zeros((2, 3)), ("y", "x"), sequential(0, 1))
    drawn: Any = figure(content, {}, "title")
    assert len(drawn.data) == 1


def test_a_figure_names_places_as_the_page_does():
    rows, words = ['kind "a"', "b & c"], ['"', "<b>", "d"]
    content = Content({"y": Axis("y", 2, labels=rows), "x": Axis("x", 3, "token", words)})
    content.add("one", 'Of "x"', np.zeros((2, 3)), ("y", "x"), sequential(0, 1))
    drawn: Any = figure(content, {}, 'After "')
    assert list(drawn.data[0].y) == ['kind "a"', "b &amp; c"]
    assert list(drawn.layout.xaxis.ticktext) == ['"', "&lt;b&gt;", "d"]
    assert drawn.layout.title.text == 'After "' and drawn.layout.annotations[0].text == 'Of "x"'


def test_a_legend_stands_beside_its_lines():
    content = Content({"y": Axis("y", 2), "x": Axis("x", 3)})
    content.add("one", "One", np.zeros((2, 3)), ("y", "x"), sequential(0, 1))
    series = [{"array": "two", "label": label, "colour": "#000"} for label in ("measured", "")]
    content.add(
        "two", "Two", np.zeros(3), ("x",), sequential(0, 1), kind="lines", series=series
    )  # fmt: skip
    drawn: Any = figure(content, {}, "title")
    assert drawn.layout.legend.y == drawn.layout.yaxis2.domain[1] < drawn.layout.yaxis.domain[0]
    assert [line.showlegend for line in drawn.data[1:]] == [True, False]


def test_a_figure_of_nothing_has_no_axes():
    drawn: Any = figure(Content(), {}, "press Run")
    assert drawn.layout.xaxis.visible is drawn.layout.yaxis.visible is False


def test_a_still_names_the_axes_that_have_names():
    content = Content({"y": Axis("", 1, labels=["loss"]), "x": Axis("token", 3)})
    content.add("one", "Loss", np.zeros((1, 3)), ("y", "x"), sequential(0, 1))
    assert ">Loss (token across)<" in svg(content, {}, "title")


def test_a_view_that_does_not_exist_is_named(model):
    with pytest.raises(ValueError, match="there is no view 'rooter'; choose from router, "):
        LabApp(model, TEXT, shown=["rooter"])
    app = LabApp(model, TEXT, shown="router")
    assert app.shown == ("router",)
    app.shown = "lens"
    assert app.shown == ("lens",) and app._grid.children[0].children == (app.views["lens"],)
    app.shown = ["router", "lens", "router"]
    assert app.shown == ("router", "lens") and len(app._grid.children) == 2
    app.edits = E.SkipLayer(1)
    assert app.edits == app.moment.edits == (E.SkipLayer(1),)
