"""The ablate view: controls are edits, edits are shown, and what they did is the library's."""

import pytest
import torch
import traitlets

import llama4_lab as l4
from llama4_lab import edits as E
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
    assert view.board.summary.startswith("KL to the clean run")


def test_a_dragged_slider_stays_the_same_widget(view):
    slider = control(view, "attention ×")
    slider.value = 0.5
    view.selection.token = 3
    slider.value = 0.2
    assert control(view, "attention ×") is slider
    assert view.edits == (E.Scale("layers.0.attn.out", 0.2),)


def test_undo_clear_and_text(view):
    control(view, "skip layer").value = True
    control(view, "no attention").value = True
    view.undo()
    assert view.edits == (E.SkipLayer(0),)
    assert not control(view, "no attention").value
    view._text.value = E.dumps([E.Chunk(2, 8)])
    view.apply_text()
    assert view.edits == (E.Chunk(2, 8),)
    assert "l4.edits.Chunk(layer=2, size=8)" in view._code.value
    view._text.value = '[{"edit": "Skip"}]'
    view.apply_text()
    assert "unknown edit 'Skip'" in view.board.problem and view.edits == (E.Chunk(2, 8),)


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
