"""The ablate view: controls are edits, edits are shown, and what they did is the library's."""

import re
import time

import ipywidgets
import numpy as np
import pytest
import torch
import tqdm.notebook
import traitlets
from boards import panel, shown

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab import replay
from llama4_widgets.app import LabApp
from llama4_widgets.moment import Moment
from llama4_widgets.still import unpack
from llama4_widgets.views.ablate import AblateView

TEXT = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def view(model):
    return AblateView(Moment(model, model.prompt(TEXT)))


def control(view, text):
    """Find the control that is shown under a name."""
    shown = [c.widget for c in view._controls if c.widget.layout.display != "none"]
    return next(widget for widget in shown if widget.description == text)


def test_switches_and_sliders_are_edits_of_the_selected_layer(view):
    view.selection.layer = 1
    control(view, "skip layer").value = True
    control(view, "router temperature").value = 2.0
    control(view, "top-k").value = 2
    assert view.edits == (E.SkipLayer(1), E.RouterTemperature(1, 2.0), E.TopK(1, 2))
    control(view, "router temperature").value = 3.0  # replaces, in the same place of meaning
    assert E.RouterTemperature(1, 3.0) in view.edits and len(view.edits) == 3
    control(view, "router temperature").value = 1.0  # the usual value is no edit
    control(view, "skip layer").value = False
    assert view.edits == (E.TopK(1, 2),)
    view.selection.layer = 2
    assert control(view, "top-k").value == 1  # another layer's own
    view.selection.layer = 1
    assert control(view, "top-k").value == 2
    assert view.edits == (E.TopK(1, 2),)


def test_only_what_a_layer_can_have_is_offered(view, model):
    config = model.config
    rope = next(i for i in range(4) if config.uses_rope(i))
    nope = next(i for i in range(4) if not config.uses_rope(i))
    for layer, offered, missing in ((rope, "NoPE", "RoPE"), (nope, "RoPE", "NoPE")):
        view.selection.layer = layer
        control(view, offered)
        with pytest.raises(StopIteration):
            control(view, missing)


def test_no_mlp_is_offered_where_there_is_one(model):
    config = model.config.replace(interleave_moe_layer_step=2, moe_layers=None)
    mixed = l4.random(config)
    mixed.build_prompt, mixed.tokenizer = model.build_prompt, model.tokenizer
    view = AblateView(Moment(mixed, mixed.prompt(TEXT)))
    for layer in range(config.num_hidden_layers):
        view.selection.layer = layer
        if config.is_moe(layer):
            with pytest.raises(StopIteration):
                control(view, "no MLP")
            control(view, "routed experts ×").value = 0.0
        else:
            control(view, "no MLP").value = True
    assert len(view.edits) == config.num_hidden_layers and view.board.problem == ""


def test_a_slider_shows_a_value_between_its_steps(view, model):
    view._set([E.Scale("layers.0.attn.out", 0.55), E.RouterTemperature(0, 7.0)])
    for name, value in (("attention ×", 0.55), ("router temperature", 7.0)):
        assert control(view, name).value == value and control(view, name).label == f"{value:g}"
    control(view, "attention ×").value = 0.6
    assert view.edits == (E.RouterTemperature(0, 7.0), E.Scale("layers.0.attn.out", 0.6))
    view.selection.layer = next(i for i in range(4) if not model.config.uses_rope(i))
    view._set([E.AttentionTemperature(view.selection.layer, floor_scale=64)])  # scale as it is
    assert control(view, "temperature tuning").value == model.config.attn_scale


def test_every_control_has_a_tip(view):
    assert all(control.widget.tooltip for control in view._controls)


def test_edits_that_change_nothing_say_so(model):
    view = AblateView(Moment(model, model.prompt("two times two")))
    config = model.config
    nope = next(i for i in range(4) if not config.uses_rope(i))
    view._set([E.Chunk(nope, 128)])
    assert view.board.summary.endswith(
        "change nothing in this prompt: it is no longer than a chunk."
    )
    view._set([E.AttentionTemperature(nope, 1.0)])
    assert view.board.summary == "These edits change nothing in this prompt."
    view._set([E.SkipLayer(nope)])
    assert view.board.summary.startswith("KL from the clean run")


def test_rounding_is_no_change(model):
    moment = Moment(model, model.prompt("two times two"))
    for found in (moment.edited_run.effect.kl, moment.edited_run.effect.loss_change):
        found[-1] = -2e-7  # as of the same computed anew
    view = AblateView(moment)
    assert panel(view, "kl")["note"].endswith("strongest: 0 nats")
    assert not shown(view, "kl").any() and not np.nan_to_num(shown(view, "loss")).any()


def test_bytes_of_a_character_are_shown_as_bytes(model):
    moment = Moment(model, model.prompt(TEXT))
    broken = next(i for i in range(512) if model.tokenizer.token_text(i).startswith("\\x"))
    moment.replay.logits[:, broken] = 99.0
    rows = AblateView(moment).board.content.panels[-1]["rows"]
    assert model.tokenizer.token_text(broken) in [row[0] for row in rows]


def test_what_is_shown_is_the_edited_model(view, model):
    view.edits = (E.AblateAttention(1), E.RemoveTokens((2,)))
    with E.edited(model, view.edits), torch.no_grad():
        edited = model(view.moment.prompt.input_ids)[0].log_softmax(-1)
    with torch.no_grad():
        clean = model(view.moment.prompt.input_ids)[0].log_softmax(-1)
    kl = (edited.exp() * (edited - clean)).sum(-1), (clean.exp() * (clean - edited)).sum(-1)
    shown = unpack(view.board.content.arrays["kl"])
    assert min(abs(shown - each.numpy()).max() for each in kl) < 1e-4
    view.selection.token = 4
    table = next(panel for panel in view.board.content.panels if panel["kind"] == "table")
    best = clean[4].exp().maximum(edited[4].exp()).topk(6).values
    assert max(float(row[1]) for row in table["rows"]) == pytest.approx(
        100 * float(clean[4].exp().max()), abs=0.06
    )
    assert len(table["rows"]) == len(best)
    assert view.board.summary.startswith("KL from the clean run")


def test_a_dragged_slider_stays_the_same_widget(view):
    slider = control(view, "attention ×")
    slider.value = 0.5
    view.selection.token = 3
    slider.value = 0.2
    assert control(view, "attention ×") is slider
    assert view.edits == (E.Scale("layers.0.attn.out", 0.2),)


def test_a_dragged_slider_makes_no_widgets(view, monkeypatch):
    monkeypatch.setattr(replay, "tqdm", tqdm.notebook.tqdm)  # as in a notebook
    view.selection.layer = 1
    control(view, "attention ×").value = 0.5
    with monkeypatch.context() as patch:
        patch.setattr(ipywidgets.Widget, "open", lambda widget: pytest.fail(f"made {widget}"))
        control(view, "attention ×").value = 0.2


def test_the_code_that_is_shown_runs(view):
    moment = view.moment
    view.edits = (E.AblateHead(1, 0, how="mean"), E.SkipLayer(2))
    code = re.sub("<.*?>", "", view._code.value)
    exec(code, {"l4": l4, "model": moment.model, "prompt": moment.prompt})


def test_undo_clear_and_text(view):
    control(view, "skip layer").value = True
    control(view, "no attention").value = True
    top, *_ = view.children[1].children[1:]  # undo, beside the name of the layer
    top.click()
    assert view.edits == (E.SkipLayer(0),)
    assert not control(view, "no attention").value
    view._text.value = E.dumps([E.Chunk(2, 8)])
    view.apply_text()
    assert view.edits == (E.Chunk(2, 8),)
    assert "[l4.edits.Chunk(layer=2, size=8)]):\n    model(**prompt)</pre>" in view._code.value
    for typed, wrong in (
        ('[{"edit": "Skip"}]', "unknown edit 'Skip'"),
        (E.dumps([E.SkipLayer(40)]), "layer 40 is out of range"),
    ):
        view._text.value = typed
        view.apply_text()
        view.selection.token += 1
        assert view._text.value == typed and view.edits == (E.Chunk(2, 8),)
        view.apply_text()
        assert wrong in view.board.problem


@pytest.mark.parametrize("edits", [[], [E.SkipLayer(1)]])
def test_what_was_wrong_with_a_text_is_gone_with_it(view, edits):
    view._set(edits)
    undo, clear = view.children[1].children[1:]

    def apply(text):
        view._text.value = text
        view.apply_text()

    for go_back in (lambda: apply(E.dumps(view.edits)), clear.click, undo.click):
        apply("nonsense")
        assert "must be JSON" in view.board.problem
        go_back()
        assert view.board.problem == ""


def test_one_drag_of_a_slider_is_one_step_back(view, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def drag(name, *values):
        for value in values:
            control(view, name).value = value

    drag("attention ×", 0.8, 0.5, 0.3)
    drag("router temperature", 2.0, 3.0)
    now += 5
    drag("router temperature", 2.0, 1.5)
    steps = []
    for _ in range(4):
        view.undo()
        steps.append(view.edits)
    slower, hotter = E.Scale("layers.0.attn.out", 0.3), E.RouterTemperature(0, 3.0)
    assert steps == [(slower, hotter), (slower,), (), ()]
    drag("attention ×", 0.8)
    view.undo()
    drag("attention ×", 0.5, 0.4)  # soon after, but of its own
    view.undo()
    assert view.edits == ()
    control(view, "skip layer").value = True
    control(view, "skip layer").value = False
    view.undo()
    assert view.edits == (E.SkipLayer(0),)  # a switch is no slider


def test_undo_takes_back_what_others_changed_too(model):
    app = LabApp(model, TEXT, shown=["ablate", "counterfactual"])
    view = app.views["ablate"]
    control(view, "skip layer").value = True
    app.views["counterfactual"].add_route()
    app.edits = (*app.edits, E.TopK(1, 2))
    steps = []
    for _ in range(4):
        view.undo()
        steps.append(len(app.edits))
    assert steps == [2, 1, 0, 0]


def test_what_a_shorter_prompt_cannot_have_is_not_undone(view, model):
    view._set([E.RemoveTokens((9,))])
    view._set([])
    view.moment = Moment(model, model.prompt("two"))
    for _ in range(2):  # it stays to be taken back
        view.board.problem = ""
        view.undo()
        assert "there is no token 9" in view.board.problem and view.edits == ()


def test_an_impossible_edit_changes_nothing_and_is_explained(view):
    with pytest.raises((ValueError, traitlets.TraitError), match="layer 40 is out of range"):
        view.edits = (E.SkipLayer(40),)
    assert view.edits == () and view.moment.edits == ()
    count = view.moment.model.config.num_local_experts
    view._set([E.DropExpert(0, i) for i in range(count)])
    assert f"{count} of {count} experts dropped" in view.board.problem
    assert view.edits == ()


def test_the_lab_computes_an_edit_once_for_all_views(model, monkeypatch):
    app = LabApp(model, TEXT, shown=["router", "ablate"])
    counted = []
    for view in app.views.values():
        content = view.content
        monkeypatch.setattr(
            view, "content", lambda content=content, view=view: counted.append(view) or content()
        )
    control(app.views["ablate"], "skip layer").value = True
    assert app.edits == (E.SkipLayer(0),)
    assert app.views["router"].moment is app.views["ablate"].moment is app.moment
    assert len(counted) == 2
    arrays = app.views["router"].board.content.arrays
    assert (unpack(arrays["chosen"]) != unpack(arrays["clean chosen"]))[1:].any()
    app.edits = ()
    assert not control(app.views["ablate"], "skip layer").value


def test_of_several_edits_of_a_kind_controls_show_the_one_that_holds(model):
    edits = [E.TopK(1, 2), E.TopK(1, 4), E.Rope(1, False), E.Rope(1, True)]
    view = AblateView(Moment(model, model.prompt(TEXT), edits))
    view.selection.layer = 1
    assert control(view, "top-k").value == 4
    assert not control(view, "NoPE").value  # the last one turned it on again
    twice = [E.Scale("layers.1.attn.out", 0.5), E.Scale("layers.1.attn.out", 0.5)]
    view.moment = view.moment.with_edits([*twice, E.RouterTemperature(1, 2.0)] * 2)
    assert control(view, "attention ×").value == 0.0625
    assert control(view, "router temperature").value == 4.0
    one_token = E.RouterTemperature(1, 3.0, tokens=(2,))
    view.moment = view.moment.with_edits([one_token])
    assert control(view, "router temperature").value == 1.0  # it is not the layer's
    control(view, "router temperature").value = 2.0
    assert view.edits == (one_token, E.RouterTemperature(1, 2.0))


def test_what_is_hidden_from_nobody_changes_nothing(model):
    last = len(model.prompt(TEXT).tokens) - 1
    view = AblateView(Moment(model, model.prompt(TEXT), [E.RemoveTokens((last,))]))
    assert view.board.summary == "These edits change nothing in this prompt."
    view.moment = view.moment.with_edits([E.Chunk(0, 4096)])
    assert view.board.summary.endswith("it is no longer than a chunk.")


def test_the_loss_before_an_edit_is_as_it_was(model):
    moment = Moment(model, model.prompt(TEXT), [E.SkipLayer(2, tokens=(5,))])
    loss = unpack(AblateView(moment).board.content.arrays["loss"])[0]
    assert (loss[:5] == 0).all() and loss[5] != 0
    assert loss[-1] != loss[-1]  # nothing follows the last token


def test_numbers_beyond_float32_are_told_in_words(model):
    view = AblateView(Moment(model, model.prompt(TEXT), [E.Scale("logits", 1e39)]))
    assert view.board.summary.startswith("Edits make logits that are no numbers")


def test_one_thing_is_told_in_the_singular(model):
    moment = Moment(model, model.prompt(TEXT))
    last = len(moment.tokens) - 1
    alone = moment.with_edits([E.SkipLayer(3, tokens=(last,))]).edited_run.effect
    assert f"nats at token {last}; top token changed at" in str(alone)
    assert "mean" not in str(alone) and str(alone).endswith("; 1 routing flip")


def test_a_view_that_stands_alone_brings_the_rules_of_its_controls(view):
    # Without them a slider beside others has a track of no width.
    assert "l4-app-chips" in view._rows.children[1]._dom_classes
    assert ".l4-app-chips { flex-flow: row wrap;" in view.board._css
