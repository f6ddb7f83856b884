"""``llama4-lab open --app``: the lab as a page of its own, by Voila."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

pytest.importorskip("voila", reason='Voila is not installed: pip install "llama4-lab[app]"')
pytestmark = pytest.mark.browser

TIMEOUT_MS = 120_000  # a busy machine must not fail a test
TOKEN = 7


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    command = [sys.executable, "-m", "llama4_lab.cli", "open", "--app"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(
            r"The lab: (http://127\.0\.0\.1:\d+/\?token=\w+)  \(Ctrl-C .*\)\n", line
        )
        assert found, line
        yield found[1]
    finally:
        process.send_signal(2)  # Ctrl-C
        assert process.wait(timeout=TIMEOUT_MS / 1000) == 0


def test_the_lab_is_a_page_of_its_own_and_asks_no_other_host(browser: Browser, address):
    context = browser.new_context(viewport={"width": 1440, "height": 1200})
    page, wrong = context.new_page(), []
    page.set_default_timeout(TIMEOUT_MS)
    own = address.split("?")[0].removeprefix("http")
    is_own = re.compile(f"(http|ws){re.escape(own)}|data:|blob:")

    def note(text: str, is_wrong: bool) -> None:
        if is_wrong:
            wrong.append(text)

    page.on("request", lambda request: note(request.url, not is_own.match(request.url)))
    page.on("console", lambda message: note(message.text, message.type == "error"))
    page.on("pageerror", lambda error: note(str(error), True))
    page.goto(address)
    strips = page.locator(".l4-view .l4-words")
    expect(strips.nth(1)).to_be_visible(timeout=TIMEOUT_MS)
    strips.first.locator("span").nth(TOKEN).click()
    for i in range(strips.count()):
        expect(strips.nth(i).locator("span").nth(TOKEN)).to_have_class("l4-selected")
    follows = page.get_by_text(re.compile(f"What follows token {TOKEN} "))
    expect(follows.first).to_be_visible(timeout=TIMEOUT_MS)  # computed in the kernel
    assert page.locator(".jp-InputArea-editor:visible").count() == 0
    assert wrong == []
    context.close()
