"""A newcomer opens the first notebook, types a text and sees which expert reads each token.

With ``LAB_SCREENSHOTS=folder`` in the environment the pictures of the README are written there.
"""

import os
import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import llama4_lab as l4
from llama4_lab.analysis.routing import routing_of
from llama4_widgets.explore import explore
from llama4_widgets.words import decimals, describe

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
SCREENSHOTS = os.environ.get("LAB_SCREENSHOTS")
THEME = "(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })"

TIMEOUT_S = 60  # a busy machine must not fail a test
expect.set_options(timeout=1000 * TIMEOUT_S)


@pytest.fixture(scope="module")
def model() -> l4.Llama4:
    return l4.load("mini")


def photograph(page: Page, explorer: Locator) -> None:
    """Write the pictures of the README, if they are wanted."""
    if not SCREENSHOTS:
        return
    usual = page.viewport_size
    page.set_viewport_size({"width": 1440, "height": 2400})
    page.locator(".js-plotly-plot").first.screenshot(path=Path(SCREENSHOTS, "domains.png"))
    for theme in ("Dark", "Light"):
        page.evaluate(THEME, f"JupyterLab {theme}")
        name = f"router-explorer-{theme.lower()}.png"
        explorer.screenshot(path=Path(SCREENSHOTS, name), animations="disabled")
    page.set_viewport_size(usual)


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
    explorer = page.locator(".l4-router").first
    said = explorer.get_by_role("status")
    photograph(page, explorer)

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

    row = routing.row(6)
    numbers = [int(number) for number in explorer.locator("sub").all_inner_texts()]
    assert numbers == routing.expert[row, :, 0].tolist()
    bars = explorer.get_by_role("img").first
    chosen = routing.expert[row, 4, 0]
    assert f"expert {chosen}: {decimals(float(routing.score[row, 4, 0]))}" in bars.get_attribute(
        "aria-label"
    )
    wait_until_printed(
        page, "print(explorer.layer, explorer.token, repr(explorer.text))", f"6 4 {TEXT!r}"
    )

    words.nth(9).hover()
    expect(said).to_have_text(describe(routing, 6, 9))
    assert page.evaluate(IN_KERNEL, "print(explorer.token)") == "4"


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
    expect(page.get_by_label("prompt")).to_be_hidden()
    page.get_by_role("listbox").focus()
    for key in ("ArrowUp", "Home", "ArrowRight"):
        page.keyboard.press(key)
    expect(said).to_have_text(describe(explorer.routing, 1, 1))
    page.get_by_label("layer", exact=True).fill("7")
    expect(said).to_have_text(describe(explorer.routing, 7, 1))
    assert asked == [(tmp_path / "routing.html").as_uri()]
    assert errors == []
    context.close()
