"""The router explorer without a browser: figure, traits, messages, pictures and pages."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import traitlets
from small_tokenizer import small_tokenizer
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis.routing import Routing, routing_of
from llama4_lab.prompt import build_prompt
from llama4_widgets import domains
from llama4_widgets import explore as explore_module
from llama4_widgets.colours import PALETTE, colour, ink
from llama4_widgets.explore import explore
from llama4_widgets.router import RouterExplorer, figure
from llama4_widgets.words import describe

TOKENS = ["<|begin_of_text|>", "def", " f", "():\n", "  ", "<b>", "\t\x07", "书"]


def routing(experts: int = 8, topk: int = 1, layers=(1, 3, 5), tokens=TOKENS) -> Routing:
    logits = np.random.default_rng(0).normal(size=(len(layers), len(tokens), experts))
    best = np.argsort(-logits, axis=-1)
    ranked = np.take_along_axis(logits, best, axis=-1)
    score = 1 / (1 + np.exp(-ranked[..., :topk]))
    margin = ranked[..., topk - 1] - ranked[..., topk]
    return Routing(list(tokens), layers, logits, best[..., :topk], score, best[..., topk], margin)


@pytest.fixture
def model(tmp_path) -> l4.Llama4:
    tokenizer = small_tokenizer(tmp_path)
    model = l4.random(CONFIG.replace(vocab_size=336)).eval()
    model.build_prompt = lambda *given, **options: build_prompt(tokenizer, *given, **options)
    return model


# ---- the figure


@pytest.mark.parametrize(("experts", "topk"), [(8, 1), (16, 2), (128, 1)])
def test_figure_draws_the_choices_the_probabilities_and_the_load(experts, topk):
    shown = routing(experts, topk)
    drawn = figure(shown, layer=3, token=2)
    choices, probability, load = drawn.data
    np.testing.assert_array_equal(choices.z, shown.expert[..., 0])
    np.testing.assert_allclose(probability.y, 1 / (1 + np.exp(-shown.logits[1, 2])))
    np.testing.assert_allclose(load.y, 100 * shown.load[1])
    framed = np.flatnonzero(probability.marker.line.width)
    assert sorted(framed) == sorted(shown.expert[1, 2])
    assert drawn.layout.yaxis.ticktext == ("1", "3", "5")
    assert drawn.layout.yaxis2.title.text == "sigmoid(logit), each expert<br>alone: no sum to 1"
    assert drawn.layout.title.text == describe(shown, 3, 2)
    assert f"{100 / experts:.3g} %" in drawn.layout.annotations[-1].text


def test_figure_shows_tokens_as_text_and_not_as_markup():
    ticks = figure(routing(), layer=1, token=5).layout.xaxis.ticktext
    assert ticks[2:7] == ("·f", "():↵", "··", "&lt;b&gt;", "→␇")


def test_figure_of_a_long_prompt_names_positions():
    drawn = figure(routing(tokens=["a"] * 300), layer=1, token=0)
    assert drawn.layout.xaxis.ticktext[:3] == (0, 15, 30)
    assert drawn.layout.xaxis.title.text == "position of the token"


def one_token(experts: list[int], scores: list[float], runner_up: int, margin: float) -> Routing:
    logits = np.array([[[2.0, 0.0, -1.0]]])
    choice = np.array([[experts]]), np.array([[scores]])
    return Routing([" a"], (4,), logits, *choice, np.array([[runner_up]]), np.array([[margin]]))


def test_a_choice_is_described_in_one_sentence():
    assert describe(one_token([0], [0.881], 1, 2.0), 4, 0) == (
        "layer 4, token 0 ‘·a’: expert 0 with score 0.88, margin 2.00 logits over expert 1"
    )
    assert describe(one_token([0, 1, 2], [0.881, 0.5, 0.269], -1, np.inf), 4, 0) == (
        "layer 4, token 0 ‘·a’: expert 0 with score 0.88 and expert 1 with score 0.50 "
        "and expert 2 with score 0.27"
    )


def test_domains_are_compared_on_one_scale():
    trained, control = np.eye(2), np.full((2, 2), 0.5)
    drawn = domains.figure(["prose", "code"], {"trained": trained, "control": control})
    np.testing.assert_array_equal(drawn.data[0].z, 100 * trained)
    np.testing.assert_array_equal(drawn.data[1].z, 100 * control)
    assert {trace.coloraxis for trace in drawn.data} == {"coloraxis"}
    assert [note.text for note in drawn.layout.annotations] == ["trained", "control"]
    assert drawn.layout.coloraxis.colorbar.title.text.endswith("tokens (%)")


# ---- the explorer


def test_the_shown_figure_is_the_figure_of_the_state():
    explorer = RouterExplorer(routing())
    assert (explorer.layer, explorer.token) == (1, 1)
    explorer.set_state({"layer": 5, "token": 4})  # what a browser sends
    assert (explorer.layer, explorer.token) == (5, 4)
    assert explorer.figure() == figure(explorer.routing, 5, 4)


def test_a_negative_token_counts_from_the_end():
    assert RouterExplorer(routing(), token=-1).token == len(TOKENS) - 1


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("layer", 2, "layer 2 has no experts: the MoE layers are 1, 3, 5"),
        ("token", 8, "token 8 is out of range: this prompt has 8 tokens (0 to 7)"),
        (
            "text",
            "hello",
            "this explorer cannot run 'hello': it shows a recorded routing; explore(model, text) "
            "makes one that runs other texts",
        ),
    ],
)
def test_a_bad_value_is_explained_and_changes_nothing(name, value, sentence):
    explorer = RouterExplorer(routing(), "some text")
    before = getattr(explorer, name)
    with pytest.raises(traitlets.TraitError, match=re.escape(sentence)):
        setattr(explorer, name, value)
    with pytest.raises(traitlets.TraitError, match=re.escape(sentence)):
        explorer.set_state({name: value})
    assert getattr(explorer, name) == before


def test_explore_shows_what_the_library_computes(model):
    explorer = explore(model, "The user asks", layer=3)
    expected = routing_of(model, model.prompt("The user asks"))
    assert explorer.text == "The user asks"
    assert explorer.is_live
    assert explorer.routing.tokens == expected.tokens
    np.testing.assert_array_equal(explorer.routing.logits, expected.logits)


def test_setting_the_text_runs_it_and_keeps_the_choice_inside(model):
    explorer = explore(model, "The user asks the assistant", layer=5, token=-1)
    explorer.text = "no"
    expected = routing_of(model, model.prompt("no"))
    np.testing.assert_array_equal(explorer.routing.logits, expected.logits)
    assert (explorer.layer, explorer.token) == (5, len(expected.tokens) - 1)


def typed(explorer: RouterExplorer, text: str, monkeypatch) -> list[dict]:
    """Send a text as the browser does, and return the answers."""
    answers = []
    monkeypatch.setattr(explorer, "send", answers.append)
    explorer._handle_custom_msg({"run": text}, [])
    return answers


def test_a_typed_text_runs(model, monkeypatch):
    explorer = explore(model, "one")
    assert typed(explorer, "two times", monkeypatch) == [{"problem": ""}]
    assert explorer.text == "two times"
    assert explorer.routing.tokens == model.prompt("two times").tokens


def test_a_text_that_is_too_long_is_answered_and_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(explore_module, "MAX_TOKENS", 9)
    explorer = explore(model, "one")
    before = explorer.routing
    problem = "this text has 20 tokens, the explorer shows at most 9: shorten it"
    assert typed(explorer, "1 2 3 4 5 6 7 8 9 0", monkeypatch) == [{"problem": problem}]
    assert (explorer.text, explorer.routing) == ("one", before)
    with pytest.raises(ValueError, match=problem):
        explore(model, "1 2 3 4 5 6 7 8 9 0")


@pytest.mark.parametrize("topk", [1, 2])
def test_the_browser_gets_the_same_numbers(topk):
    explorer = RouterExplorer(routing(16, topk))
    message = explorer.get_state("routing")["routing"]
    assert message["words"][1:5] == ["def", "·f", "():↵", "··"]
    assert message["colours"] == [colour(e) for e in range(16)]
    for name, dtype in (("expert", "<i2"), ("runnerUp", "<i2"), ("margin", "<f4"), ("load", "<f4")):
        sent = np.frombuffer(message[name], dtype)
        expected = getattr(explorer.routing, "runner_up" if name == "runnerUp" else name)
        np.testing.assert_array_equal(sent, expected.ravel().astype(dtype))
    np.testing.assert_array_equal(
        np.frombuffer(message["logits"], "<f4"), explorer.routing.logits.ravel().astype("<f4")
    )


# ---- without a browser or a kernel


@pytest.mark.parametrize(("experts", "count"), [(8, 8), (16, 400), (128, 8)])
def test_the_output_holds_a_picture_and_a_sentence_beside_the_widget(experts, count):
    explorer = RouterExplorer(routing(experts, tokens=(TOKENS * 50)[:count]), layer=3, token=5)
    data, _ = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    sentence = describe(explorer.routing, 3, 5)
    assert data["text/plain"] == f"RouterExplorer: {sentence}"
    root = ElementTree.fromstring(data["image/svg+xml"])
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == sentence
    assert words[1:4:2] == ["<|begin_of_text|>", "def"]
    assert ("… and 100 more" in words) == (count == 400)


def test_the_page_is_complete_and_asks_nobody(tmp_path):
    explorer = RouterExplorer(routing(), "</script><b>/*STATE*/ {{STYLE}}", token=5)
    explorer.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert page.count("</script>") == 1
    assert len(page) < 60_000
    state = json.loads(re.search(r"^const state = (.*);$", page, re.MULTILINE)[1])
    assert (state["layer"], state["token"], state["text"]) == (1, 5, explorer.text)
    sent = np.frombuffer(base64.b64decode(state["routing"]["expert"]), "<i2")
    np.testing.assert_array_equal(sent, explorer.routing.expert.ravel())


# ---- colours


def matrix(numbers: str) -> np.ndarray:
    return np.array(numbers.split(), float).reshape(3, 3).T


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
EYES = {
    "normal": np.eye(3),
    "protan": matrix(
        "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998"
    ),
    "deutan": matrix(
        "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881"
    ),
    "tritan": matrix(
        "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900"
    ),
}
# Ottosson (2020): linear RGB to cone responses, and their cube roots to OKLab
CONES = matrix(
    "0.41222147 0.53633254 0.05144599 0.2119035 0.68069955 0.10739696 "
    "0.08830246 0.28171884 0.6299787"
)
OKLAB = matrix(
    "0.21045426 0.79361779 -0.00407205 1.9779985 -2.42859221 0.45059371 "
    "0.02590404 0.78277177 -0.80867577"
)


def linear(colours) -> np.ndarray:
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(("count", "distance"), [(8, 0.11), (16, 0.06)])
def test_colours_differ_for_all_eyes(eyes, count, distance):
    seen = np.clip(linear(PALETTE[:count]) @ EYES[eyes], 0, 1)
    lab = np.cbrt(seen @ CONES) @ OKLAB
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert apart[~np.eye(count, dtype=bool)].min() >= distance


def test_numbers_on_colours_reach_the_contrast_of_wcag_aa():
    luminance = linear(PALETTE) @ [0.2126, 0.7152, 0.0722]
    for background, light in zip(PALETTE, luminance, strict=True):
        on_white, on_black = 1.05 / (light + 0.05), (light + 0.05) / 0.05
        assert (on_black if ink(background) == "#000000" else on_white) >= 4.5
    assert colour(21) == PALETTE[5]
