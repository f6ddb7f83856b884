"""JupyterLab in a real Chromium: `lab_page` opens a notebook, runs it and watches the browser.

A test reads::

    pytestmark = pytest.mark.browser

    def test_the_strip_shows_the_typed_words(lab_page):
        lab_page.open_notebook("00_start_here.ipynb")
        lab_page.run_all()
        lab_page.page.get_by_label("prompt").fill("two times two")
        ...

After the test the fixture asserts that no cell failed or wrote to stderr, that the console is free
of errors and that nothing was asked of another host.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120  # generous, because a busy machine must not fail a test
WINDOW = {"width": 1440, "height": 1000}

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page
    "docmanager-extension/plugin": {"autosave": False},
}
OPEN_NOTEBOOK = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const isThere = () => app.shell.currentWidget?.sessionContext;
    while (!isThere()) await new Promise(done => setTimeout(done, 50));
    const widget = app.shell.currentWidget;
    await widget.context.ready;
    await widget.sessionContext.ready;
    await widget.sessionContext.session.kernel.info;
}"""
NOTEBOOK_CELLS = "() => window.jupyterapp?.shell.currentWidget?.context.model.toJSON().cells ?? []"
SHUT_DOWN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"


@dataclass(frozen=True)
class LabServer:
    """A running JupyterLab, or Notebook 7, over a copy of the notebooks."""

    url: str  # ends in a slash
    token: str
    folder: Path  # the copied notebooks
    path: str = "lab/workspaces/{workspace}/tree/{name}"  # of a notebook


@dataclass
class LabPage:
    """A browser page on JupyterLab; `page` is Playwright's."""

    page: Page
    server: LabServer
    console_errors: list[str] = field(default_factory=list)
    foreign_requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(1000 * TIMEOUT_S)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        self.page.on("request", self._note_request)
        self.page.on("websocket", self._note_request)

    def open_notebook(self, name: str) -> None:
        """Open a notebook in a fresh workspace and wait until its kernel answers."""
        workspace = secrets.token_hex(4)  # a known one would restore its old tabs
        path = self.server.path.format(workspace=workspace, name=quote(name))
        self.page.goto(f"{self.server.url}{path}?token={self.server.token}")
        self.page.wait_for_function("() => window.jupyterapp?.shell.currentWidget")
        self.page.evaluate(OPEN_NOTEBOOK)

    def run_all(self) -> None:
        """Run all cells, wait for the last, and fail at the first that raised."""
        run = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
        self.page.evaluate(run)
        for output in self.outputs():
            assert output["output_type"] != "error", "\n".join(output["traceback"])

    def outputs(self) -> list[dict[str, Any]]:
        """Return the outputs of all cells, as a notebook file would store them."""
        cells = self.page.evaluate(NOTEBOOK_CELLS)
        return [output for cell in cells for output in cell.get("outputs", [])]

    def assert_clean(self) -> None:
        """Assert an empty stderr and console, and that no other host was asked for anything."""
        stderr = [output["text"] for output in self.outputs() if output.get("name") == "stderr"]
        assert stderr == []
        assert self.console_errors == []
        assert self.foreign_requests == []

    def _note_console(self, message: Any) -> None:
        if message.type == "error":
            self.console_errors.append(f"{message.text} ({message.location.get('url')})")

    def _note_request(self, request: Any) -> None:
        host = self.server.url.removeprefix("http")
        own = tuple(scheme + host for scheme in ("http", "ws"))
        if not request.url.startswith((*own, "data:", "blob:")):
            self.foreign_requests.append(request.url)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium; without one the test is skipped, or fails where CI=true."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    for name in filter(None, names):
        if path := shutil.which(name):
            return path
    reason = "no Chromium: install it, or name it in the variable CHROMIUM"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")  # its event loop must not outlive these tests
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    with served(tmp_path_factory.mktemp("lab"), "jupyterlab", "LabApp") as server:
        yield server


@contextmanager
def served(home: Path, module: str, app: str, **options: str) -> Iterator[LabServer]:
    """Serve a copy of the notebooks by a Jupyter application, which keeps all it writes in home."""
    for name, settings in LAB_SETTINGS.items():
        file = home / "lab" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(shutil.copytree(ROOT / "notebooks", home / "notebooks"))
    server = LabServer(f"http://127.0.0.1:{port}/", secrets.token_hex(16), folder, **options)
    theirs = {key: value for key, value in os.environ.items() if key != "LLAMA4_LAB_BACKEND"}
    environment = theirs | {  # kernels choose it as anyone's do
        "JUPYTERLAB_SETTINGS_DIR": str(home / "lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_TOKEN": server.token,
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [
        *(sys.executable, "-m", module, "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        *("--LabApp.extension_manager=readonly", f"--{app}.expose_app_in_browser=True"),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--ServerApp.root_dir={folder}",
    ]
    log = home / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_until_served(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


def wait_until_served(server: LabServer, process: subprocess.Popen[bytes], log: Path) -> None:
    status = urllib.request.Request(
        f"{server.url}api/status", headers={"Authorization": f"token {server.token}"}
    )
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(status, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    pytest.fail(f"Jupyter did not start:\n{log.read_text(encoding='utf-8')}")


@pytest.fixture
def lab_page(browser: Browser, lab_server: LabServer) -> Iterator[LabPage]:
    context = browser.new_context(viewport=WINDOW)
    lab_page = LabPage(context.new_page(), lab_server)
    try:
        yield lab_page
        lab_page.assert_clean()
    finally:
        lab_page.page.evaluate(SHUT_DOWN)
        context.close()


def hindrances(page: Page, within: str | None = None) -> list[str]:
    """Return what axe finds that keeps people from using a page (WCAG 2.1 AA, good practice)."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
    found = Axe().run(page, within, {"runOnly": tags, "resultTypes": ["violations"]})
    return [
        f"{each['id']}: {each['help']} – {node['html']}"
        for each in found.response["violations"]
        for node in each["nodes"]
    ]
