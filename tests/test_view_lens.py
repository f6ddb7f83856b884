"""The lens view: words at each half layer, and the parts that wrote a logit."""

import copy
import dataclasses

import numpy as np
import pytest
from boards import panel, shown

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.decomposition import decompose_logit, decompose_router, written
from llama4_lab.analysis.lens import logit_lens
from llama4_widgets.moment import Moment
from llama4_widgets.views.lens import LensView
from llama4_widgets.words import number, visible, word_of

TEXT = "def add(a, b):\n    return a + b"
EDITS = (E.SkipLayer(2), E.DropExpert(1, expert=3), E.Scale("layers.1.resid_mid", 1.5))


@pytest.fixture(scope="module")
def model():
    return l4.load("nano")


@pytest.fixture
def moment(model):
    return Moment(model, model.prompt(TEXT))


def test_words_and_colours_are_those_of_the_logit_lens(moment, model):
    view, lens = LensView(moment), logit_lens(model, moment.prompt)
    assert np.array_equal(shown(view, "words"), lens.top_logprob[..., 0])
    answers = lens.target_logprob[2::2]  # embedding, then two points a layer
    assert np.array_equal(shown(view, "answer"), answers)
    text = panel(view, "words")["text"]
    last = model.tokenizer.token_text(int(lens.top_token[-1, 5, 0]))
    assert text[-1][5] == f"● {visible(last)}"
    marked = np.array([[cell.startswith("● ") for cell in row] for row in text])
    assert np.array_equal(marked, lens.top_token[..., 0] == lens.top_token[-1:, :, 0])
    axis = view.board.content.axes["point"]
    assert axis.labels and axis.values
    assert axis.labels[:3] == ["embedding", "layer 0 attention", "layer 0 experts"]
    assert axis.values[:4] == [0, 0, 0, 1]


def test_bars_are_the_decomposition_and_its_rest(moment, model):
    view = LensView(moment)
    view.selection.token, view.selection.layer = 6, 2
    parts = decompose_logit(model, moment.prompt, 6)
    rows = panel(view, "parts")["rows"]
    assert [tuple(row) for row in rows[:14]] == parts.strongest(14)
    assert sum(row[1] for row in rows[:-1]) == pytest.approx(parts.values.sum(), abs=1e-9)
    assert rows[-1] == ["all: the model's own number", f"{parts.total:.4f}".replace("-", "−")]
    router = decompose_router(model, moment.prompt, 2, 6)
    assert panel(view, "router")["title"] == f"Why expert {router.target} in layer 2?"
    assert tuple(panel(view, "router")["rows"][0]) == router.strongest(1)[0]
    assert f"{number(parts.residual, '.1e')} away" in view.board.summary
    head = next(i for i, row in enumerate(rows) if "head" in row[0])
    _, layer, _, index = rows[head][0].split()
    assert panel(view, "parts")["choices"][head] == {"layer": int(layer), "head": int(index)}


def test_one_kept_pass_answers_like_a_pass_for_each_question(moment, model):
    kept = written(model, moment.prompt)
    for compute, question in ((decompose_logit, (4,)), (decompose_router, (3, 4))):
        one = compute(model, moment.prompt, *question, kept=kept)
        other = compute(model, moment.prompt, *question)
        assert one.labels == other.labels and np.array_equal(one.values, other.values)


def test_a_click_on_a_token_or_layer_asks_about_it(moment):
    view = LensView(moment)
    before = panel(view, "parts")["rows"]
    view.selection.token = 5
    assert view.board.summary.startswith("After token 5 ")
    assert panel(view, "parts")["rows"] != before
    view.selection.layer = 3
    assert panel(view, "router")["title"].endswith("in layer 3?")


def test_a_word_can_be_followed(moment, model):
    view = LensView(moment)
    view.selection.token = 4
    view.word = "·return"
    idx = model.tokenizer.encode(" return")[0]
    lens = logit_lens(model, moment.prompt, target=idx)
    assert np.array_equal(shown(view, "answer"), lens.target_logprob[2::2])
    assert panel(view, "parts")["title"] == "What wrote the logit of ‘·return’?"
    total = number(decompose_logit(model, moment.prompt, 4, idx).values.sum(), ".4f")
    assert f"parts of the logit of ‘·return’ add up to {total} logits" in view.board.summary
    view.colour = "final answer"
    assert np.array_equal(shown(view, "words"), lens.target_logprob)
    view.word = "return add"
    assert "‘return add’ is" in view.board.problem and "give one of them" in view.board.problem


def test_the_lead_over_the_runner_up_is_explained(moment, model):
    view = LensView(moment)
    view.against_runner_up = True
    parts = decompose_logit(model, moment.prompt, 1, versus="runner_up")
    assert tuple(panel(view, "parts")["rows"][0]) == parts.strongest(1)[0]
    assert "Its lead over ‘" in panel(view, "parts")["title"]
    assert "Its lead over expert" in panel(view, "router")["title"]
    router = decompose_router(model, moment.prompt, 0, 1, versus="runner_up")
    assert parts.versus is not None
    word, other = (word_of(model.tokenizer, idx) for idx in (parts.target, parts.versus))
    assert f"parts of the lead of ‘{word}’ over ‘{other}’ add up to" in view.board.summary
    lead = f"the lead of expert {router.target} over expert {router.versus} add up to"
    assert lead in view.board.summary


def test_edited_words_and_parts_stand_beside_the_clean_ones(moment, model):
    other = moment.with_edits(EDITS)
    view = LensView(other)
    view.selection.token = 7
    clean = logit_lens(model, moment.prompt)
    with E.edited(model, EDITS):
        edited = logit_lens(model, moment.prompt, target=clean.target.tolist())
        parts = decompose_logit(model, moment.prompt, 7)
    before = decompose_logit(model, moment.prompt, 7, parts.target)
    change = edited.target_logprob - clean.target_logprob
    assert np.array_equal(shown(view, "change"), change[2::2]) and change.any()
    differs = edited.top_token[..., 0] != clean.top_token[..., 0]
    text = panel(view, "words")["text"]
    assert np.array_equal([["(was " in cell for cell in row] for row in text], differs)
    assert differs.any()
    values, old = (dict(zip(each.labels, each.values, strict=True)) for each in (parts, before))
    assert panel(view, "parts")["columns"] == ["part", "clean (logits)", "edited (logits)"]
    for label, theirs, mine in panel(view, "parts")["rows"][:14]:
        assert mine == pytest.approx(values.get(label, 0.0), abs=1e-6)
        assert theirs == pytest.approx(old.get(label, 0.0), abs=1e-6)
    taken = {row[0]: row[2] for row in panel(view, "parts")["rows"]}
    assert taken["layer 2: an edit of what its heads wrote"] == pytest.approx(
        -sum(value for label, value in values.items() if label.startswith("layer 2 head")), abs=1e-5
    )
    extra = parts.total - parts.values.sum()
    wrote = number(extra, "+.4f")
    assert f"edits of the stream or behind it wrote {wrote} more" in view.board.summary
    view.colour = "change by the edits"
    note = "colour: log-probability of the clean run's final answer, edited minus clean;"
    assert panel(view, "words")["note"].startswith(note)
    assert panel(view, "answer")["title"].startswith("How sure is the clean run's final answer")
    assert np.array_equal(shown(view, "words"), change)


def test_the_rounding_of_bfloat16_is_not_an_edits_doing(model):
    coarse = copy.deepcopy(model).bfloat16()
    moment = Moment(coarse, coarse.prompt(TEXT)).with_edits([E.AblateHead(1, 0)])
    assert moment.edited(decompose_logit, 7).residual > 1e-3
    view = LensView(moment)
    view.selection.token = 7
    assert "edits of the stream" not in view.board.summary
    assert panel(view, "parts")["rows"][-2][0].endswith("others together")
    view.moment = moment.with_edits([E.RouterBias(0, 3, 2.0)])
    assert "edits of the stream or behind it wrote" in view.board.summary.split("Router")[1]
    assert "edits of the stream" not in view.board.summary.split("Router")[0]


def test_a_dense_layer_has_no_router_to_explain():
    config = l4.load("nano").config
    config = dataclasses.replace(config, interleave_moe_layer_step=2, moe_layers=None)
    model = l4.random(config, seed=0)
    model.tokenizer = l4.load("nano").tokenizer
    view = LensView(Moment(model, l4.load("nano").prompt("two times")))
    dense = next(i for i in range(config.num_hidden_layers) if not config.is_moe(i))
    view.selection.layer = dense
    assert view.board.summary.endswith(f"Layer {dense} is dense: it has no router.")
    assert "router" not in [each["name"] for each in view.board.content.panels]
    assert f"layer {dense} MLP" in (view.board.content.axes["point"].labels or ())


def test_long_prompts_show_the_words_around_the_token(model):
    view = LensView(Moment(model, model.prompt("a b c d e f g h " * 150)))
    view.selection.token = 1000
    axis = view.board.content.axes["near"]
    assert axis.values
    assert axis.size * 9 <= 8192 and 1000 in axis.values
    assert axis.values[0] > 0 and "tokens" in panel(view, "words")["note"]
    message = view.board.content.message()
    arrays = sum(len(each["data"]) for each in message["arrays"].values())
    assert arrays + len(repr([message["axes"], message["panels"]]).encode()) < 300_000


@pytest.mark.parametrize("edit", [E.Scale("logits", 2.0), E.Scale("final_norm", 0.5)])
def test_edits_behind_the_last_layer_are_told_and_counted(moment, edit):
    edited = moment.with_edits([edit])
    view = LensView(edited)
    view.selection.token = 7
    assert "the last layer, before edits behind it, says" in view.board.summary
    own = edited.edited_run.logits[7]
    (parts,) = view._of_word(view._lenses(edited)[1])[1][-1:]
    assert parts.total == pytest.approx(float(own[parts.target]), abs=1e-4)
    assert parts.residual > 0.1 and "edits of the stream or behind it wrote" in view.board.summary


def test_where_more_is_selected_than_a_prompt_has_its_last_word_is_framed(moment):
    axis = LensView(moment).board.content.axes["near"]
    assert axis.index({"token": axis.size + 5}) == axis.size - 1
