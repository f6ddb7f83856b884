"""A newcomer opens the first notebook, types a text and sees which expert reads each token."""

import re
import time

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import llama4_lab as l4
from llama4_lab.analysis.routing import routing_of
from llama4_widgets.explore import explore
from llama4_widgets.words import describe

pytestmark = pytest.mark.browser

TEXT = "They sat in the garden.\nfor x in range(9):\n    print(x)"
IN_KERNEL = """async (code) => {
    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({ code });
    let printed = "";
    future.onIOPub = (message) => (printed += message.content.text ?? "");
    await future.done;
    return printed.trim();
}"""
CELLS = """() => {
    const { activeCellIndex, widgets } = jupyterapp.shell.currentWidget.content;
    return [activeCellIndex, widgets.length];
}"""

TIMEOUT_S = 60  # a busy machine must not fail a test
expect.set_options(timeout=1000 * TIMEOUT_S)


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return l4.load("mini")


def bars(explorer: Locator, panel: str) -> list[str]:
    """What a screen reader hears of bars: ``expert 0: 0.12``."""
    heard = explorer.locator(f"[data-panel={panel}] svg").get_attribute("aria-label")
    return re.split(r", (?=expert)", heard)


def wait_until_printed(page: Page, code: str, expected: str) -> None:
    """Run code in the kernel until it prints what is expected: a widget's state follows the page
    one message at a time.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while (printed := page.evaluate(IN_KERNEL, code)) != expected:
        assert time.monotonic() < deadline, f"{printed!r} instead of {expected!r}"
        page.wait_for_timeout(50)


def test_a_typed_text_shows_the_experts_that_the_library_computes(lab_page, model):
    page = lab_page.page
    lab_page.open_notebook("00_start_here.ipynb")
    lab_page.run_all()
    explorer = page.locator(".l4-view").first
    said = explorer.get_by_role("status")

    prompt = explorer.get_by_label("prompt")
    first, *others = TEXT.splitlines()
    prompt.fill(first)
    for line in others:
        prompt.press("Shift+Enter")
        page.keyboard.type(line)
    prompt.press("Enter")
    routing = routing_of(model, model.prompt(TEXT))
    words = explorer.get_by_role("option")
    expect(words).to_have_count(len(routing.tokens))
    expect(prompt).to_have_value(TEXT)

    explorer.get_by_label("layer", exact=True).fill("4")
    words.nth(5).click()
    expect(said).to_have_text(describe(routing, 4, 5))
    cells = page.evaluate(CELLS)
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "d", "d"):
        page.keyboard.press(key)
    expect(said).to_have_text(describe(routing, 6, 4))
    assert page.evaluate(CELLS) == cells, "a key in the explorer also moved the notebook"
    strip = explorer.get_by_role("listbox")
    expect(strip).to_be_focused()  # with a ring of 3 pixels, which the view's box would clip
    left = [each.bounding_box()["x"] for each in (explorer, strip)]
    assert left[1] - left[0] >= 3

    row = routing.row(6)
    numbers = [int(word.get_attribute("data-value")) for word in words.all()]
    assert numbers == routing.expert[row, :, 0].tolist()
    chosen = routing.expert[row, 4, 0]
    bar = bars(explorer, "probability")[chosen]
    assert float(bar.split()[-1]) == pytest.approx(float(routing.score[row, 4, 0]), rel=0.0051)
    load = explorer.locator("[data-panel=load] svg")
    assert load.locator(".l4-chosen").count() == 1
    assert load.locator(".l4-reference").count() == 1
    share = float(bars(explorer, "load")[chosen].split()[-2])
    assert share == pytest.approx(100 * float(routing.load[row, chosen]), rel=0.0051)
    wait_until_printed(
        page, "print(explorer.layer, explorer.token, repr(explorer.text))", f"6 4 {TEXT!r}"
    )

    words.nth(9).hover()
    expect(said).to_have_text(describe(routing, 6, 9))
    looked_at = routing.expert[row, 9, 0]
    best = float(bars(explorer, "probability")[looked_at].split()[-1])
    assert best == pytest.approx(float(routing.score[row, 9, 0]), rel=0.0051)
    assert page.evaluate(IN_KERNEL, "print(explorer.token)") == "4"
    load.locator("g").nth(looked_at).hover()
    expect(said).to_have_text(describe(routing, 6, 4))
    bright = explorer.locator("[role=option]:not(.l4-dim)")
    expect(bright).to_have_count(int((routing.expert[row, :, 0] == looked_at).sum()))


def test_a_text_that_cannot_be_run_is_answered_in_the_view(lab_page):
    page = lab_page.page
    lab_page.open_notebook("00_start_here.ipynb")
    lab_page.run_all()
    explorer = page.locator(".l4-view").first
    count = int(page.evaluate(IN_KERNEL, "print(len(explorer.routing.tokens))"))
    expect(explorer.get_by_role("option")).to_have_count(count)
    prompt = explorer.get_by_label("prompt")
    prompt.fill("1 2 3 4 5 6 7 8 " * 400)
    prompt.press("Enter")
    expect(explorer.get_by_role("alert")).to_contain_text("shows at most 4096: shorten it")
    expect(explorer.get_by_role("option")).to_have_count(count)
    assert page.evaluate(IN_KERNEL, "print(len(explorer.routing.tokens))") == str(count)
    prompt.fill("no more")
    explorer.get_by_role("button", name="Run").click()
    expect(explorer.get_by_role("alert")).to_be_hidden()
    wait_until_printed(page, "print(explorer.text)", "no more")


def test_of_a_long_text_the_page_gets_what_is_selected(lab_page, model):
    page = lab_page.page
    lab_page.open_notebook("00_start_here.ipynb")
    lab_page.run_all()
    explorer = page.locator(".l4-view").first
    text = 40 * TEXT
    routing = routing_of(model, model.prompt(text))
    explorer.get_by_label("prompt").fill(text)
    explorer.get_by_label("prompt").press("Enter")
    words = explorer.get_by_role("option")
    expect(words).to_have_count(len(routing.tokens))
    for layer, token in ((3, 500), (0, 499)):
        explorer.get_by_label("layer", exact=True).fill(str(layer))
        words.nth(token).click()
        where = f"layer {layer}, token {token} "
        expect(explorer.get_by_role("status")).to_contain_text(where)
        expect(explorer.locator(".l4-late")).to_have_count(0)
        expect(explorer.get_by_role("status")).to_have_text(describe(routing, layer, token))
        found = [float(bar.split()[-1]) for bar in bars(explorer, "probability")]
        expected = 1 / (1 + np.exp(-routing.logits[layer, token]))
        assert found == pytest.approx(expected.tolist(), abs=0.003)  # one of 254 steps


def test_an_exported_page_works_without_kernel_and_network(browser: Browser, model, tmp_path):
    explorer = explore(model, TEXT, layer=2, token=-1)
    explorer.to_html(tmp_path / "routing.html")
    context = browser.new_context()
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "routing.html").as_uri())

    last = len(explorer.routing.tokens) - 1
    said = page.get_by_role("status")
    expect(said).to_have_text(describe(explorer.routing, 2, last))
    expect(page.get_by_label("prompt")).to_have_count(0)
    page.get_by_role("listbox").focus()
    for key in ("ArrowUp", "Home", "ArrowRight"):
        page.keyboard.press(key)
    expect(said).to_have_text(describe(explorer.routing, 1, 1))
    page.get_by_label("layer", exact=True).fill("7")
    expect(said).to_have_text(describe(explorer.routing, 7, 1))
    words = page.get_by_role("option")
    words.first.click()  # a long word, and a long sentence
    for width in range(480, 680, 20):
        page.set_viewport_size({"width": width, "height": 900})
        page.mouse.move(0, 0)
        expect(said).to_contain_text("layer 7, token 0 ")
        before = words.nth(5).bounding_box()
        words.nth(5).hover()
        expect(said).to_contain_text("layer 7, token 5 ")
        assert words.nth(5).bounding_box() == before, "words move away from the pointer"
    assert asked == [(tmp_path / "routing.html").as_uri()]
    assert errors == []
    context.close()
