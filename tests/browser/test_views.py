"""Each view of the lab in a browser: it shows the library's values, and clicks move the selection.

One notebook and one kernel serve all tests; each brings the views that it looks at to the page.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import nbformat
import numpy as np
import pytest
from playwright.sync_api import Locator, expect

import llama4_lab as l4
from llama4_lab import edits as E
from llama4_lab.analysis.attribution import attribute
from llama4_lab.analysis.counterfactual import counterfactual
from llama4_lab.analysis.decomposition import decompose_logit, decompose_router
from llama4_lab.analysis.features import token_features
from llama4_lab.analysis.lens import logit_lens
from llama4_lab.analysis.routing import routing_in, routing_of
from llama4_lab.analysis.vision import causal_map, masking_effects, patches_of
from llama4_lab.config import SCOUT
from llama4_lab.hardware import GPUS
from llama4_lab.plan import Plan
from llama4_lab.train import scenes
from llama4_widgets.views import VIEWS
from llama4_widgets.words import describe, visible

from .conftest import NOTEBOOK_CELLS, SHUT_DOWN, LabPage, hindrances

pytestmark = pytest.mark.browser

expect.set_options(timeout=60_000)  # a busy machine must not fail a test
TIMEOUT_S = 60
TEXT = "The old man looked at the sea.\n12 + 7 = 19\n"
TOKEN, LAYER, HEAD, EXPERT = 5, 3, 1, 2
LEFT, TOP, RIGHT, BOTTOM = 46, 6, 8, 30  # margins of a map, in pixels
CELLS = f"""\
import numpy as np
import llama4_lab as l4
from llama4_widgets.app import LabApp
app = LabApp(l4.load("mini"), {TEXT!r}, shown=["router"])
app
"""
RESET = f"""\
app.compare(None)
app.edits = ()
app.shown = ("router", *{{names!r}})
app.run({TEXT!r})
app.selection.token, app.selection.layer = {TOKEN}, {LAYER}
app.selection.head, app.selection.expert = {HEAD}, {EXPERT}
"""
BOXES = """picture => {  // its boxes: left, top, width and height, in shares of its own
    const at = picture.getBoundingClientRect();
    return [...picture.querySelectorAll("b")].map((node) => {
        const { x, y, width, height } = node.getBoundingClientRect();
        return [
            (x - at.x) / at.width, (y - at.y) / at.height, width / at.width, height / at.height,
        ];
    });
}"""
SET_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', { theme })"
IN_KERNEL = """async (code) => {
    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({ code });
    let printed = "";
    future.onIOPub = ({ content }) => (printed += content.text ?? content.evalue ?? "");
    const { content } = await future.done;
    return [content.status, printed.trim()];
}"""


@dataclass
class Lab:
    """A page with the lab, `app` in its kernel."""

    on: LabPage

    def kernel(self, code: str) -> str:
        """Run code, and return what it printed."""
        status, printed = self.on.page.evaluate(IN_KERNEL, code)
        assert status == "ok", printed
        return printed

    def show(self, *names: str) -> Locator:
        """Bring the router and other views to the page, as at the start; return the last one."""
        self.kernel(RESET.format(names=names))
        title = self.kernel(
            f"print(app.views[{names[-1]!r}].title)" if names else "print('Router')"
        )
        found = self.view(title)
        expect(found).to_be_visible()
        return found

    def view(self, title: str) -> Locator:
        heading = self.on.page.locator(".l4-heading").get_by_text(title, exact=True)
        return self.on.page.locator(".l4-view").filter(has=heading).first

    def wait_for(self, code: str, expected: Any) -> None:
        """Wait until an expression in the kernel is written as expected."""
        deadline = time.monotonic() + TIMEOUT_S
        while (printed := self.kernel(f"print({code})")) != str(expected):
            assert time.monotonic() < deadline, f"{code} is {printed}, not {expected}"
            self.on.page.wait_for_timeout(50)

    def wait_for_selection(self, **chosen: int) -> None:
        for field, value in chosen.items():
            self.wait_for(f"app.selection.{field}", value)

    def hover(self, view: Locator, target: Locator) -> str:
        """Return what the page tells about a place under the pointer."""
        self.on.page.mouse.move(0, 0)
        target.hover()
        tip = view.locator(".l4-tip")
        expect(tip).to_be_visible()
        return tip.inner_text()

    def assert_tells(self, view: Locator, target: Locator, value: float) -> None:
        """Assert which value the page tells about a place under the pointer."""
        eventually(lambda: assert_reads(self.hover(view, target), value))


def eventually(check: Callable[[], None]) -> None:
    """Repeat assertions until they hold: a page follows its kernel one message at a time."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return check()
        except AssertionError:
            if time.monotonic() > deadline:
                raise


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return l4.load("mini")


@pytest.fixture(scope="module")
def prompt(model):
    return model.prompt(TEXT)


@pytest.fixture(scope="module")
def opened(browser, lab_server) -> Iterator[LabPage]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELLS)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab_server.folder / "views.ipynb")
    context = browser.new_context(viewport={"width": 1500, "height": 1600})
    lab_page = LabPage(context.new_page(), lab_server)
    lab_page.open_notebook("views.ipynb")
    lab_page.run_all()
    yield lab_page
    lab_page.page.evaluate(SHUT_DOWN)
    context.close()


@pytest.fixture
def lab(opened) -> Iterator[Lab]:
    yield Lab(opened)
    opened.assert_clean()


def panel(view: Locator, name: str) -> Locator:
    return view.locator(f'[data-panel="{name}"]')


def words(view: Locator, name: str) -> Locator:
    """The words of a strip."""
    return panel(view, name).locator(".l4-words span")


def cells(view: Locator, name: str) -> Locator:
    """The patches of a picture."""
    return panel(view, name).locator(".l4-picture i")


def number(text: str) -> float:
    """Read the last number of what the page says: ``… ‘x’: −0.12 nats``."""
    return float(text.rsplit(": ", 1)[-1].split()[0].replace("−", "-").replace(",", ""))


def assert_reads(text: str, value: float) -> None:
    """Assert that a text ends in a value, to the three digits that the page writes."""
    shown, digit = number(text), 10.0 ** (np.floor(np.log10(max(abs(value), 1e-30))) - 2)
    if abs(value) < 1e-3:
        digit *= 10  # two digits, as 1.2e-5
    assert abs(shown - value) <= 0.51 * digit, f"{text!r} instead of {value}"


def assert_bars(figure: Locator, values: Any, name: str = "expert") -> None:
    """Assert what a screen reader hears of bars."""

    def check() -> None:
        heard = figure.locator("svg[role=img]").get_attribute("aria-label") or ""
        everything = heard.split("All: ")[-1].split(". ")[-1]  # without title and selected one
        each = re.split(rf", (?={name} \d+:)", everything)
        assert [part.split(":")[0] for part in each] == [f"{name} {i}" for i in range(len(values))]
        for part, value in zip(each, values, strict=True):
            assert_reads(part, float(value))

    eventually(check)


def assert_heard(canvas: Locator, start: str, value: float) -> None:
    """Assert what a screen reader hears of a map: the selected place and its value."""
    expect(canvas).to_have_attribute("aria-label", re.compile("^" + re.escape(start)))
    eventually(lambda: assert_reads(canvas.get_attribute("aria-label") or "", value))


def click_cell(canvas: Locator, at: tuple[int, int], shape: tuple[int, int]) -> None:
    """Click on a cell (row, column) of a map."""
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    width, height = box["width"] - LEFT - RIGHT, box["height"] - TOP - BOTTOM
    x = LEFT + (at[1] + 0.5) / shape[1] * width
    y = TOP + (at[0] + 0.5) / shape[0] * height
    canvas.click(position={"x": x, "y": y})


def rows_of(table: Locator) -> list[list[str]]:
    """The texts of a table, without its head; a new one is filled in the frame that shows it."""
    expect(table.locator("td").first).to_be_attached()
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tr").all()]
    return [row for row in rows if row]


def test_the_router_shows_choices_scores_and_probabilities(lab, model, prompt):
    view, routing = lab.show(), routing_of(model, prompt)
    spoken = [visible(token) for token in routing.tokens]
    layer, token = 5, 8
    click_cell(panel(view, "chosen").locator("canvas"), (layer, token), routing.expert.shape[:2])
    lab.wait_for_selection(layer=layer, token=token)
    at = f"layer {layer}, token {token} ‘{spoken[token]}’: "
    chosen = routing.expert[layer, token, 0]
    canvas = panel(view, "chosen").locator("canvas")
    expect(canvas).to_have_attribute("aria-label", f"Chosen expert. {at}expert {chosen}")
    score, margin = routing.score[layer, token, 0], routing.margin[layer, token]
    assert_heard(panel(view, "score").locator("canvas"), f"Score. {at}", score)
    assert_heard(panel(view, "margin").locator("canvas"), f"Margin. {at}", margin)
    probabilities = 1 / (1 + np.exp(-routing.logits[layer, token]))
    assert_bars(panel(view, "probability"), probabilities)
    expect(view.locator(".l4-summary")).to_have_text(describe(routing, layer, token))
    told = lab.hover(view, words(view, "strip").nth(2))
    assert told == f"token 2 ‘{spoken[2]}’: expert {routing.expert[layer, 2, 0]}"


def test_the_router_says_what_a_token_chose_clean(lab, model, prompt):
    view, clean = lab.show(), routing_of(model, prompt)
    lab.on.page.mouse.move(0, 0)  # what lies under the pointer would be told
    lab.kernel(f"app.edits = [l4.edits.TopK({LAYER}, 2), l4.edits.SkipLayer(6)]")
    with E.edited(model, [E.TopK(LAYER, 2), E.SkipLayer(6)]):
        edited = routing_of(model, prompt)
    assert f"; clean: expert {clean.expert[LAYER, TOKEN, 0]} " in describe(
        edited, LAYER, TOKEN, clean
    )
    for layer in (LAYER, 6):
        lab.kernel(f"app.selection.layer = {layer}")
        said = describe(edited, layer, TOKEN, clean)
        expect(view.locator(".l4-summary")).to_have_text(said)
        assert lab.kernel("print(app.views['router'].summary())") == said


def test_one_walks_on_through_a_text_of_which_the_router_shows_a_part(lab, model):
    view, text = lab.show(), 4 * TEXT
    routing = routing_of(model, model.prompt(text))
    count = len(routing.tokens)
    lab.on.page.mouse.move(0, 0)
    lab.kernel("import llama4_widgets.views.router as router")
    lab.kernel("before = router._WHOLE, router._PART; router._WHOLE, router._PART = 0, 1500")
    try:
        lab.kernel(f"app.run({text!r})")
        lab.wait_for("len(app.views['router'].moment.tokens)", count)
        shown = int(lab.kernel("print(len(app.views['router']._around()))"))
        assert 16 < shown < count / 2
        strip = panel(view, "strip").get_by_role("listbox")
        expect(strip.get_by_role("option")).to_have_count(shown)  # and no strip of before
        strip.focus()
        for token in range(TOKEN + 1, count):
            lab.on.page.keyboard.press("ArrowRight")
            told = describe(routing, LAYER, token)
            expect(view.locator(".l4-summary")).to_have_text(told)
        expect(strip).to_be_focused()
        lab.wait_for_selection(token=count - 1)
        lab.kernel("app.selection.token = 0")  # far from what is on screen
        expect(view.locator(".l4-summary")).to_have_text(describe(routing, LAYER, 0))
        expect(view.locator(".l4-late")).to_have_count(0)
    finally:
        lab.kernel("router._WHOLE, router._PART = before")


def test_experts_show_loads_and_the_tokens_that_each_takes(lab, model, prompt):
    view, routing = lab.show("experts"), routing_of(model, prompt)
    load = routing.load[LAYER]
    assert_bars(panel(view, "load"), 100 * load)
    expect(view.locator(".l4-summary")).to_contain_text(
        f"expert {load.argmax()} takes most, {100 * load.max():.0f} %"
    )
    expert = int(load.argmax())
    panel(view, "load").locator("svg > g").nth(expert).click()
    lab.wait_for_selection(expert=expert)
    table = panel(view, "tokens")
    expect(table).to_contain_text(f"Tokens of expert {expert} in layer {LAYER}")
    taken = np.flatnonzero((routing.expert[LAYER] == expert).any(axis=-1))
    rows = rows_of(table)
    assert [row[0] for row in rows] == [visible(routing.tokens[i]) for i in taken]
    assert [float(row[1]) for row in rows] == [
        pytest.approx(routing.score[LAYER, i, 0], abs=0.0051) for i in taken
    ]
    table.locator("tr").nth(2).click()  # after the head
    lab.wait_for_selection(token=taken[1])
    view.get_by_role("button", name="Measure kinds of text").click()
    expect(panel(view, "domains").locator("canvas")).to_be_visible()
    expect(panel(view, "bits").locator("svg path").first).to_be_visible()


def test_attention_shows_shares_of_every_head(lab, model, prompt):
    view = lab.show("attention")
    name = "layers.{}.attn.pattern"
    with l4.trace(model, [name.format(LAYER), name.format(2)]) as cache:
        model(prompt.input_ids)
    share = cache[name.format(LAYER)][0].float().numpy()
    spoken = [visible(token) for token in prompt.tokens]
    best = int(share[HEAD, TOKEN].argmax())
    expect(view.locator(".l4-summary")).to_contain_text(
        f"head {HEAD}: token {TOKEN} ‘{spoken[TOKEN]}’ sees the whole past and looks most at "
        f"token {best} ‘{spoken[best]}’, share {share[HEAD, TOKEN, best]:.2g}"
    )
    lab.assert_tells(view, words(view, "row").nth(2), share[HEAD, TOKEN, 2])
    canvas = panel(view, "map").locator("canvas")
    query, key = f"query {TOKEN} ‘{spoken[TOKEN]}’", f"key 0 ‘{spoken[0]}’"
    start = f"Attention, layer {{}}. {query}, {key}: "
    assert_heard(canvas, start.format(LAYER), share[HEAD, TOKEN, 0])
    panel(view, "heads").get_by_role("button").nth(2).click()
    lab.wait_for_selection(head=2)
    assert_heard(canvas, start.format(LAYER), share[2, TOKEN, 0])
    lab.assert_tells(view, words(view, "row").nth(3), share[2, TOKEN, 3])
    expect(panel(view, "temperature").locator("svg path").first).to_be_visible()
    view.locator("select").first.select_option(label="2 · RoPE")
    lab.wait_for_selection(layer=2)
    assert_heard(canvas, start.format(2), float(cache[name.format(2)][0, 2, TOKEN, 0]))
    expect(panel(view, "temperature")).to_have_count(0)
    count = len(spoken)
    click_cell(canvas, (8, 4), (count, count))
    lab.wait_for_selection(token=8)


def test_a_picture_shows_experts_attention_boxes_and_what_matters(lab, model):
    view = lab.show("image")
    expect(view.locator(".l4-summary")).to_contain_text("this prompt has no picture")
    lab.kernel("app.bar._rng = np.random.default_rng(1)")
    rng = np.random.default_rng(1)
    example = scenes.sample(rng, str(rng.choice(scenes.ONE_PICTURE)))
    lab.on.page.get_by_role("button", name="Scene", exact=True).click()
    parts = [{"type": "image"}, {"type": "text", "text": example.question}]
    prompt = model.prompt([{"role": "user", "content": parts}], example.images)
    patches, routing = patches_of(prompt), routing_of(model, prompt)
    places = patches.stitch(patches.position).ravel()
    bare = panel(view, "bare 0")
    expect(cells(view, "bare 0")).to_have_count(len(places))

    boxes = bare.locator(".l4-picture b")
    things = example.scenes[0].objects
    assert boxes.all_inner_texts() == [str(thing) for thing in things]
    height, width = np.asarray(example.images[0]).shape[:2]
    shown = bare.locator(".l4-picture").evaluate(BOXES)  # at one moment: the page may still move
    for thing, box in zip(things, shown, strict=True):
        left, top, right, bottom = thing.box
        expected = left / width, top / height, (right - left) / width, (bottom - top) / height
        assert box == pytest.approx(expected, abs=0.01)

    nth = 7
    cells(view, "expert 0").nth(nth).click()
    lab.wait_for_selection(token=places[nth])
    chosen = routing.expert[LAYER, places[nth], 0]
    heard = panel(view, "expert 0").get_by_role("img").first
    expect(heard).to_have_attribute(
        "aria-label", re.compile(f"token {places[nth]} .*: expert {chosen}$")
    )
    expect(view.locator(".l4-summary")).to_contain_text(f"token {places[nth]} shows tile 0, row 1")
    expect(words(lab.view("Router"), "strip").nth(places[nth])).to_have_class("l4-selected")

    last = len(prompt.tokens) - 1
    words(lab.view("Router"), "strip").nth(last).click()
    expect(view.locator(".l4-summary")).to_contain_text("is text")
    name = f"layers.{LAYER}.attn.pattern"
    with l4.trace(model, name) as cache:
        model(**prompt)
    share = cache[name][0, HEAD, last].float().numpy()
    lab.assert_tells(view, cells(view, "attention 0").nth(nth), share[places[nth]])

    view.get_by_role("button", name="Which patches matter?").click()
    effect = panel(view, "effect 0")
    expect(cells(view, "effect 0")).to_have_count(len(places))
    answer = [int(model(**prompt, keep_last=1)[0, -1].argmax())]
    cost = causal_map(patches, partial(masking_effects, model, prompt, answer)).ravel()
    strongest = int(abs(cost).argmax())
    lab.assert_tells(view, cells(view, "effect 0").nth(strongest), cost[strongest])
    expect(effect).to_contain_text(f"‘{visible(model.tokenizer.decode(answer))}’")


def test_the_lens_shows_early_answers_and_what_wrote_them(lab, model, prompt):
    view, lens = lab.show("lens"), logit_lens(model, prompt)
    row = lens.points.index(f"layers.{LAYER}.resid_post")
    mine, final = lens.top_token[[row, -1], TOKEN, 0]
    word = ("● " if mine == final else "") + visible(model.tokenizer.token_text(int(mine)))
    cell = panel(view, "words").locator("td.l4-selected")
    expect(cell).to_have_text(word)
    told = lab.hover(view, cell)
    assert told.startswith(f"{word} – stream {LAYER} ‘layer {LAYER} experts’")
    assert_reads(told, lens.top_logprob[row, TOKEN, 0])
    parts = decompose_logit(model, prompt, TOKEN)
    shown = rows_of(panel(view, "parts"))[:5]
    for (label, value), (part, text) in zip(parts.strongest(5), shown, strict=True):
        assert part == label
        assert_reads(text, value)
    router = decompose_router(model, prompt, LAYER, TOKEN)
    expect(panel(view, "router")).to_contain_text(f"Why expert {router.target} in layer {LAYER}?")
    expect(view.locator(".l4-summary")).to_contain_text(
        f"add up to {parts.values.sum():.4f} logits".replace("-", "−")
    )

    table = panel(view, "words")
    head = table.locator("th").nth(3).inner_text()
    row = 1 + lens.points.index("layers.1.resid_mid")  # after the head
    table.locator("tr").nth(row).locator("td").nth(2).click()
    lab.wait_for_selection(layer=1, token=int(head.split()[0]))
    view.get_by_label("Follow word").fill("two times")
    view.get_by_label("Follow word").press("Enter")
    expect(view.get_by_role("alert")).to_contain_text("‘two times’ is 4 tokens here")
    view.get_by_label("Follow word").fill("")
    view.get_by_label("Follow word").press("Enter")
    expect(view.get_by_role("alert")).to_be_hidden()


def test_attribution_runs_shows_progress_and_can_be_cancelled(lab, model, prompt):
    view = lab.show("attribution")
    root = view.locator(".l4-board")
    method, run = view.get_by_label("Method"), view.get_by_role("button", name="Run", exact=True)
    method.select_option(label="shapley_sampling")
    run.click()
    expect(root).to_have_attribute("data-busy", re.compile(r"^shapley_sampling: \d+ runs"))
    view.get_by_role("button", name="Cancel").click()
    expect(root).to_have_attribute("data-busy", "")
    expect(run).to_be_enabled()
    expect(panel(view, "clean")).to_have_count(0)

    run.click()
    expect(root).to_have_attribute("data-busy", re.compile(r"^shapley_sampling: \d+ runs"))
    lab.on.page.evaluate("() => jupyterapp.commands.execute('notebook:interrupt-kernel')")
    expect(root).to_contain_text("Stopped: the kernel was interrupted.")
    expect(run).to_be_enabled()

    method.select_option(label="feature_ablation")
    run.click()
    found = attribute(token_features(model, prompt), "feature_ablation")
    expect(words(view, "clean")).to_have_count(len(prompt.tokens))
    expect(view.locator(".l4-summary")).to_contain_text(
        f"{found.all_off:.3f} nats with all parts off, {found.all_on:.3f}".replace("-", "−")
    )
    strongest = int(abs(found.values).argmax())
    lab.assert_tells(view, words(view, "clean").nth(strongest), found.values[strongest])
    words(view, "clean").nth(2).click()
    lab.wait_for_selection(token=2)
    view.get_by_label("Parts").select_option(label="experts")
    run.click()
    expect(panel(view, "clean map").locator("canvas")).to_be_visible()


def test_ablate_shows_what_an_edit_does_and_takes_it_back(lab, model, prompt):
    view = lab.show("ablate")
    view.get_by_role("button", name="skip layer").click()
    run = l4.Replay(model, prompt).edited([E.SkipLayer(LAYER)])
    expect(view.locator(".l4-summary")).to_have_text(str(run.effect).replace("-", "−"))
    strongest = int(run.effect.kl.argmax())
    lab.assert_tells(view, words(view, "kl").nth(strongest), float(run.effect.kl[strongest]))
    clean, edited = (100 * x[TOKEN].softmax(-1) for x in (run.replay.logits, run.logits))
    first = rows_of(panel(view, "answers"))[0]
    best = int(edited.argmax())
    assert first[0] == visible(model.tokenizer.decode([best]))
    assert_reads(first[1], round(float(clean[best]), 1))
    assert_reads(first[2], round(float(edited[best]), 1))
    chosen = panel(lab.view("Router"), "chosen")
    expect(chosen).to_contain_text(f"rings: {sum(run.effect.flips.values())} flips")
    clean, other = routing_of(model, prompt), routing_in(run, prompt.tokens)
    row, flipped = np.argwhere(clean.expert[..., 0] != other.expert[..., 0])[0].tolist()
    lab.kernel(f"app.selection.layer, app.selection.token = {clean.layers[row]}, {flipped}")
    heard = "expert {} (clean: expert {})".format(
        *(each.expert[row, flipped, 0] for each in (other, clean))
    )
    expect(chosen.locator("canvas")).to_have_attribute("aria-label", re.compile(re.escape(heard)))
    lab.kernel(f"app.selection.layer = {LAYER}")
    words(view, "kl").nth(2).click()
    lab.wait_for_selection(token=2)

    view.get_by_text("Edits as text and code").click()
    expect(view.locator("textarea")).to_have_value(E.dumps([E.SkipLayer(LAYER)]))
    view.get_by_role("button", name="Undo").click()
    lab.wait_for("app.edits", ())
    expect(view.locator(".l4-summary")).to_have_text("No edits: this is the model as it is.")
    expect(view.get_by_role("button", name="skip layer")).not_to_have_class(
        re.compile("mod-active")
    )


def test_generate_writes_what_the_model_would_and_branches(lab, model, prompt):
    view = lab.show("generate")
    lab.kernel("app.views['generate']._temperature.value = 0.0")
    step = view.get_by_role("button", name="Step", exact=True)
    for count in (1, 2, 3):
        step.click()
        expect(words(view, "entropy")).to_have_count(count)
    text = l4.generate(model, prompt, max_new_tokens=3, temperature=0)
    assert "".join(words(view, "entropy").all_inner_texts()) == visible(text)
    ids = model.prompt(TEXT + text).input_ids
    p = model(ids)[0, len(prompt.tokens) : len(prompt.tokens) + 1].double().softmax(-1).detach()
    lab.assert_tells(view, words(view, "entropy").nth(1), float(-(p * p.log2()).sum()))

    lab.kernel("app.views['generate']._at.value = 1")
    view.get_by_role("button", name="Branch", exact=True).click()
    expect(words(view, "entropy")).to_have_count(2)
    assert rows_of(panel(view, "branches")) == [[text.strip()]]
    play = view.get_by_role("button", name="Play")
    play.click()
    expect(words(view, "entropy").nth(4)).to_be_visible()
    play.click()
    lab.wait_for("app.views['generate']._play.value", False)
    view.get_by_role("button", name="Look at it").click()
    written = "".join(prompt.tokens[1:]) + l4.generate(
        model, prompt, max_new_tokens=5, temperature=0
    )
    expect(
        words(lab.view("Router"), "strip").nth(len(model.prompt(written).tokens) - 1)
    ).to_be_visible()


def test_counterfactual_shows_every_experts_effect_and_routes_there(lab, model, prompt):
    view = lab.show("counterfactual")
    found = counterfactual(l4.Replay(model, prompt), TOKEN, read=TOKEN)
    canvas = panel(view, "effect").locator("canvas")
    start = f"Token {TOKEN} ‘{visible(prompt.tokens[TOKEN])}’ sent to each expert. "
    assert_heard(canvas, f"{start}layer {LAYER}, expert {EXPERT}: ", found.kl[LAYER, EXPERT])
    strongest = int(np.where(found.is_choice, 0, found.kl).argmax())
    layer, expert = divmod(strongest, found.kl.shape[1])
    click_cell(canvas, (layer, expert), found.kl.shape)
    lab.wait_for_selection(layer=layer, expert=expert)
    assert_heard(canvas, f"{start}layer {layer}, expert {expert}: ", found.kl[layer, expert])
    word = visible(model.tokenizer.token_text(int(found.top[layer, expert])))
    expect(panel(view, "words").locator("td.l4-selected")).to_have_text(word)
    view.get_by_role(
        "button", name=f"Send token {TOKEN} to expert {expert} in layer {layer}"
    ).click()
    lab.wait_for("app.edits", (E.Route(layer, TOKEN, expert),))
    chosen = panel(lab.view("Router"), "chosen").locator("canvas")
    expect(chosen).to_have_attribute(
        "aria-label", re.compile(f"layer {layer}, .*: expert {expert} \\(clean: expert \\d\\)$")
    )


def test_the_planner_shows_the_plan_of_its_controls(lab):
    view = lab.show("planner")
    view.get_by_label("GPU", exact=True).select_option(label=GPUS["a100"].name)
    view.get_by_label("batch").select_option(label="4")
    plan = Plan(SCOUT, GPUS["a100"], 1, "int4", "bf16")
    speed = plan.decode(4, 8192).tokens_per_second
    expect(view.locator(".l4-summary")).to_contain_text(f"at best {speed:,.0f} tokens/s")
    rows = rows_of(panel(view, "memory"))
    needed = plan.needed(4, 8192)
    assert [row[0] for row in rows] == [*needed, "together", "a GPU holds"]
    for row, size in zip(rows, [*needed.values(), sum(needed.values()), plan.usable], strict=True):
        assert_reads(row[1], size / 1e9)
    speeds = rows_of(panel(view, "speed"))
    assert_reads(speeds[0][1], speed)
    assert speeds[1][1] == f"{plan.prefill(8192).tokens_per_second:,.0f}"
    expect(panel(view, "decode").locator("svg path")).to_be_visible()


def test_the_difference_of_two_runs_stands_between_them(lab, model, prompt):
    lab.show("lens")
    edits = [E.SkipLayer(LAYER)]
    lab.kernel(f"app.edits = [l4.edits.SkipLayer({LAYER})]")
    sides = lab.on.page.locator("select").filter(has_text="beside the clean run")
    sides.select_option(label="beside the clean run")
    view = lab.view("Difference")
    expect(view).to_be_visible()
    replay = l4.Replay(model, prompt)
    run = replay.edited(edits)
    mine, beside = (x.float().log_softmax(-1) for x in (run.logits, replay.logits))
    kl = (beside.exp() * (beside - mine)).sum(-1)
    strongest = int(kl.argmax())
    lab.assert_tells(view, words(view, "kl").nth(strongest), float(kl[strongest]))
    clean = routing_of(model, prompt)
    with E.edited(model, edits):
        flips = (routing_of(model, prompt).expert != clean.expert).any(axis=-1)
    assert_bars(panel(view, "flips"), flips.sum(axis=1), "layer")
    words(view, "kl").nth(2).click()
    lab.wait_for_selection(token=2)
    expect(view).to_contain_text("What follows token 2")
    best = int(mine[2].argmax())
    row = rows_of(panel(view, "answers"))[0]
    assert row[0] == visible(model.tokenizer.token_text(best))
    assert_reads(row[1], round(100 * float(mine[2, best].exp()), 1))
    assert_reads(row[2], round(100 * float(beside[2, best].exp()), 1))
    expect(lab.on.page.get_by_text("the clean run", exact=True).first).to_be_visible()
    sides.select_option(label="alone")
    expect(view).to_be_hidden()


TOO_WIDE = """() => [...document.querySelectorAll(".l4-app .l4-of-table .l4-scroll")]
    .filter((table) => table.scrollWidth > table.clientWidth + 1)
    .map((table) => `${table.ariaLabel}: ${table.scrollWidth - table.clientWidth} px`)"""
WITHOUT_KERNEL = """grid => {
    grid.classList.add("jupyter-widgets-disconnected");
    const { display } = getComputedStyle(grid, "::before");
    grid.classList.remove("jupyter-widgets-disconnected");
    return display;
}"""


def test_tables_and_fields_have_the_room_that_they_need(lab):
    view = lab.show("experts", "lens", "planner", "attention", "ablate")
    lab.kernel(
        f"app.edits = [l4.edits.SkipLayer({LAYER})]; app.views['planner'].choices['GPUs'].value = 8"
    )
    attention, lens = lab.view("Attention (iRoPE)"), lab.view("Lens")
    expect(panel(attention, "summaries")).to_contain_text("clean sink")
    expect(panel(lens, "parts")).to_contain_text("edited (logits)")
    expect(panel(lab.view("Planner"), "speed")).to_contain_text("exchange (ms)")
    size = lab.on.page.viewport_size
    try:
        for width in (1280, 1440, 1920):
            lab.on.page.set_viewport_size({"width": width, "height": 1000})
            eventually(lambda: assert_equal(lab.on.page.evaluate(TOO_WIDE), []))
    finally:
        lab.on.page.set_viewport_size(size)
        lab.kernel("app.views['planner'].choices['GPUs'].value = 1")
    field = view.locator("textarea")
    if not field.is_visible():
        view.get_by_text("Edits as text and code").click()
    expect(view.get_by_role("textbox", name="JSON")).to_be_visible()
    assert field.evaluate("field => field.clientHeight") > 4 * 17  # lines
    assert lab.on.page.locator(".l4-app-grid").evaluate(WITHOUT_KERNEL) == "none"
    for name in ("Measure kinds of text", "Apply text"):
        box = lab.on.page.get_by_role("button", name=name).bounding_box()
        assert box["width"] < 250  # what its words take


def test_two_texts_stand_below_each_other_where_there_is_little_room(lab):
    lab.show()
    page, size = lab.on.page, lab.on.page.viewport_size
    lab.kernel("app.compare('two')")
    act = page.get_by_role("button", name="Compare", exact=True)
    expect(act).to_be_visible()
    try:
        for width in (700, 1400):
            page.set_viewport_size({"width": width, "height": 1000})
            eventually(lambda: assert_inside(act, page.locator(".l4-app").first))
    finally:
        page.set_viewport_size(size)


def assert_inside(part: Locator, whole: Locator) -> None:
    inner, outer = part.bounding_box(), whole.bounding_box()
    assert inner and outer and inner["x"] + inner["width"] <= outer["x"] + outer["width"]


def assert_equal(found: Any, expected: Any) -> None:
    assert found == expected


def test_nothing_keeps_people_from_using_a_view(lab):
    def assert_nothing_hinders():
        assert hindrances(lab.on.page, ".l4-app") == []

    lab.show(*[name for name in VIEWS if name != "router"])
    lab.kernel(f"app.edits = [l4.edits.SkipLayer({LAYER})]")
    expect(lab.view("Ablate").locator(".l4-summary")).to_contain_text("routing flips")
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        lab.on.page.evaluate(SET_THEME, theme)
        expect(lab.on.page.locator("body")).to_have_attribute("data-jp-theme-name", theme)
        eventually(assert_nothing_hinders)  # its colours are there a little later


def test_bars_lines_and_tables_are_walked_through_by_keyboard(lab):
    view = lab.show("experts")
    load = panel(view, "load").locator("svg")
    load.press("ArrowRight")
    lab.wait_for_selection(expert=EXPERT + 1, layer=LAYER)
    load.press("Home")
    lab.wait_for_selection(expert=0)
    table = panel(view, "balance").locator(".l4-scroll")
    table.press("ArrowDown")
    lab.wait_for_selection(layer=LAYER + 1)
    table.press("End")
    lab.wait_for_selection(layer=7)
    lab.kernel("app.views['experts'].measure()")
    panel(view, "bits").locator("svg").press("ArrowLeft")
    lab.wait_for_selection(layer=6)
    expect(load).to_be_visible()
    assert lab.kernel("print(app.selection.expert)") == "0"


def test_a_table_of_words_is_walked_through_by_keyboard(lab):
    table = panel(lab.show("lens"), "words").locator(".l4-scroll")
    rows = table.locator("tr", has=lab.on.page.locator("td"))
    rows.nth(1 + 2 * LAYER).locator("td").nth(3).click()  # after the attention of the layer
    lab.wait_for_selection(layer=LAYER)
    token = int(lab.kernel("print(app.selection.token)"))
    table.press("ArrowRight")
    lab.wait_for_selection(token=token + 1, layer=LAYER)
    table.press("ArrowDown")
    lab.wait_for_selection(token=token + 1, layer=LAYER + 1)
    for layer in (LAYER, LAYER - 1):  # of a layer's two rows, each leads to another layer
        table.press("ArrowUp")
        lab.wait_for_selection(token=token + 1, layer=layer)
    expect(table.locator("td.l4-selected")).to_have_count(1)
    table.press("Home")
    lab.wait_for_selection(token=0, layer=LAYER - 1)


PREVENTED = """(node, key) => {
    const event = new KeyboardEvent("keydown", { ...key, bubbles: true, cancelable: true });
    node.dispatchEvent(event);
    return event.defaultPrevented;
}"""


FOUND_BY_JUPYTERLAB = """(node, key) => {
    let isFree = false; // whether JupyterLab finds the key below no node that keeps its keys
    const look = ({ target }) => (isFree = !target.closest("[data-lm-suppress-shortcuts]"));
    const hold = (event) => (look(event), event.stopImmediatePropagation());
    document.addEventListener("keydown", hold, true);
    node.dispatchEvent(new KeyboardEvent("keydown", { ...key, bubbles: true }));
    document.removeEventListener("keydown", hold, true);
    return isFree;
}"""


def test_controls_and_places_are_told_as_they_are(lab):
    view = lab.show("ablate")
    skip = view.get_by_role("button", name="skip layer")
    expect(skip).to_have_attribute("aria-pressed", "false")
    skip.press("Enter")
    expect(skip).to_have_attribute("aria-pressed", "true")
    top_k = view.get_by_role("slider", name="top-k")
    expect(top_k).to_have_attribute("aria-valuetext", "1")
    strip = panel(view, "kl").get_by_role("listbox")
    strip.press("ArrowRight")
    expect(strip).to_have_attribute("aria-label", re.compile(r"^How far .* token 6 .*: .* nats$"))
    assert strip.evaluate("box => box.ariaActiveDescendantElement.ariaSelected") == "true"
    field = view.locator("textarea")
    was_open = field.is_visible()
    view.get_by_role("button", name="Edits as text and code").press("Space")
    expect(field).to_be_visible(visible=not was_open)
    chip = lab.on.page.get_by_role("button", name="Planner")
    for pressed in ("true", "false"):
        chip.press("Enter")
        expect(chip).to_have_attribute("aria-pressed", pressed)


def test_a_map_leaves_the_browser_its_keys(lab):
    canvas = panel(lab.show(), "chosen").locator("canvas")
    keys = [{"key": "0", "ctrlKey": True}, {"key": "ArrowLeft", "altKey": True}]
    assert [canvas.evaluate(PREVENTED, key) for key in keys] == [False, False]
    assert canvas.evaluate(PREVENTED, {"key": "ArrowLeft"})


FOCUSABLE = "a, button, input, select, summary, textarea, [tabindex]:not([tabindex='-1'])"
TAKES_LETTERS = """(nodes) => nodes.filter((node) => {
    node.focus();
    if (document.activeElement !== node) return false; // one that is hidden or disabled
    return !node.dispatchEvent(new KeyboardEvent("keydown",
        { key: "m", keyCode: 77, bubbles: true, cancelable: true }));
}).map((node) => node.outerHTML.slice(0, 120))"""


def test_whatever_has_the_focus_keeps_its_keys_from_jupyterlab(lab):
    lens, page = lab.show("ablate", "attention", "generate", "lens"), lab.on.page
    within = page.locator(".l4-app").locator(FOCUSABLE)
    assert within.count() > 60
    # JupyterLab would make text of the cell, and the lab would be gone.
    assert within.evaluate_all(TAKES_LETTERS) == []
    colour = lens.locator("select")
    for key, index in (("ArrowDown", 1), ("ArrowUp", 0)):
        colour.press(key)
        assert colour.evaluate("box => box.selectedIndex") == index


def test_keys_on_a_button_leave_the_cell_alone_and_can_still_run_it(lab):
    skip, page = lab.show("ablate").get_by_role("button", name="skip layer"), lab.on.page
    skip.click()
    for key in "ddabxm":
        page.keyboard.press(key)
    assert [cell["cell_type"] for cell in page.evaluate(NOTEBOOK_CELLS)] == ["code"]
    expect(skip).to_be_focused()
    for pressed, key in (("false", "Enter"), ("true", "Space")):
        skip.press(key)
        expect(skip).to_have_attribute("aria-pressed", pressed)
    for theirs in (
        {"key": "s", "keyCode": 83, "ctrlKey": True},
        {"key": "Enter", "shiftKey": True},
    ):
        assert skip.evaluate(FOUND_BY_JUPYTERLAB, theirs)


def test_whatever_has_the_focus_of_a_keyboard_has_a_ring(lab):
    lens, page = lab.show("ablate", "lens"), lab.on.page
    slider = lab.view("Ablate").get_by_role("slider", name="top-k")
    for control in (slider, lens.locator("input").first, lens.locator("select")):
        control.press("Shift+Tab")
        page.keyboard.press("Tab")
        expect(control).to_be_focused()
        expect(control).to_have_css("outline-style", "solid")
        expect(control).to_have_css("outline-width", "2px")


def test_buttons_keep_the_focus_of_who_presses_them(lab):
    run = lab.on.page.locator(".l4-prompt button").first
    field, text = lab.on.page.get_by_label("prompt").first, lab.kernel("print(app.bar.text.value)")
    field.fill("one two three")
    run.press("Enter")
    lab.wait_for("app.bar.text.value", "one two three")
    expect(run).to_be_focused()
    field.fill(text)
    run.press("Enter")
    lab.wait_for("app.bar.text.value", text)
    view = lab.show("attribution")
    view.get_by_role("button", name="Run", exact=True).press("Enter")
    stop = view.get_by_role("button", name="Cancel")
    expect(stop).to_be_focused()
    stop.press("Enter")
    expect(view.get_by_role("button", name="Run", exact=True)).to_be_focused()
