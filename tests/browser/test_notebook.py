"""The lab in Notebook 7: the same widgets, another page around them."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from .conftest import SHUT_DOWN, WINDOW, LabPage, served

pytestmark = pytest.mark.browser

TIMEOUT_MS = 120_000  # a busy machine must not fail a test
TOKEN = 7


@pytest.fixture
def notebook_page(browser: Browser, tmp_path) -> Iterator[LabPage]:
    context = browser.new_context(viewport=WINDOW)
    path = "notebooks/{name}"
    with served(tmp_path, "notebook", "JupyterNotebookApp", path=path) as server:
        page = LabPage(context.new_page(), server)
        yield page
        page.assert_clean()
        page.page.evaluate(SHUT_DOWN)
    context.close()


def test_views_follow_each_other_and_edits_in_notebook_7(notebook_page):
    notebook_page.open_notebook("03_the_lab.ipynb")
    page = notebook_page.page
    page.wait_for_load_state("networkidle")
    notebook_page.console_errors.clear()  # Notebook 7.6 makes one of its own while it starts
    notebook_page.run_all()
    strips = page.locator(".l4-view .l4-words")
    expect(strips.nth(2)).to_be_visible(timeout=TIMEOUT_MS)
    strips.first.locator("span").nth(TOKEN).click()
    for i in range(strips.count()):
        expect(strips.nth(i).locator("span").nth(TOKEN)).to_have_class("l4-selected")
    ablate = page.locator(".l4-view").filter(has=page.get_by_text("Ablate", exact=True))
    ablate.get_by_role("button", name="skip layer").click()
    caption = page.locator("[data-panel=chosen] figcaption").first
    expect(caption).to_contain_text(re.compile("rings: [1-9]"), timeout=TIMEOUT_MS)
