"""The router explorer without a browser: figure, traits, messages, pictures and pages."""

import base64
import gzip
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import traitlets
from small_tokenizer import small_tokenizer
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab.analysis.routing import Routing, routing_of
from llama4_lab.prompt import build_prompt
from llama4_widgets import domains, still
from llama4_widgets import explore as explore_module
from llama4_widgets.board import flat, unflat
from llama4_widgets.colours import PALETTE, SCALES, colour, ink
from llama4_widgets.explore import RouterExplorer, explore
from llama4_widgets.panels import Content, diverging, pack, sequential
from llama4_widgets.still import unpack
from llama4_widgets.words import decimals, describe, visible

TEXT = "for i in():\n  <b>\t\x07书"


@pytest.fixture
def make_model(tmp_path):
    def make(experts: int = 5, topk: int = 2) -> l4.Llama4:
        """Return a model with experts in its layers 1, 3 and 5."""
        tokenizer = small_tokenizer(tmp_path)
        sizes = {"num_local_experts": experts, "num_experts_per_tok": topk}
        model = l4.random(CONFIG.replace(vocab_size=336, **sizes)).eval()
        model.tokenizer = tokenizer
        model.build_prompt = lambda *given, **options: build_prompt(tokenizer, *given, **options)
        return model

    return make


@pytest.fixture
def model(make_model) -> l4.Llama4:
    return make_model()


def choose(explorer: RouterExplorer, **chosen: int) -> None:
    """Choose as a browser does."""
    before = explorer.board.selection
    explorer.board.set_state({"selection": before | chosen | {"seq": before["seq"] + 1}})


def type_in(explorer: RouterExplorer, text: str) -> None:
    """Send a text as a browser does."""
    explorer.children[1].set_state({"value": text})


# ---- the figure


@pytest.mark.parametrize(("experts", "topk"), [(8, 1), (16, 2), (128, 1)])
def test_figure_draws_the_choices_the_probabilities_and_the_load(make_model, experts, topk):
    explorer = explore(make_model(experts, topk), TEXT, layer=3, token=2)
    shown, drawn = explorer.routing, explorer.figure()
    choices, probability, load, *_ = drawn.data
    np.testing.assert_array_equal(choices.z, shown.expert[..., 0])
    np.testing.assert_allclose(probability.y, 1 / (1 + np.exp(-shown.logits[1, 2])), rtol=1e-6)
    np.testing.assert_allclose(load.y, 100 * shown.load[1], rtol=1e-6)
    for bars in (probability, load):
        framed = np.flatnonzero(bars.marker.line.width)
        assert sorted(framed) == sorted(shown.expert[1, 2])
    assert choices.y == ("1", "3", "5")
    captions = [note.text for note in drawn.layout.annotations]
    for i in (0, 3):  # choices and scores
        assert (f"the strongest of {topk}" in captions[i]) == (topk > 1)
    assert "each a sigmoid: no sum to 1" in captions[1]
    assert f"dashed: all alike, {100 / experts:.3g} %" in captions[2]
    dashed = [shape.y0 for shape in drawn.layout.shapes if shape.line.dash == "dash"]
    assert dashed == [100 / experts]
    title = drawn.layout.title.text.replace("<br>", " ")
    assert title == f"Router: {describe(shown, 3, 2)}"


def test_figure_shows_tokens_as_text_and_not_as_markup(model):
    explorer = explore(model, TEXT)
    ticks = explorer.figure().layout.xaxis.ticktext
    assert len(ticks) == len(explorer.routing.tokens)
    assert "".join(ticks).startswith("&lt;|begin_o…for·i·in():↵··&lt;b&gt;→␇")
    explorer.token = next(i for i, token in enumerate(explorer.routing.tokens) if "<" in token[:1])
    assert "‘&lt;" in explorer.figure().layout.title.text


def test_figure_of_a_long_prompt_names_positions(model):
    drawn = explore(model, "a " * 150).figure()
    assert drawn.layout.xaxis.ticktext is None
    assert drawn.layout.xaxis.title.text == "token"


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


def test_what_was_chosen_clean_is_told_behind_it():
    edited, clean = one_token([2], [0.0], 0, 0.5), one_token([0, 1, -1], [0.9, 0.5, np.nan], 2, 1.0)
    assert describe(edited, 4, 0, clean) == (
        "layer 4, token 0 ‘·a’: expert 2 with score 0.00, margin 0.50 logits over expert 0; "
        "clean: expert 0 with score 0.90 and expert 1 with score 0.50"
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


def test_the_shown_figure_is_the_figure_of_the_state(model):
    explorer = explore(model, TEXT)
    assert (explorer.layer, explorer.token) == (1, 1)
    choose(explorer, layer=5, token=4)
    assert (explorer.layer, explorer.token) == (5, 4)
    other = explore(model, TEXT, layer=5, token=4)
    assert explorer.figure() == other.figure()
    assert explorer.figure() != explore(model, TEXT, layer=5, token=3).figure()


def test_a_trait_that_is_set_moves_the_page(model):
    explorer = explore(model, TEXT)
    explorer.layer, explorer.token = 3, 2
    assert explorer.board.selection["layer"] == 3
    assert explorer.board.selection["token"] == 2


def test_a_negative_token_counts_from_the_end(model):
    explorer = explore(model, TEXT, token=-1)
    assert explorer.token == explorer.selection.token == len(explorer.routing.tokens) - 1


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("layer", 2, "layer 2 has no experts: the MoE layers are 1, 3, 5"),
        ("token", 8, "token 8 is out of range: this prompt has 4 tokens (0 to 3)"),
        (
            "text",
            "1 2 3 4 5 6",
            "this text has 12 tokens, the explorer shows at most 9: shorten it",
        ),
    ],
)
def test_a_bad_value_is_explained_and_changes_nothing(model, name, value, sentence, monkeypatch):
    monkeypatch.setattr(explore_module, "MAX_TOKENS", 9)
    explorer = explore(model, "one")
    before = explorer.routing, explorer.layer, explorer.token, explorer.text
    with pytest.raises(traitlets.TraitError, match=re.escape(sentence)):
        setattr(explorer, name, value)
    assert (explorer.routing, explorer.layer, explorer.token, explorer.text) == before
    with pytest.raises((traitlets.TraitError, ValueError), match=re.escape(sentence)):
        explore(model, **({"text": "one"} | {name: value}))


def test_explore_shows_what_the_library_computes(model):
    explorer = explore(model, "The user asks", layer=3)
    expected = routing_of(model, model.prompt("The user asks"))
    assert explorer.text == "The user asks"
    assert explorer.routing.tokens == expected.tokens
    np.testing.assert_array_equal(explorer.routing.logits, expected.logits)


def test_setting_the_text_runs_it_and_keeps_the_choice_inside(model):
    explorer = explore(model, "The user asks the assistant", layer=5, token=-1)
    explorer.text = "no"
    expected = routing_of(model, model.prompt("no"))
    np.testing.assert_array_equal(explorer.routing.logits, expected.logits)
    assert (explorer.layer, explorer.token) == (5, len(expected.tokens) - 1)
    assert explorer.children[1].value == "no"


def test_a_typed_text_runs(model):
    explorer = explore(model, "one")
    type_in(explorer, "two times")
    assert explorer.text == "two times"
    assert explorer.routing.tokens == model.prompt("two times").tokens
    assert (explorer.board.problem, explorer.board.busy) == ("", "")


def test_a_text_that_is_too_long_is_answered_and_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(explore_module, "MAX_TOKENS", 9)
    explorer = explore(model, "one")
    before = explorer.routing
    type_in(explorer, "1 2 3 4 5 6 7 8 9 0")
    problem = "this text has 20 tokens, the explorer shows at most 9: shorten it"
    assert explorer.board.problem == problem
    assert (explorer.text, explorer.routing) == ("one", before)
    type_in(explorer, "one")
    assert explorer.board.problem == ""


@pytest.mark.parametrize("topk", [1, 2])
def test_the_browser_gets_the_same_numbers(make_model, topk):
    explorer = explore(make_model(16, topk), TEXT)
    message = explorer.board.get_state("content")["content"]
    shown = explorer.routing
    assert message["axes"]["token"]["labels"] == [visible(token) for token in shown.tokens]
    assert message["axes"]["moe layer"]["values"] == [1, 3, 5]
    (strip,) = [panel for panel in message["panels"] if panel["kind"] == "strip"]
    assert strip["scale"]["colours"] == [colour(e) for e in range(16)]
    assert strip["chosen"] == ["chosen", "chosen 2"][:topk]
    arrays = {name: unpack(array) for name, array in message["arrays"].items()}
    for k in range(topk):
        np.testing.assert_array_equal(arrays[strip["chosen"][k]], shown.expert[..., k])
    np.testing.assert_array_equal(arrays["runner up"], shown.runner_up)
    np.testing.assert_array_equal(arrays["margin"], shown.margin.astype("<f4"))
    told = shown.margin[shown.runner_up >= 0]
    np.testing.assert_array_equal(
        [f"{n / 100:.2f}" for n in arrays["told margin"][shown.runner_up >= 0]],
        list(map(decimals, told.tolist())),
    )
    np.testing.assert_array_equal(arrays["load"], (100 * shown.load).astype("<f4"))
    np.testing.assert_allclose(arrays["probability"], 1 / (1 + np.exp(-shown.logits)), rtol=1e-6)
    second = "[ and expert {chosen 2} with score {told score 2:2}]" * (topk == 2)
    assert message["sentence"] == (
        "{moe layer}, {token}: expert {chosen} with score {told score:2}" + second + ""
        "[, margin {told margin:2} logits over expert {runner up}]"
    )


@pytest.mark.parametrize("times", [1, 1000])
def test_a_sentence_about_a_long_text_has_exact_numbers(make_model, times):
    explorer = explore(make_model(8, 1), "a b c d e " * 320)
    shown = explorer.routing
    assert shown.margin.size > 8192 < shown.score.size  # panels get steps
    shown.margin[:] *= times  # also more than two bytes hold
    explorer.refresh()
    arrays = explorer.board.content.arrays
    for name, values in (("margin", shown.margin), ("score", shown.score[..., 0])):
        told = unpack(arrays[f"told {name}"]).ravel()
        expected = [decimals(value) for value in values.ravel().tolist()]
        assert [f"{number / 100:.2f}" for number in told] == expected


def test_what_is_not_finite_is_no_number_and_stops_no_page():
    assert describe(one_token([0], [np.nan], 1, np.inf), 4, 0) == (
        "layer 4, token 0 ‘·a’: expert 0 with score –, margin – logits over expert 1"
    )
    assert sequential(np.nan, np.inf) == sequential(0, 1)
    assert sequential(2, np.nan)["high"] == 3 and diverging(np.inf) == diverging(1)
    content = Content()
    content.table("t", "T", ["a", "b"], [["x", np.nan], ["y", 1.0]], bars=[None, np.inf])
    (table,) = content.message()["panels"]
    assert table["rows"] == [["x", None], ["y", 1.0]] and table["bars"] == [None, None]
    flat(content.message())


def test_whole_numbers_that_two_bytes_do_not_hold_stay_exact():
    np.testing.assert_array_equal(unpack(pack(np.array([-3, 40_000]))), [-3, 40_000])


# ---- without a browser or a kernel


@pytest.mark.parametrize(("experts", "text"), [(8, "def it"), (16, "a " * 200), (128, "def it")])
def test_the_output_holds_a_picture_and_a_sentence_beside_the_widget(make_model, experts, text):
    explorer = explore(make_model(experts, 2), text, layer=3, token=1)
    data = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    sentence = describe(explorer.routing, 3, 1)
    assert data["text/plain"] == f"Router: {sentence}"
    root = ElementTree.fromstring(data["image/svg+xml"])
    nodes = list(root.iter("{http://www.w3.org/2000/svg}text"))
    heading = [node.text for node in nodes if node.get("class") == "title"]
    assert " ".join(heading) == f"Router: {sentence}"
    words = [node.text for node in nodes if node.get("class") == "word"]
    expected = [visible(token) for token in explorer.routing.tokens]
    assert words == expected[:300]
    numbers = [node.text for node in nodes if node.get("class") == "number"]
    assert numbers[1] == ",".join(map(str, explorer.routing.expert[1, 1]))
    assert [node.text for node in nodes if "more" in node.text] == (
        [f"… and {len(expected) - 300} more"] if len(expected) > 300 else []
    )


def test_the_page_is_complete_and_asks_nobody(model, tmp_path):
    explorer = explore(model, "</script><b>/*STATE*/ {{STYLE}}", token=5)
    explorer.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert page.count("</script>") == 2
    assert len(page) < 70_000
    packed = gzip.decompress(base64.b64decode(re.search(r'id="states">(.*?)<', page)[1]))
    end = 4 + int.from_bytes(packed[:4], "little")
    (state,) = unflat(packed[4:end], packed[end:])
    assert (state["selection"]["layer"], state["selection"]["token"]) == (1, 5)
    shown = unpack(state["content"]["arrays"]["chosen"])
    np.testing.assert_array_equal(shown, explorer.routing.expert[..., 0])
    assert explorer.text.replace(" ", "·") in "".join(state["content"]["axes"]["token"]["labels"])


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


def oklab(colours, eyes) -> np.ndarray:
    """Lightness, green to red and blue to yellow, of what eyes see."""
    return np.cbrt(np.clip(linear(colours) @ EYES[eyes], 0, 1) @ CONES) @ OKLAB


def blend(start: str, end: str, share: float) -> str:
    """Mix two colours as browsers do, on their written numbers."""
    ends = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (start, end)]
    return "#" + "".join(f"{round(x):02x}" for x in (1 - share) * ends[0] + share * ends[1])


def steps(stops) -> list[str]:
    """The colours of a scale, ten from one stop to the next."""
    pairs = itertools.pairwise(stops)
    return [blend(*pair, i / 10) for pair in pairs for i in range(10)] + [stops[-1]]


PACKAGE = Path(still.__file__).parent
BOARD = (PACKAGE / "board.js").read_text()
FADED = {
    name: float(most)
    for name, most in re.findall(r"(\w+): (0\.\d+)", re.search(r"const FADED = {(.*?)}", BOARD)[1])
}
ORANGE = "#" + "".join(
    f"{int(x):02x}" for x in re.search(r'"sequential" \? \[(\d+), (\d+), (\d+)\]', BOARD).groups()
)
PAPERS = ("#ffffff", "#111111")  # JupyterLab's, light and dark


@pytest.mark.parametrize("eyes", EYES)
def test_scales_rise_in_lightness_for_all_eyes(eyes):
    light = oklab(steps(SCALES["sequential"]), eyes)[:, 0]
    assert (np.diff(light) > 0).all()
    assert np.diff(light[::10]).min() > 0.05  # from stop to stop
    for name, towards_the_middle in (("diverging", 1), ("dark", -1)):
        ends = steps(SCALES[name])
        middle = len(ends) // 2
        rises = towards_the_middle * np.diff(oklab(ends, eyes)[:, 0])
        assert (rises[:middle] > 0).all() and (rises[middle:] < 0).all()


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("name", ["diverging", "dark"])
def test_the_two_sides_of_a_diverging_scale_differ_for_all_eyes(eyes, name):
    seen = oklab(SCALES[name], eyes)
    below, above = seen[:3], seen[:3:-1]  # the strongest first
    apart = np.linalg.norm(below - above, axis=-1)
    assert apart.min() > 0.05 and apart[0] > 0.2
    for end in (seen[0], seen[-1]):
        assert np.linalg.norm(end - seen[3]) > 0.3


@pytest.mark.parametrize(("name", "paper"), [("diverging", "#ffffff"), ("dark", "#1b1b1b")])
def test_the_middle_of_a_diverging_scale_is_near_the_paper(name, paper):
    assert contrast(SCALES[name][3], paper) < 1.2


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("eyes", EYES)
def test_words_and_bars_stand_out_from_the_paper_for_all_eyes(eyes, paper):
    """A strip's orange by strength, its blue and red, a table's bars at half."""
    shades = [blend(paper, ORANGE, share) for share in np.linspace(0, FADED["sequential"], 11)]
    light = oklab(shades, eyes)[:, 0]
    rises = np.diff(light) * np.sign(light[-1] - light[0])
    assert (rises > 0).all() and abs(light[-1] - light[0]) > 0.2
    for ends, share in ((SCALES["diverging"][::6], FADED["diverging"]), (table_bars(), 0.5)):
        seen = oklab([paper, *(blend(paper, end, share) for end in ends)], eyes)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert apart[~np.eye(3, dtype=bool)].min() > 0.06


def test_words_stay_legible_on_their_colours():
    """WCAG 2 asks for a contrast of 4.5 (success criterion 1.4.3)."""
    assert f'"{ORANGE}{round(255 * FADED["sequential"]):x}"' in BOARD  # the legend's strongest
    behind = {
        "category": PALETTE,
        "sequential": [ORANGE],
        "diverging": [SCALES["diverging"][0], SCALES["diverging"][-1]],
    }
    for paper, word in (("#ffffff", "#212121"), ("#111111", "#ffffff"), ("#1b1b1b", "#ffffff")):
        for kind, colours in behind.items():
            for share in np.linspace(0, FADED[kind], 11):
                for each in colours:
                    assert contrast(blend(paper, each, share), word) >= 4.5, (paper, each, share)


def contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG 2, from 1 to 21."""
    dark, light = sorted(linear([one, other]) @ (0.2126, 0.7152, 0.0722))
    return float((light + 0.05) / (dark + 0.05))


def table_bars() -> list[str]:
    """The colours of negative and positive bars in tables."""
    found = re.findall(r"rgb\((\d+) (\d+) (\d+) / 0.5\)", BOARD)
    return ["#" + "".join(f"{int(x):02x}" for x in rgb) for rgb in found]


@pytest.mark.parametrize("eyes", EYES)
def test_lines_and_bars_of_one_drawing_differ_for_all_eyes(eyes):
    drawings = {
        path.name: sorted(set(re.findall(r'"(#[0-9a-f]{6})"', path.read_text())))
        for path in [*PACKAGE.glob("views/*.py"), PACKAGE / "parts.py"]
    }
    assert sum(len(colours) > 1 for colours in drawings.values()) >= 3
    for name, colours in drawings.items():
        for one, other in itertools.combinations(oklab(colours, eyes) if colours else (), 2):
            assert np.linalg.norm(one - other) > 0.11, name
