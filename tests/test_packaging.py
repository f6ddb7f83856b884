"""The pins, the conda file, the wheel and the `lab` script agree with pyproject.toml."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PIP_BLOCK = ENVIRONMENT["dependencies"][-1]["pip"]
SYSTEMS = {
    "this": {},
    "Windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
    "macOS": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def requirements(*extras: str) -> list[Requirement]:
    """The requirements of the core and of the given extras."""
    optional = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines]


def constraints() -> dict[str, Requirement]:
    """The pins of constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def closure(names: set[str], system: dict[str, str]) -> set[str]:
    """Everything that the named installed distributions require, themselves included."""
    seen: set[str] = set()
    todo = [(name, "") for name in names]
    while todo:
        name, extra = todo.pop()
        seen.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # it is another system's
            lines = []
        for line in lines:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate(system | {"extra": extra}):
                child = canonicalize_name(needed.name)
                todo += [(child, asked) for asked in ["", *needed.extras] if child not in seen]
    return seen


def test_constraints_hold_one_version_inside_each_range_of_pyproject():
    pins = constraints()
    for needed in requirements("lab", "app", "test"):
        (pin,) = pins[canonicalize_name(needed.name)].specifier
        assert pin.operator == "==", f"{pin} is no exact pin"
        assert needed.specifier.contains(pin.version), f"{needed} excludes the pin {pin}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_constraints_cover_every_package_that_an_install_brings(system):
    direct = {canonicalize_name(needed.name) for needed in requirements("lab", "test")}
    ours = closure(direct, SYSTEMS[system]) - {"setuptools", "pip", "triton"}
    missing = {
        name for name in ours - set(constraints()) if not name.startswith(("nvidia-", "cuda-"))
    }
    assert not missing, f"constraints.txt lacks {sorted(missing)}"


def test_pins_take_every_python_that_pyproject_allows():
    """Debian 12 has Python 3.11.2, which is older than what some packages ask for."""
    (oldest,) = SpecifierSet(PROJECT["requires-python"])
    for name, pin in constraints().items():
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        if pin.specifier.contains(found["Version"].split("+")[0]):
            asked = found.get("Requires-Python") or ""
            assert SpecifierSet(asked).contains(f"{oldest.version}.0"), f"{pin} asks for {asked}"


def test_constraints_serve_cpu_and_cuda_machines_alike():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^\S*(\+cpu|@ |nvidia-|cuda-|triton)|^-e", text, re.MULTILINE)


def test_conda_takes_only_python_and_pip_and_leaves_the_rest_to_pyproject():
    python, pip, _ = ENVIRONMENT["dependencies"]
    assert python.split("=")[0] == "python"
    assert pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1])
    assert PIP_BLOCK == ["-c constraints.txt", "-e .[lab]"]


def test_installed_packages_satisfy_pyproject_and_the_pins():
    """Resolve the pip block of environment.yml against what is installed, without an index."""
    pins = constraints()
    for needed in requirements("lab"):
        version = metadata.version(needed.name).split("+")[0]
        assert needed.specifier.contains(version), f"{needed} is installed as {version}"
        assert pins[canonicalize_name(needed.name)].specifier.contains(version), (
            f"{needed.name} {version} is installed: another version than constraints.txt pins"
        )


@pytest.mark.slow
def test_pip_block_of_the_conda_file_resolves(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    probe = [*pip, "download", "-q", "--no-deps", "--retries=0", "-d", str(tmp_path), "einops"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no package index answers; runs again with a network")
    shutil.copy(ROOT / "constraints.txt", tmp_path)  # conda writes the block beside the pins, too
    block = tmp_path / "pip_block.txt"
    block.write_text("\n".join(PIP_BLOCK).replace("-e .", f"-e {ROOT}"))
    dry_run = [*pip, "install", "-q", "--dry-run", "-r", str(block)]
    result = subprocess.run(dry_run, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_wheel_holds_exactly_our_two_packages_and_the_shipped_models(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"llama4_lab", "llama4_widgets"}
    assert {"llama4_lab/py.typed", "llama4_widgets/py.typed"} <= names
    shipped = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "llama4_lab" / "models").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    standalone = {"lab.ipynb", "voila/templates/llama4_lab/index.html.j2"}
    assert {f"llama4_lab/standalone/{name}" for name in standalone} <= names
    assert shipped <= names, f"the wheel lacks {sorted(shipped - names)}"


# --- the script ------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A folder with only what the script reads, and a `bin` of stand-ins that precedes PATH."""
    for name in ("lab", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(checkout: Path, name: str, script: str) -> Path:
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def lab(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(checkout / "lab"), *arguments],
        env=os.environ | {"PATH": path, "LAB_PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


# A Python whose `-m venv` makes a folder that holds itself, whose `-m pip install` obeys $PIP_RC,
# which cannot compile, and whose jupyterlab says that it serves; calls leave lines in calls.log.
FAKE_PYTHON = r"""
case "$1 $2 $3" in
  *jupyterlab*) shift 2; echo "jupyterlab $*" >>../bin/calls.log; mkdir -p "$JUPYTER_RUNTIME_DIR"
    printf '{"token": "%s", "url": "http://127.0.0.1:9/"}' "$JUPYTER_TOKEN" \
      >"$JUPYTER_RUNTIME_DIR/jpserver-$$.json" ;;
  "-c "*LOADING*) echo compile >>bin/calls.log; exit 1 ;;
  "-c "*) echo "${FAKE_VERSION:-3.11}" ;;
  "-m venv "*) echo venv >>bin/calls.log; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install") echo pip >>bin/calls.log; echo "$PIP_SAYS"
    [ "$PIP_RC" != kill ] || kill -9 $PPID; exit "${PIP_RC:-0}" ;;
esac
"""


def calls(checkout: Path) -> list[str]:
    log = checkout / "bin" / "calls.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.split(" ")[0] for line in lines]


@pytest.fixture
def fake_python(checkout):
    return str(stand_in(checkout, "fake-python", FAKE_PYTHON))


def test_help_names_the_three_commands(checkout):
    result = lab(checkout, "help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("./lab ", "./lab test", "./lab check"))


def test_unknown_command_is_refused(checkout):
    assert lab(checkout, "tset").stderr == "lab: unknown command 'tset': ./lab help lists them.\n"


def test_an_old_python_is_named_with_the_way_out(checkout):
    old = stand_in(checkout, "old-python", "echo 3.10")
    assert lab(checkout, LAB_PYTHON=str(old)).stderr.splitlines()[-1] == (
        f"lab: Python 3.11 or newer is needed, but {old} is Python 3.10. "
        "Install one, or name it: LAB_PYTHON=/path/to/python3.11 ./lab"
    )


def test_a_missing_python_is_named_with_the_way_out(checkout):
    assert lab(checkout, LAB_PYTHON="/no/python").stderr.splitlines()[-1] == (
        "lab: Python 3.11 or newer is needed, but /no/python does not run. "
        "Install one, or name it: LAB_PYTHON=/path/to/python3.11 ./lab"
    )


def test_a_full_disk_is_reported_before_anything_is_installed(checkout, fake_python):
    stand_in(checkout, "df", "printf 'Filesystem\\n/dev/x 9 9 2097152 9 /\\n'")
    assert lab(checkout, LAB_PYTHON=fake_python).stderr.splitlines()[-1] == (
        f"lab: the disk has 2048 MB free at {checkout}, the set-up needs 3 GB: "
        "make room and start again."
    )
    assert calls(checkout) == []


def test_the_address_with_its_token_is_the_only_line_of_a_later_start(checkout, fake_python):
    lab(checkout, LAB_PYTHON=fake_python)
    result = lab(checkout, LAB_PYTHON=fake_python, JUPYTER_TOKEN="secret")
    assert result.stdout == "Llama 4 lab: http://127.0.0.1:9/lab?token=secret  (Ctrl-C stops it)\n"
    assert result.stderr == ""


def test_each_start_has_a_token_of_its_own(checkout, fake_python):
    starts = [lab(checkout, LAB_PYTHON=fake_python).stdout for _ in range(2)]
    tokens = [re.search(r"token=([0-9a-f]{48}) ", start)[1] for start in starts]
    assert tokens[0] != tokens[1]


def test_options_go_to_jupyterlab(checkout, fake_python):
    lab(checkout, "--port", "9999", LAB_PYTHON=fake_python)
    assert (checkout / "bin" / "calls.log").read_text().endswith("jupyterlab --port 9999\n")


def test_the_server_stays_on_loopback_and_silent_and_opens_the_first_notebook(
    checkout, fake_python
):
    (checkout / "notebooks").mkdir()
    (checkout / "notebooks" / "00_start_here.ipynb").touch()
    page = lab(checkout, LAB_PYTHON=fake_python).stdout.split("?")[0]
    settings = checkout / ".jupyter" / "config" / "jupyter_server_config.json"
    config = json.loads(settings.read_text())
    assert page == "Llama 4 lab: http://127.0.0.1:9/lab/tree/00_start_here.ipynb"
    assert config["LabApp"]["default_url"] == "/lab/tree/00_start_here.ipynb"
    assert config["ServerApp"]["ip"] == "127.0.0.1"
    assert config["ServerApp"]["allow_root"] == (os.geteuid() == 0)
    assert config["Application"]["log_level"] == config["LabApp"]["log_level"] == "WARN"


def change_pins(checkout: Path) -> None:
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")


def test_packages_are_installed_once_and_again_when_the_pins_change(checkout, fake_python):
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["venv", "pip", "compile", "jupyterlab"]
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["jupyterlab"]
    change_pins(checkout)
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["pip", "compile", "jupyterlab"]


def test_another_python_makes_a_new_venv(checkout, fake_python):
    lab(checkout, LAB_PYTHON=fake_python)
    calls(checkout)
    lab(checkout, LAB_PYTHON=fake_python, FAKE_VERSION="3.12")
    assert calls(checkout) == ["venv", "pip", "compile", "jupyterlab"]


def test_a_checkout_that_was_copied_elsewhere_makes_a_new_venv(checkout, fake_python, tmp_path):
    lab(checkout, LAB_PYTHON=fake_python)
    calls(checkout)
    copied = Path(shutil.copytree(checkout, tmp_path / "copied", symlinks=True))
    lab(copied, LAB_PYTHON=fake_python)
    assert calls(copied) == ["venv", "pip", "compile", "jupyterlab"]


def test_a_venv_made_by_hand_is_kept(checkout, fake_python):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(fake_python, checkout / ".venv" / "bin" / "python")
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["pip", "compile", "jupyterlab"]


def test_a_set_up_that_was_killed_starts_over(checkout, fake_python):
    lab(checkout, LAB_PYTHON=fake_python, PIP_RC="kill")
    assert calls(checkout) == ["venv", "pip"]
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["venv", "pip", "compile", "jupyterlab"]


def test_an_update_that_was_killed_starts_over(checkout, fake_python):
    lab(checkout, LAB_PYTHON=fake_python)
    change_pins(checkout)
    lab(checkout, LAB_PYTHON=fake_python, PIP_RC="kill")
    calls(checkout)
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["venv", "pip", "compile", "jupyterlab"]


def test_a_venv_survives_an_update_that_fails(checkout, fake_python):
    lab(checkout, LAB_PYTHON=fake_python)
    change_pins(checkout)
    lab(checkout, LAB_PYTHON=fake_python, PIP_RC="1")
    calls(checkout)
    lab(checkout, LAB_PYTHON=fake_python)
    assert calls(checkout) == ["pip", "compile", "jupyterlab"]


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        (
            "NewConnectionError('Network is unreachable')",
            "pip could not reach its package index: connect to a network once, "
            "or name a mirror with PIP_INDEX_URL=.",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk is full: make room and start"),
        ("ERROR: conflict", "pip could not install the packages; the lines above and"),
    ],
)
def test_a_failing_pip_is_explained(checkout, fake_python, pip_says, sentence):
    result = lab(checkout, LAB_PYTHON=fake_python, PIP_RC="1", PIP_SAYS=pip_says)
    assert result.returncode == 1
    assert pip_says in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"lab: {sentence}")
