"""The lab's view of attention shows the library's patterns, whole, pooled and in regions."""

import json

import numpy as np
import pytest
import torch
from boards import shown

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.attention import (
    KeysAndQueries,
    head_summaries,
    keys_and_queries,
    rows,
    tiles,
)
from llama4_lab.model.text import temperature
from llama4_lab.prompt import Prompt, Spans
from llama4_widgets import patterns
from llama4_widgets.moment import Moment
from llama4_widgets.patterns import Layer
from llama4_widgets.selection import Selection
from llama4_widgets.still import unpack
from llama4_widgets.views import attention
from llama4_widgets.views.attention import AttentionView

TEXT = "The old man looked at the sea.\ndef add(a, b):\n    return a + b\n12 + 7 = 19\n" * 5
CHUNK = 128


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture(scope="module")
def moment(model):
    made = Moment(model, model.prompt(TEXT))
    assert CHUNK < len(made.tokens) < 2 * CHUNK
    return made


@pytest.fixture
def is_long(monkeypatch):
    monkeypatch.setattr(attention, "_WHOLE", 0)


def panels(view):
    return {panel["name"]: panel for panel in view.board.content.panels}


def pattern(model, prompt, layer):
    with torch.no_grad(), l4.trace(model, f"layers.{layer}.attn.pattern") as cache:
        model(**prompt)
    return cache[f"layers.{layer}.attn.pattern"][0].numpy()


def close(found, wanted):
    """Shares behind the steps of a logarithmic scale, which are some 3 per cent."""
    np.testing.assert_allclose(10.0**found, wanted, rtol=0.16, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_short_prompt_has_every_head_and_row_in_the_browser(model, moment, layer):
    view = AttentionView(moment, Selection(layer=layer))
    wanted, count = pattern(model, moment.prompt, layer), len(moment.tokens)
    query, key = np.indices((count, count))
    allowed = (key <= query) & ((query // CHUNK == key // CHUNK) | (layer == 3))
    for name in ("map", "row"):
        found = shown(view, name)
        np.testing.assert_array_equal(np.isfinite(found), np.broadcast_to(allowed, found.shape))
        close(found[:, allowed], wanted[:, allowed])
    assert panels(view)["map"]["borders"] == [[0, CHUNK], [CHUNK, count]]
    title = "Where the selected head looks from the selected token"
    assert panels(view)["row"]["title"] == title
    before = view.board.content
    view.selection.token, view.selection.head = 140, 1
    assert view.board.content is before
    best = int(wanted[1, 140].argmax())
    assert f"head 1: token 140 ‘{moment.words[140]}’ sees" in view.board.summary
    assert f"looks most at token {best} " in view.board.summary


def test_a_token_of_a_short_edited_prompt_asks_the_kernel_for_nothing(model):
    view = AttentionView(Moment(model, model.prompt("two times two"), (E.SkipLayer(1),)))
    before = view.board.content
    view.selection.token, view.selection.head = 2, 1
    assert view.board.content is before and "head 1: token 2 " in view.board.summary


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_long_prompt_is_pooled_and_its_row_exact(model, moment, is_long, monkeypatch, layer, how):
    view = AttentionView(moment, Selection(layer=layer, head=1, token=133))
    q, k, chunk = keys_and_queries(model, moment.prompt, layer).head(1)
    row, wanted = shown(view, "row"), rows(q, k, chunk, [133])[0].numpy()
    start = CHUNK if layer == 0 else 0
    np.testing.assert_allclose(10.0 ** row[start:134], wanted[start:134], rtol=1e-4, atol=1e-7)
    assert np.isnan(row[:start]).all() and np.isnan(row[134:]).all()

    monkeypatch.setattr(AttentionView, "_side", 16)
    view._pooling.value = how
    view.selection.token = 134
    view.refresh()
    block = -(-len(moment.tokens) // 16)
    whole = tiles(q, k, chunk, block=(block, block))
    found = shown(view, "map")
    np.testing.assert_array_equal(np.isnan(found), whole.visible == 0)
    seen = whole.visible > 0
    close(found[seen], getattr(whole, how)[seen])
    name = {"max": "largest", "mean": "mean"}[how]
    assert (
        f"a cell is the {name} of {block} × {block} queries × keys" in panels(view)["map"]["note"]
    )


def test_a_region_is_read_finer_and_every_wish_is_answered(model, moment, is_long):
    view = AttentionView(moment, Selection(layer=3, head=1))
    content = view.board.content
    view._receive(None, {"region": {"panel": "map", "x": [10.4, 49.2], "y": [99.9, 140]}}, [])
    answer = view.board.finer
    assert (answer["panel"], answer["count"]) == ("map", 1)
    array = answer["arrays"]["map finer"]
    assert array["tile"] == {"y": (99, 140), "x": (10, 50)}
    q, k, _ = keys_and_queries(model, moment.prompt, 3).head(1)
    close(unpack(array), rows(q, k, None, range(99, 140))[:, 10:50].numpy())
    said = "NoPE, no chunks; dashed: chunks of RoPE layers, crossed here; every query and key"
    assert answer["notes"] == {"map": said}
    assert view.board.content is content  # only the tile travels
    view.region({"panel": "map", "x": [-3, 900], "y": [-3, 900]})
    assert view.board.finer["count"] == 2
    view.selection.token = 20  # what is drawn anew keeps the region
    tile = view.board.content.arrays["map finer"]["tile"]
    assert tile["x"] == tile["y"] == (0, len(moment.tokens)), tile
    view.region({"panel": "map", "x": [10, 50], "y": [99, 140]})
    view.selection.token = 21  # and what is said of it
    (note,) = (panel["note"] for panel in view.board.content.panels if panel["name"] == "map")
    assert note == said


def test_a_wish_that_fails_is_answered_too(moment, is_long, monkeypatch):
    view = AttentionView(moment)

    def fail(*_):
        raise ValueError("no such thing")

    monkeypatch.setattr(attention, "pooled", fail)
    view.region({"panel": "map", "x": [0, 9], "y": [0, 9]})
    assert view.board.problem == "no such thing"
    assert view.board.finer["arrays"] == {} and view.board.finer["count"] == 1


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("layer", [0, 3])
def test_where_reading_all_takes_long_a_block_shows_its_middle_query(
    model, moment, monkeypatch, layer, how
):
    kept = keys_and_queries(model, moment.prompt, layer)
    q, k, chunk = kept.head(0)
    monkeypatch.setattr(patterns, "MOST_CELLS", 1)
    found = Layer(True, chunk, None, kept)
    cells, block, is_all = patterns.pooled(found, 0, (10, 150), (4, 149), 20, how)
    assert (block, is_all, cells.shape) == ((7, 8), False, (20, 19))
    wanted = tiles(q, k, chunk, block=(1, 8), queries=(10, 150), keys=(4, 149))
    middle = slice(3, None, 7)
    seen = wanted.visible[middle] > 0
    np.testing.assert_array_equal(np.isfinite(cells), seen)
    wanted = getattr(wanted, how)[middle][seen]
    np.testing.assert_allclose(cells[seen], wanted, rtol=1e-4, atol=1e-9)


def test_heads_are_summarised_as_the_library_does(model, moment, is_long, monkeypatch):
    wanted = head_summaries(model, moment.prompt, [0, 3])
    for i, layer in enumerate([0, 3]):
        expected = np.stack(
            [wanted.distance[i], wanted.entropy[i], wanted.sink[i], wanted.crossing[i]], axis=1
        )
        for whole in (0, 10**9):
            monkeypatch.setattr(attention, "_WHOLE", whole)
            table = panels(AttentionView(moment, Selection(layer=layer)))["summaries"]
            found = np.array([row[1:] for row in table["rows"]])
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert table["choices"] == [{"head": 0}, {"head": 1}]


def test_rounding_is_no_change_in_colour(moment):
    view = AttentionView(moment.with_edits([E.SkipLayer(3)]), Selection(layer=1))
    assert panels(view)["map change"]["scale"]["high"] == 1e-3


@pytest.mark.parametrize("whole", [0, 10**9])
def test_edits_show_both_runs_and_the_change(model, moment, monkeypatch, whole):
    monkeypatch.setattr(attention, "_WHOLE", whole)
    edits = [E.SkipLayer(1), E.AttentionTemperature(3, scale=1.0)]
    view = AttentionView(moment.with_edits(edits), Selection(layer=3))
    clean = pattern(model, moment.prompt, 3)
    with E.edited(model, edits):
        changed = pattern(model, moment.prompt, 3)
    assert abs(changed - clean).max() > 0.1
    at = np.s_[:, 150, :151] if whole else np.s_[0, 150, :151]
    token = {} if whole else {"token": 150}
    for field, value in token.items():
        setattr(view.selection, field, value)
    for run, wanted in (("clean", clean), ("edited", changed)):
        found = shown(view, f"row {run}")
        close(found[:, 150, :151] if whole else found[:151], wanted[at])
    if whole:
        seen = np.tril(np.ones(clean.shape[1:], bool))
        found = shown(view, "map change")[:, seen]
        step = abs(changed - clean).max() / 100
        np.testing.assert_allclose(found, (changed - clean)[:, seen], atol=step)
    assert {"map clean", "map edited", "map change"} <= set(panels(view))
    curves = panels(view)["temperature"]["series"]
    assert [one["label"] for one in curves] == ["the model's", "edited"]
    places = torch.tensor(view.board.content.axes["position"].values)
    for one, scale in zip(curves, (model.config.attn_scale, 1.0), strict=True):
        factor = temperature(model.config.replace(attn_scale=scale), places)
        np.testing.assert_allclose(shown(view, one["array"]), factor, rtol=1e-6)


def test_only_nope_layers_have_a_temperature(moment):
    view = AttentionView(moment)
    assert "temperature" not in panels(view)
    assert panels(view)["map"]["note"].startswith("RoPE, chunks of 128 tokens")
    view._layer.value = 3
    assert view.selection.layer == 3
    last = torch.tensor([len(moment.words) - 1])
    most = float(temperature(moment.model.config, last))
    assert panels(view)["temperature"]["note"].endswith(f", {most:.3g} at the end of this prompt")
    assert panels(view)["map"]["note"].startswith("NoPE, no chunks")
    view.selection.layer = 1
    assert view._layer.value == 1


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("layer", [0, 3])
def test_edits_of_scores_show_in_long_prompts_as_well(model, moment, is_long, layer, how):
    hidden = {0: 130, 3: 90}[layer]  # to which that query looks
    edits = [E.KnockOut((50, 149), (3, hidden), layer=layer)]
    view = AttentionView(moment.with_edits(edits), Selection(layer=layer, head=1, token=149))
    view._pooling.value = how
    with E.edited(model, edits):
        expected = pattern(model, moment.prompt, layer)
    assert expected[1, 149, hidden] == 0 < pattern(model, moment.prompt, layer)[1, 149, hidden]
    seen = slice(128 if layer == 0 else 0, 150)
    close(shown(view, "row edited")[seen], expected[1, 149, seen])
    rows_of_table = panels(view)["summaries"]["rows"]
    entropy = -np.nansum(expected * np.log(np.maximum(expected, 1e-30)), axis=-1).mean(axis=-1)
    np.testing.assert_allclose([row[2] for row in rows_of_table], entropy, rtol=1e-4)
    view.selection.layer = 3 - layer  # whose scores are not changed
    with E.edited(model, edits):
        expected = pattern(model, moment.prompt, 3 - layer)
    assert view.board.problem == ""
    close(shown(view, "row edited")[128:150], expected[1, 149, 128:150])


def test_what_cannot_be_read_is_told_in_words(moment, is_long, monkeypatch):
    monkeypatch.setattr(patterns, "_MOST_BYTES", 2 * 10**5)
    view = AttentionView(moment.with_edits([E.KnockOut((20,), (3,), layer=0)]))
    assert view.board.problem == (
        "edits change the scores of layer 0, whose pattern of 176 tokens takes 0.248 MB, more than "
        "0.2: shorten the prompt, or choose another layer"
    )
    view.selection.layer = 1
    assert view.board.problem == ""


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_pattern_is_pooled_like_its_keys_and_queries(model, moment, layer, how):
    kept = keys_and_queries(model, moment.prompt, layer)
    share = torch.from_numpy(pattern(model, moment.prompt, layer))
    for queries, keys, side in (((0, 150), (0, 150), 16), ((10, 149), (4, 150), 20)):
        mine, theirs = (
            patterns.pooled(Layer(True, kept.chunk, None, each), 1, queries, keys, side, how)
            for each in (share, kept)
        )
        assert mine[1:] == theirs[1:] and mine[2]
        np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-4, atol=1e-7)
    border = model.config.attention_chunk_size
    mine, theirs = (
        patterns.glance(Layer(True, kept.chunk, None, each), border, 32) for each in (share, kept)
    )
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_rules_of_an_edited_layer_are_those_of_its_edits(moment):
    chunk = moment.model.chunks[1]
    edits = [E.Chunk(1, 8), E.Rope(1, False)]
    found = dict(patterns.attended(moment.with_edits(edits), 1, False))
    assert (found["clean"].chunk, found["clean"].uses_rope) == (chunk, True)
    assert (found["edited"].chunk, found["edited"].uses_rope) == (8, False)
    assert np.isfinite(found["edited"].row(0, 21)).nonzero()[0].tolist() == [16, 17, 18, 19, 20, 21]


def test_a_scale_of_decades_begins_at_a_tenth_of_an_even_share():
    for tokens, low in ((10, -2), (100, -3), (101, -4)):
        scale = patterns.decades(tokens)
        assert (scale["low"], scale["high"]) == (low, 0)


def test_averages_over_some_queries_lie_in_the_middle_of_all(monkeypatch):
    even = torch.zeros(2, 400, 8)  # every query looks at all keys alike
    layer = Layer(False, None, None, KeysAndQueries(3, even, even, None))
    _, every, step = patterns.glance(layer, 100, 20)
    assert step == 1
    monkeypatch.setattr(patterns, "MOST_CELLS", 1 << 13)
    _, some, step = patterns.glance(layer, 100, 20)
    assert step > 8
    np.testing.assert_allclose(every[:, 0], 399 / 4, rtol=1e-6)
    np.testing.assert_allclose(some[:, 0], every[:, 0], atol=0.3)  # tokens


@pytest.mark.parametrize("at_once", [4, 2])
@pytest.mark.parametrize("edits", [(), (E.SkipLayer(1),)])
def test_one_run_of_a_long_prompt_serves_many_layers(
    model, moment, is_long, monkeypatch, edits, at_once
):
    config = model.config
    width = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    monkeypatch.setattr(patterns, "_MOST_BYTES", at_once * 4 * width * len(moment.words))
    count, run = 0, type(model).hidden

    def hidden(*args, **given):
        nonlocal count
        count += 1
        return run(*args, **given)

    monkeypatch.setattr(type(model), "hidden", hidden)
    view = AttentionView(Moment(model, moment.prompt, edits), Selection(layer=3, token=50))
    for layer in (2, 0, 1):
        view.selection.layer = layer
    assert count == 1 + 4 // at_once  # a clean run, and again for what it is to keep
    with E.edited(model, edits):
        expected = pattern(model, moment.prompt, 1)[0, 50, :51]
    close(shown(view, "row edited" if edits else "row")[:51], expected)


@pytest.mark.parametrize("edits", [(), (E.SkipLayer(1),)])
def test_an_update_of_a_long_prompt_stays_small(model, monkeypatch, edits):
    count, config = 20_000, model.config
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, config.num_attention_heads, count, 8, generator=generator)
    kept = KeysAndQueries(3, q, k[: config.num_key_value_heads], None)
    found, runs = Layer(False, None, None, kept), ("clean", "edited") if edits else ("",)
    monkeypatch.setattr(attention, "attended", lambda *_: [(run, found) for run in runs])
    monkeypatch.setattr(patterns, "MOST_CELLS", 1 << 20)
    ids, none = torch.zeros(1, count, dtype=torch.long), torch.full((1, count), -1)
    words = [["·longword"] * count]
    spans = Spans(none, none, none, none, [], [], None)
    prompt = Prompt(ids, None, torch.ones_like(ids), words, spans)
    view = AttentionView(Moment(model, prompt), Selection(token=15_000))
    if edits:
        view.moment = view.moment.with_edits(edits)
    view.region({"panel": "map", "x": [0, 5000], "y": [9000, 14_000]})
    view.selection.token = 15_001
    assert not view.board.problem
    message = view.board.content.message()
    data = sum(len(array["data"]) for array in message["arrays"].values())
    text = json.dumps(message, default=lambda _: "", ensure_ascii=False)
    assert data + len(text.encode()) < 300_000
    assert sum(len(array["data"]) for array in view.board.finer["arrays"].values()) < 300_000
    assert "for one query in" in panels(view)["map clean" if edits else "map"]["note"]
    assert next(iter(view.board.content.axes["token"].values or [])) == 15_001 - 1024
    assert [row[0] for row in panels(view)["most"]["rows"]] == [
        str(i) for i in np.argsort(-rows(q[0], k[0], None, [15_001])[0].numpy())[:12]
    ]


def test_a_token_that_edits_hide_everything_from_sees_nothing(model):
    edit = E.KnockOut((2,), (0, 1, 2))
    view = AttentionView(Moment(model, model.prompt("def add(a, b):"), [edit]))
    view.selection.token = 2
    assert view.board.summary.endswith("sees nothing, for edits hide all of it")


def test_temperatures_of_several_edits_multiply(model, moment):
    edits = [E.AttentionTemperature(3, scale=1.0), E.AttentionTemperature(3, floor_scale=16)]
    view = AttentionView(moment.with_edits(edits))
    view.selection.layer = 3
    content = view.board.content
    places = torch.tensor(content.axes["position"].values)
    config = model.config
    own, one, other = (
        temperature(each, places)
        for each in (config, config.replace(attn_scale=1.0), config.replace(floor_scale=16))
    )
    np.testing.assert_allclose(
        unpack(content.arrays["edited"]), (one * other / own).numpy(), rtol=0.01
    )
    with E.edited(model, edits), l4.trace(model, ["layers.3.attn.q", "layers.3.attn.rot_q"]) as run:
        model(**moment.prompt)
    last = len(moment.tokens) - 1
    q, tempered = (run[f"layers.3.attn.{name}"][0, last] for name in ("q", "rot_q"))
    (panel,) = [each for each in content.panels if each["name"] == "temperature"]
    assert f"{float((tempered / q).mean()):.3g} at the end of this prompt" in panel["note"]


def test_a_temperature_without_a_scale_is_one_where_the_model_has_none(model, monkeypatch):
    monkeypatch.setattr(model, "config", model.config.replace(attn_temperature_tuning=False))
    edits = [E.AttentionTemperature(3, floor_scale=2)]
    view = AttentionView(Moment(model, model.prompt(TEXT), edits), Selection(layer=3))
    assert (unpack(view.board.content.arrays["edited"]) == 1).all()
