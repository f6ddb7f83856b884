"""The lab's view of pictures shows what the library says of image tokens, in their places."""

import asyncio
import base64
import io
import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.attention import keys_and_queries
from llama4_lab.analysis.routing import routing_of
from llama4_lab.analysis.vision import (
    causal_map,
    experts_of,
    from_text,
    masking_effects,
    patches_of,
)
from llama4_lab.train.scenes import World, sample
from llama4_widgets.moment import Moment
from llama4_widgets.selection import Selection
from llama4_widgets.still import unpack
from llama4_widgets.views.image import ImageView
from llama4_widgets.words import visible


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


def asked(model, task="colour", tiles=(1, 1), edits=()):
    example = sample(np.random.default_rng(3), task, World(tiles=tiles))
    boxes = [(*thing.box, str(thing)) for thing in example.scenes[0].objects]
    prompt = model.prompt(example.question, example.images)
    return Moment(model, prompt, edits, pictures=example.images, boxes=boxes), example


def panels(view):
    return {panel["name"]: panel for panel in view.board.content.panels}


def cells(view, panel, **picked):
    """The numbers of a panel as they lie on the picture."""
    array = view.board.content.arrays[panel["array"]]
    values = unpack(array)
    for name, index in picked.items():
        values = np.take(values, index, array["axes"].index(name))
    return values[np.array(panel["positions"])].reshape(panel["rows"], panel["cols"])


@pytest.mark.parametrize("tiles", [(1, 1), (2, 1)])
def test_experts_and_attention_lie_where_the_library_says(model, tiles):
    moment, _ = asked(model, tiles=tiles)
    last = len(moment.tokens) - 1
    view = ImageView(moment, Selection(layer=3, token=last))
    patches, found = patches_of(moment.prompt), panels(view)
    routing = routing_of(model, moment.prompt)
    wanted = patches.stitch(experts_of(routing, patches)[routing.row(3)])
    np.testing.assert_array_equal(cells(view, found["expert 0"]), wanted)
    shares = from_text([keys_and_queries(model, moment.prompt, 3)], patches, [last])[0, :, 0]
    for head in range(model.config.num_attention_heads):
        local = cells(view, found["attention 0"], head=head)
        np.testing.assert_allclose(10**local, patches.stitch(shares[head]), rtol=1e-3, atol=1e-7)
    assert ("attention 0 global" in found) == (patches.layout.num_tiles > 1)
    if tiles != (1, 1):
        whole = cells(view, found["attention 0 global"], head=0)
        np.testing.assert_allclose(10**whole, shares[0, -1], rtol=1e-3, atol=1e-7)
        names = [box[4] for box in found["bare 0"]["boxes"] if box[5] == "l4-tile"]
        assert names == ["tile 0", "tile 1"]


def test_a_click_on_a_patch_selects_its_token(model):
    moment, _ = asked(model, tiles=(2, 1))
    view, patches = ImageView(moment), patches_of(moment.prompt)
    axis, panel = view.board.content.axes["patch"], panels(view)["expert 0"]
    assert axis.select == "token" and axis.values is not None
    chosen = np.array(axis.values)[panel["positions"]]
    np.testing.assert_array_equal(chosen, patches.stitch(patches.position).ravel())
    view.selection.token = int(patches.position[1, 2, 3])
    assert "shows tile 1, row 2, column 3" in view.board.summary
    view.selection.token = int(patches.position[-1, 0, 5])
    assert "shows global tile, row 0, column 5" in view.board.summary


def test_tokens_that_cannot_see_the_picture_say_so(model):
    moment, _ = asked(model)
    view = ImageView(moment)  # token 0 comes before the picture
    note = panels(view)["attention 0"]["note"]
    assert note == "none of it is in sight: it comes later, or lies in another chunk"
    view.selection.token = len(moment.tokens) - 1
    assert panels(view)["attention 0"]["note"] == "of the selected head"


def test_attention_says_of_which_run_it_is_where_nothing_is_seen_too(model):
    moment, _ = asked(model)
    view = ImageView(moment.with_edits([E.SkipLayer(1)]))
    for token in (0, len(moment.tokens) - 1):  # before the picture, and behind it
        view.selection.token = token
        for run in ("clean", "edited"):
            title = panels(view)[f"attention {run} 0"]["title"]
            assert title.startswith(f"Picture: attention in layer 0 from token {token} ‘")
            assert title.endswith(f"’, {run}")


def test_tokens_around_a_picture_are_not_called_text(model):
    moment, _ = asked(model)
    view = ImageView(moment)
    for word, kind in (("<|image|>", "a special token"), (moment.words[-1], "text")):
        view.selection.token = moment.words.index(word)
        assert view.board.summary.endswith(f"‘{word}’ is {kind}")


def test_the_picture_is_what_the_model_sees_and_boxes_are_where_they_were(model):
    moment, example = asked(model, tiles=(2, 1))
    panel = panels(ImageView(moment))["bare 0"]
    kind, data = panel["source"].split(",")
    assert kind == "data:image/png;base64"
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(drawn, example.images[0])  # whole tiles: nothing is resized
    assert (panel["width"], panel["height"]) == (48, 96)
    boxes = [box for box in panel["boxes"] if box[5] == ""]
    assert boxes == [[*thing.box, str(thing), ""] for thing in example.scenes[0].objects]


def test_a_large_picture_is_sent_small(model):
    noise = np.random.default_rng(0).integers(0, 256, (190, 190, 3), dtype=np.uint8)
    view = ImageView(Moment(model, model.prompt("What is it?", [noise])))
    message = view.board.content.message()
    data = sum(len(array["data"]) for array in message["arrays"].values())
    text = json.dumps(message, default=lambda _: "", ensure_ascii=False)
    assert data + len(text.encode()) < 300_000
    assert panels(view)["bare 0"]["source"].startswith("data:image/jpeg")


def test_frames_lie_side_by_side(model):
    moment, example = asked(model, "motion")
    view = ImageView(moment)
    found = [name for name in panels(view) if name.startswith("bare")]
    assert found == [f"bare {i}" for i in range(len(example.images))]
    assert view.board.summary.startswith("3 pictures: each 48 × 48 pixels in 1 × 1 tiles; token")
    second = patches_of(moment.prompt, 1)
    axis, panel = view.board.content.axes["patch"], panels(view)["bare 1"]
    chosen = np.array(axis.values)[panel["positions"]]
    np.testing.assert_array_equal(chosen, second.position.ravel())
    assert panel["boxes"] == [] and panels(view)["bare 0"]["boxes"]


def test_a_prompt_without_picture_says_how_to_give_one(model):
    view = ImageView(Moment(model, model.prompt("two times two")))
    assert view.board.summary.startswith(
        "this prompt has no picture: in the lab press Picture or Scene above, or give one in code"
    )
    assert not view.board.content.panels
    view.work.begin.click()
    assert view.board.problem == ""  # nor says it twice
    assert not view.work.begin.disabled


def test_masking_shows_the_librarys_causal_map(model):
    moment, _ = asked(model)
    view = ImageView(moment)
    assert "effect 0" not in panels(view)
    view.work.begin.click()  # no loop runs in a test: it computes at once
    prompt = moment.prompt
    answer = [int(model(prompt.input_ids, prompt.pixel_values)[0, -1].argmax())]
    effects = partial(masking_effects, model, prompt, answer)
    wanted = causal_map(patches_of(prompt), effects)
    panel = panels(view)["effect 0"]
    np.testing.assert_allclose(cells(view, panel), wanted, atol=1e-4)
    assert f"‘{visible(model.tokenizer.decode(answer))}’ lost when" in panel["note"]
    assert panel["scale"]["high"] == pytest.approx(abs(wanted).max(), abs=1e-4)
    assert view.board.busy == "" and not view.work.begin.disabled
    view.moment = moment.with_edits([E.SkipLayer(1)])
    assert "effect 0" not in panels(view)  # it was of another run


def test_masking_can_be_cancelled(model, monkeypatch):
    view = ImageView(asked(model)[0])
    told = []
    view.board.observe(lambda change: told.append(change["new"]), "busy")

    async def press():
        view.work.begin.click()
        while not told:
            await asyncio.sleep(0)
        assert view.work.begin.disabled and not view.work.stop.disabled
        view.work.stop.click()
        await asyncio.sleep(0.02)

    asyncio.run(press())
    assert told[0] == "masking patches: 0 of 36 …" and told[-1] == ""
    assert not view.work.begin.disabled and view.work.stop.disabled
    assert "effect 0" not in panels(view) and not view.board.problem


def test_edits_show_the_attention_of_both_runs(model):
    edits = (E.SkipLayer(1),)
    moment, _ = asked(model, edits=edits)
    last = len(moment.tokens) - 1
    view, patches = ImageView(moment, Selection(layer=3, token=last)), patches_of(moment.prompt)

    def shares():
        return from_text([keys_and_queries(model, moment.prompt, 3)], patches, [last])[0, :, 0]

    clean = shares()
    with E.edited(model, edits):
        changed = shares()
        routing = routing_of(model, moment.prompt)
    by_head = abs(changed - clean).max(axis=(1, 2, 3))
    head = int(by_head.argmax())
    assert by_head[head] > 1e-3
    for run, wanted in (("clean", clean[head]), ("edited", changed[head])):
        found = cells(view, panels(view)[f"attention {run} 0"], head=head)
        np.testing.assert_allclose(10**found, patches.stitch(wanted), rtol=1e-3, atol=1e-7)
    chosen = patches.stitch(experts_of(routing, patches)[routing.row(3)])
    np.testing.assert_array_equal(cells(view, panels(view)["expert 0"]), chosen)


def test_a_tile_that_is_out_of_sight_says_so_by_itself(model):
    moment, _ = asked(model, tiles=(2, 1))
    view = ImageView(moment)
    first = patches_of(moment.prompt, 0).position
    view.selection.token = int(first[0].max())  # behind the first tile, before the global one
    shown = panels(view)
    assert shown["attention 0"]["note"] == "of the selected head"
    assert shown["attention 0 global"]["note"].startswith("none of it is in sight")
    view.work.begin.click()
    assert "the patch, in the global tile too, is" in panels(view)["effect 0"]["note"]


def test_without_a_tokenizer_the_answer_is_a_number(model):
    moment, _ = asked(model)
    bare = model.apart()
    bare.tokenizer = None
    view = ImageView(Moment(bare, moment.prompt, pictures=moment.pictures))
    view.work.begin.click()
    answer = int(moment.replay.logits[-1].argmax())
    assert f"log-probability of ‘{answer}’ lost" in panels(view)["effect 0"]["note"]
