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
from llama4_widgets.views import VIEWS, router

MOST = 300_000  # bytes of an update
LENGTH = 4096  # tokens, the most that the lab shows
SLOWER = ("experts", "lens", "ablate", "attention")


def num_bytes(state: Any) -> int:
    """Count what goes over the wire: JSON, and arrays beside it."""
    arrays = []

    def aside(data: bytes) -> None:
        arrays.append(len(data))

    return len(json.dumps(state, default=aside, ensure_ascii=False).encode()) + sum(arrays)


def moment_of(**sizes: Any) -> Moment:
    """Return a prompt of the greatest length in a narrow model, else of mini's sizes."""
    mini = l4.load("mini")
    narrow = {
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 16,
        "intermediate_size_mlp": 16,
    }
    model = l4.random(mini.config.replace(**narrow, **sizes, vision_config=None))
    model.tokenizer, model.build_prompt = mini.tokenizer, mini.build_prompt
    text = "Der alte Mann sah auf das Meer. for i in range(9): print(i) 12 + 7 = 19 " * 400
    ids = mini.tokenizer.encode(text)[: LENGTH - 1]
    prompt = model.prompt(mini.tokenizer.decode(ids))
    return Moment(model, prompt)


@pytest.fixture(scope="module")
def moment() -> Moment:
    return moment_of()


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_hidden_layers": 48},
        {
            "num_hidden_layers": 48,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 128,
        },
    ],
    ids=["mini", "scout", "maverick"],
)
def test_of_many_layers_or_experts_the_router_shows_the_tokens_around_the_selected_one(sizes):
    moment = moment_of(**sizes)
    layer = moment.model.config.routed_layers[1]
    for edits in [(), (E.SkipLayer(layer),), (E.TopK(layer, 8),)]:
        view = VIEWS["router"](moment.with_edits(edits), Selection(layer=layer, token=LENGTH // 2))
        sent = num_bytes(view.board.get_state(["content", "pages", "summary"]))
        assert 150_000 < sent <= MOST


def test_a_part_of_a_long_text_follows_the_selected_token(moment, monkeypatch):
    selection = Selection(layer=3, token=1000)
    whole = VIEWS["router"](moment, Selection(layer=3, token=1000)).board
    monkeypatch.setattr(router, "_WHOLE", 0)
    monkeypatch.setattr(router, "_PART", 30_000)
    view = VIEWS["router"](moment, selection)
    drawn = []
    view.board.observe(lambda change: drawn.append(change["new"].axes["token"].values), "content")
    shown = view.board.content.axes["token"].values
    assert shown is not None and len(shown) < 1000
    for token in (1001, 3000, LENGTH - 1, 0):
        selection.token = token
        axis, arrays = view.board.content.axes["token"], view.board.content.arrays
        assert axis.values is not None and axis.labels is not None
        at = axis.values.index(token)
        beyond = len(axis.values) // 4 - 1  # tokens that can be walked to on either side
        assert at >= min(beyond, token)
        assert len(axis.values) - at > min(beyond, LENGTH - 1 - token)
        assert axis.labels[at] == moment.words[token]
        for name, other in whole.content.arrays.items():
            if "token" not in other["axes"]:
                assert arrays[name] == other
                continue
            mine, all_of_them = unpack(arrays[name]), unpack(other)
            one = mine.take(at, arrays[name]["axes"].index("token"))
            # Large arrays come in 254 steps, whose width the largest number of each decides.
            np.testing.assert_allclose(
                one, all_of_them.take(token, other["axes"].index("token")), atol=0.05
            )
        notes = [panel["note"] for panel in view.board.content.panels[:2]]
        assert all(
            f"tokens {axis.values[0]} to {axis.values[-1]} of {LENGTH}" in note for note in notes
        )
    assert len(drawn) == 3  # the neighbour was there already


def paged(selection: Selection) -> tuple[np.ndarray, Board]:
    values = np.random.default_rng(0).normal(size=(3, 190, 140))
    axes = {"layer": Axis("layer", 3, "layer", values=[1, 4, 9])}
    content = Content(axes | {"y": Axis("y", 190), "x": Axis("x", 140)})
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
    assert len(array["data"]) == 3 * 190 * 140


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
