"""A kept page in a real Firefox, which needs no driver: it tells what it finds to a server here."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import pytest

import llama4_lab as l4
from llama4_lab.train import scenes
from llama4_widgets.app import LabApp

pytestmark = pytest.mark.browser

TIMEOUT_S = 120  # a busy machine must not fail a test
TOKEN = 5
PREFERENCES = {  # of a fresh profile; all but this machine is behind a proxy that is not there
    "browser.aboutwelcome.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.proxy.type": 1,
    "network.proxy.http": "127.0.0.1",
    "network.proxy.http_port": 9,
    "network.proxy.ssl": "127.0.0.1",
    "network.proxy.ssl_port": 9,
}
TELL = """<script>
const wrong = [];
addEventListener("error", (event) =>
    event.message.startsWith("ResizeObserver") || wrong.push(event.message));
addEventListener("unhandledrejection", ({ reason }) => wrong.push(String(reason)));
console.error = (...words) => wrong.push(words.join(" "));
const all = (css, within = document) => [...within.querySelectorAll(css)];
const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
const chosen = () => all(".l4-words").map((strip) =>
    all("span", strip).findIndex((word) => word.classList.contains("l4-selected")));
async function look() {
    while (!all("canvas[aria-label]").length) await frame();
    await frame();
    const strip = all(".l4-words")[0];
    all("span", strip)[TOKEN].click();
    const clicked = chosen();
    strip.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
    const map = all("[data-panel=map] canvas")[0];
    const before = map.toDataURL();
    const { left, top } = map.getBoundingClientRect();
    map.dispatchEvent(new WheelEvent("wheel", {
        clientX: left + 200, clientY: top + 200, deltaY: -3, deltaMode: 1, cancelable: true }));
    const special = all(".l4-words span").filter((word) => word.textContent.startsWith("<|"));
    return {
        wrong, clicked, stepped: chosen(), zoomed: map.toDataURL() !== before,
        blank: all("canvas, svg").filter((each) => each.matches("canvas")
            ? !each.getContext("2d").getImageData(0, 0, each.width, each.height).data.some(Boolean)
            : !each.childElementCount).length,
        pictures: all(".l4-picture img").map((picture) => picture.naturalWidth),
        lines: Math.max(...special.map((word) => word.getClientRects().length)),
        wide: document.documentElement.scrollWidth - innerWidth,
    };
}
addEventListener("load", async () => {
    const found = await look().catch((error) => ({ wrong: [...wrong, String(error)] }));
    fetch("found", { method: "POST", body: JSON.stringify(found) });
});
</script>"""


@pytest.fixture
def firefox() -> str:
    names = [os.environ.get("FIREFOX"), "firefox-esr", "firefox"]
    for name in filter(None, names):
        if path := shutil.which(name):
            return path
    pytest.skip("no Firefox: install it, or name it in the variable FIREFOX")


class Server(ThreadingHTTPServer):
    """Serves one page, and keeps what that page tells."""

    def __init__(self, page: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.page = page
        self.asked, self.told = False, SimpleQueue[dict[str, Any]]()


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked = True
        self.answer(self.server.page.encode())

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.told.put(json.loads(self.rfile.read(length)))
        self.answer(b"")

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    app = LabApp(l4.load("mini"), shown=["router", "attention", "image", "lens"])
    seen = scenes.sample(np.random.default_rng(3), "colour")
    app.run(seen.question, seen.images)
    app.to_html(tmp_path / "lab.html")
    page = (tmp_path / "lab.html").read_text(encoding="utf-8").replace("<title>", TELL + "<title>")
    with Server(page.replace("[TOKEN]", f"[{TOKEN}]")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_kept_page_is_drawn_and_followed_in_firefox(firefox: str, server: Server, tmp_path: Path):
    profile = tmp_path / "profile"
    profile.mkdir()
    lines = (
        f"user_pref({json.dumps(name)}, {json.dumps(PREFERENCES[name])});" for name in PREFERENCES
    )
    (profile / "user.js").write_text("\n".join(lines))
    address = f"http://127.0.0.1:{server.server_port}/"
    command = [firefox, "--headless", "--no-remote", "--profile", str(profile), address]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not server.asked and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if not server.asked:
            pytest.skip("this Firefox opens no page with a profile of its own, as Ubuntu's snap")
        found = server.told.get(timeout=TIMEOUT_S)
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)
    assert found["wrong"] == []
    assert len(found["clicked"]) > 1
    assert set(found["clicked"]) == {TOKEN}
    assert set(found["stepped"]) == {TOKEN + 1}
    assert found["zoomed"]  # by a wheel that counts in lines
    assert found["blank"] == 0
    assert found["pictures"]
    assert all(width > 0 for width in found["pictures"])
    assert found["lines"] == 1
    assert found["wide"] <= 0
