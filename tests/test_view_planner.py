"""The planner shows the figures of `llama4_lab.plan`."""

import pytest
from boards import panel

import llama4_lab as l4
from llama4_lab.hardware import GPUS
from llama4_lab.plan import Plan
from llama4_widgets.moment import Moment
from llama4_widgets.views.planner import PlannerView


@pytest.fixture(scope="module")
def view():
    model = l4.load("nano")
    return PlannerView(Moment(model, model.prompt("two")))


def test_memory_and_speed_are_those_of_the_plan(view):
    view.choices["GPU"].value, view.choices["context"].value = "h200", 131072
    plan = Plan(l4.SCOUT, GPUS["h200"], weights="int4")
    needed = plan.needed(1, 131072)
    rows = dict(panel(view, "memory")["rows"])
    assert rows["weights"] == needed["weights"] / 1e9
    assert rows["together"] == pytest.approx(sum(needed.values()) / 1e9)
    note = "GB: 10⁹ bytes; its driver reports 140.4 GiB, which are 150.8 GB, and 96% of them can"
    assert panel(view, "memory")["note"].startswith(note)
    assert rows["a GPU holds"] == pytest.approx(0.96 * 150.8, rel=1e-3)
    decode = plan.decode(1, 131072).tokens_per_second
    assert panel(view, "speed")["rows"][0][1] == decode
    assert f"{decode:,.0f} tokens/s" in view.board.summary
    assert view.board.summary.startswith("It fits; the longest context is")


def test_what_gpus_exchange_is_shown_where_there_are_several(view):
    for count, columns in ((1, 4), (8, 5)):
        view.choices["GPUs"].value = count
        speed = panel(view, "speed")
        assert len(speed["columns"]) == columns
        assert all(len(row) == columns for row in speed["rows"])
        assert (speed["columns"][-1] == "exchange (ms)") == (columns == 5)


def test_a_figure_doubles_the_context_at_each_step_as_the_page_does(view):
    across = view.figure().layout.xaxis
    assert across.type == "log" and across.ticktext[:2] == ("512", "2,048")


def test_contexts_end_where_the_model_does(view):
    view.choices["GPUs"].value, view.choices["GPU"].value = 1, "h100"
    view.choices["model"].value, view.choices["context"].value = "Scout", 131072
    slider = view.choices["context"]
    assert slider.options[-1] == ("1,048,576", 2**20)
    view.choices["model"].value = "this model"
    assert [n for _, n in slider.options] == [512, 1024, 2048]
    assert slider.value == 2048
    said = (
        "It fits; the longest context is 2,048 tokens, what the model is made for. Decoding 1 row:"
    )
    assert view.board.summary.startswith(said)
    assert [*view.board.content.axes["context"].values] == [512, 1024, 2048]
    assert "prefill 2,048 tokens" in [row[0] for row in panel(view, "speed")["rows"]]
    view.choices["model"].value = "Scout"
    assert slider.options[-1] == ("1,048,576", 2**20)


def test_what_cannot_be_is_told(view):
    view.choices["GPU"].value, view.choices["weights"].value = "rtx4090", "bf16"
    assert "It does not fit; the weights leave no room for a context: " in view.board.summary
    view.choices["model"].value = "Behemoth (an estimate)"
    assert view.board.summary.startswith("AN ESTIMATE, never released: it does not fit; ")
    assert panel(view, "decode")["note"] == "it fits at no context"
    view.choices["model"].value = "this model"
    view.choices["GPUs"].value = 8
    heads = view.moment.model.config.num_key_value_heads
    assert f"8 GPUs cannot share {heads} key/value heads" in view.board.problem
