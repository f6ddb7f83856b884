"""What a view sends to the browser is small at any length, and comes for what is selected."""

import json
from typing import Any

import numpy as np
import pytest

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_widgets.board import Board
from llama4_widgets.moment import Moment
from llama4_widgets.panels import Axis, Content, diverging
from llama4_widgets.selection import Selection
from llama4_widgets.still import unpack
from llama4_widgets.views import VIEWS

MOST = 300_000  # bytes of an update
LENGTH = 4096  # tokens, the most that the lab shows
SLOWER = ("experts", "lens", "ablate", "attention")


def num_bytes(state: Any) -> int:
    """Count what goes over the wire: JSON, and arrays beside it."""
    arrays = []

    def aside(data: bytes) -> None:
        arrays.append(len(data))

    return len(json.dumps(state, default=aside).encode()) + sum(arrays)


@pytest.fixture(scope="module")
def moment() -> Moment:
    """A prompt of the greatest length in a narrow model with as many layers and experts as mini."""
    mini = l4.load("mini")
    narrow = {
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 16,
        "intermediate_size_mlp": 16,
    }
    model = l4.random(mini.config.replace(**narrow, vision_config=None))
    model.tokenizer, model.build_prompt = mini.tokenizer, mini.build_prompt
    text = "Der alte Mann sah auf das Meer. for i in range(9): print(i) 12 + 7 = 19 " * 400
    ids = mini.tokenizer.encode(text)[: LENGTH - 1]
    prompt = model.prompt(mini.tokenizer.decode(ids))
    return Moment(model, prompt)


@pytest.mark.parametrize("edits", [(), (E.SkipLayer(6),)], ids=["clean", "edited"])
@pytest.mark.parametrize(
    "name",
    ["router", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)],
)
def test_an_update_is_small_at_the_greatest_length(moment, name, edits):
    view = VIEWS[name](moment.with_edits(edits), Selection(layer=3, token=LENGTH // 2))
    assert len(moment.tokens) == LENGTH
    assert view.board.problem == "" and view.board.content.panels
    sent = num_bytes(view.board.get_state(["content", "pages", "summary"]))
    assert 20_000 < sent <= MOST


def paged(selection: Selection) -> tuple[np.ndarray, Board]:
    values = np.random.default_rng(0).normal(size=(3, 90, 70))
    axes = {"layer": Axis("layer", 3, "layer", values=[1, 4, 9])}
    content = Content(axes | {"y": Axis("y", 90), "x": Axis("x", 70)})
    content.add("map", "Map", values, ("layer", "y", "x"), diverging(3), paged=True)
    return values, Board(selection, content=content)


def received(board: Board, page: int) -> np.ndarray:
    """Put together what a browser has of one page."""
    array = board.get_state("content")["content"]["arrays"]["map"]
    part = board.get_state("pages")["pages"]["map"]
    assert "data" not in array and part["page"] == page
    return unpack(array | {"shape": array["shape"][1:], "data": part["data"]})


def test_a_large_array_comes_in_parts_for_what_is_selected():
    selection = Selection(layer=4)
    values, board = paged(selection)
    whole = unpack(board.content.arrays["map"])
    assert np.nanmax(abs(whole - values)) < 0.03
    np.testing.assert_array_equal(received(board, 1), whole[1])
    chosen = {**selection.shared, "layer": 9, "seq": selection.shared["seq"] + 1}
    board.set_state({"selection": chosen})  # what a browser sends
    np.testing.assert_array_equal(received(board, 2), whole[2])
    selection.layer = 1
    np.testing.assert_array_equal(received(board, 0), whole[0])
    board.content = Content()
    assert board.pages == {}


def test_a_part_is_sent_once():
    selection = Selection(layer=4)
    _, board = paged(selection)
    sent = []
    board.observe(lambda change: sent.append(change["new"]["map"]["page"]), "pages")
    selection.token = 3
    assert sent == []
    selection.layer = 9
    assert sent == [2]


def test_a_kept_board_holds_every_part():
    _, board = paged(Selection())
    array = board.state()["content"]["arrays"]["map"]
    assert len(array["data"]) == 3 * 90 * 70


def test_small_arrays_are_sent_whole():
    content = Content({"layer": Axis("layer", 3, "layer"), "x": Axis("x", 70)})
    content.array("row", np.zeros((3, 70)), ("layer", "x"), paged=True)
    assert "data" in content.message(is_whole=False)["arrays"]["row"]
    assert content.pages({"layer": 1}) == {}


@pytest.mark.parametrize("values", [[-1, 3, 253], [0, 128], [[True, False]], [0, -254]])
def test_whole_numbers_of_a_small_range_take_one_byte_each(values):
    packed = Content({"x": Axis("x", 3)})
    packed.array("one", np.array(values), ("x",) * np.ndim(values))
    array = packed.arrays["one"]
    assert len(array["data"]) == np.size(values)
    np.testing.assert_array_equal(unpack(array), values)


def test_whole_numbers_of_a_wide_range_stay_exact():
    packed = Content({"x": Axis("x", 3)})
    packed.array("one", np.array([-1, 254, 9000]), ("x",))
    np.testing.assert_array_equal(unpack(packed.arrays["one"]), [-1, 254, 9000])
