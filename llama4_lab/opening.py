"""Notebooks on screen: in JupyterLab, or by Voila as a page of its own."""

import json
import logging
import os
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4_lab.model import Llama4

STANDALONE = Path(__file__).parent / "standalone"  # the lab's page, and Voila's template for it
_HERE = "127.0.0.1"
_ENCRYPTED = "--KernelManager.transport_encryption=auto"
_OF_NOTEBOOK = "@jupyter-notebook/lab-extension"
_MODEL = "LLAMA4_LAB_MODEL"  # tells the lab's page what to load
_FOR_KERNELS = {  # as `./lab` has it
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning pools of torch and numba slow each other down
    # glibc gives large blocks back to the system at once, and every value that a trace keeps has to
    # be paged in anew, which costs more than computing it: up to 256 MB stay.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
}


def open_notebook(notebook: Path | None = None, port: int | None = None) -> None:
    """Open JupyterLab on a notebook, or on the current folder, until Ctrl-C.

    Raises:
        FileNotFoundError, RuntimeError: a notebook or JupyterLab that is not there.
    """
    _require("jupyterlab", "JupyterLab", "lab")
    command = [sys.executable, "-m", "jupyterlab", f"--ip={_HERE}", "--ServerApp.answer_yes=True"]
    command += [_ENCRYPTED, "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    if getattr(os, "geteuid", lambda: 1)() == 0:  # as in a container
        command.append("--allow-root")
    if port is not None:
        command.append(f"--port={port}")
    if notebook is not None:
        command.append(str(_found(notebook)))
    _set_for_kernels()
    if sys.platform == "win32":  # where execv returns to the shell at once, and cuts at spaces
        started = subprocess.Popen(command)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(started.wait())
    os.execv(sys.executable, command)  # JupyterLab itself hears Ctrl-C


def open_page(
    notebook: Path | None = None, port: int | None = None, model: dict[str, Any] | None = None
) -> None:
    """Serve what a notebook shows, without its code, until Ctrl-C; None is the lab.

    `model` has the arguments of `llama4_lab.load` for the lab's model; None is ``mini``.

    Whoever opens the page has a kernel of their own. It is served to this machine alone, with a
    token, and asks nothing of other hosts.

    Raises:
        FileNotFoundError, RuntimeError: a notebook or Voila that is not there.
    """
    _require("voila", "Voila", "app")
    notebook = _found(notebook or STANDALONE / "lab.ipynb")
    paths = [str(STANDALONE), os.environ.get("JUPYTER_PATH", "")]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, paths))
    _set_for_kernels()
    if model is not None:
        os.environ[_MODEL] = json.dumps(model)

    class Page(import_module("voila.app").Voila):
        def launch_browser(self) -> None:
            address = f"http://{_HERE}:{self.port}/?token={self.identity_provider.token}"
            print(f"The lab: {address}  (Ctrl-C stops it)", flush=True)

    page = Page(ip=_HERE, auto_token=True, log_level=logging.ERROR)
    options = ["--template=llama4_lab", _ENCRYPTED]
    # Where Notebook 7 is installed, what it adds to JupyterLab fails on a page of Voila.
    options += [f"--VoilaConfiguration.extension_denylist={_OF_NOTEBOOK}"]
    page.initialize([str(notebook), *options, *([f"--port={port}"] if port else [])])
    page.start()


def chosen_model() -> "Llama4":
    """Load the model that `open_page` was given, in a kernel that it started."""
    from llama4_lab.checkpoint import load

    return load(**json.loads(os.environ.get(_MODEL, '{"name_or_folder": "mini"}')))


def _set_for_kernels() -> None:
    for name, value in _FOR_KERNELS.items():
        os.environ.setdefault(name, value)


def _require(module: str, name: str, extra: str) -> None:
    if find_spec(module) is None:
        raise RuntimeError(f'{name} is not installed: pip install "llama4-lab[{extra}]"')


def _found(notebook: Path) -> Path:
    if not notebook.is_file():
        raise FileNotFoundError(f"there is no notebook {notebook}")
    return notebook
