"""Several processes: what two of them check by themselves, and what needs only one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
from tiny import CONFIG
from torch.distributed.device_mesh import DeviceMesh

import llama4_lab as l4
from llama4_lab import parallel
from llama4_lab.parallel.ranks import check

WORKER = Path(parallel_worker.__file__)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, str | None]:
    """Run all checks in two processes, as a user would, and return what each said."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(WORKER), str(folder)],
        env=os.environ | {"PYTHONPATH": str(WORKER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found: dict[str, str | None] = {}
    for rank in range(2):
        file = folder / f"report{rank}.jsonl"
        for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            found[line["check"]] = found.get(line["check"]) or line["error"]
    assert found, done.stderr
    return found


@pytest.mark.slow
def test_the_script_of_the_documentation_prints_its_routing(tmp_path):
    text = (Path(__file__).parents[1] / "docs/parallel.md").read_text()
    script = tmp_path / "route.py"
    script.write_text(text.split("```python\n")[1].split("```")[0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # On a busy machine gloo still aborts a process now and then, after its last line.
    assert done.stdout.startswith("tensor([[["), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in parallel_worker.CHECKS])
def test_two_processes(report, name):
    assert name in report, "an earlier check failed"
    assert report[name] is None, report[name]


def test_what_cannot_be_divided_is_named_with_what_can():
    def sentence(size, experts, **changes):
        with pytest.raises(ValueError) as error:
            check(CONFIG.replace(**changes), size, experts)
        return str(error.value)

    even = {"vocab_size": 96}
    assert sentence(4, "sliced", **even) == (
        "2 key/value heads cannot be divided among 4 ranks: start 1 or 2"
    )
    assert sentence(2, "placed", **even) == (
        '5 experts cannot be divided among 2 ranks: start 1, or choose experts="sliced"'
    )
    assert sentence(2, "sliced") == "97 tokens cannot be divided among 2 ranks: start 1"
    assert sentence(2, "sliced", intermediate_size=41, **even) == (
        "41 neurons of an expert cannot be divided among 2 ranks: start 1"
    )
    assert sentence(2, "sliced", intermediate_size_mlp=57, **even) == (
        "57 neurons of an MLP cannot be divided among 2 ranks: start 1"
    )


@pytest.mark.parametrize("experts", ["sliced", "placed"])
def test_eight_gpus_can_share_the_released_models(experts):
    for config in (l4.SCOUT, l4.MAVERICK):
        check(config, 8, experts)


def test_a_process_alone_is_told_how_to_start_several(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError) as error:
        parallel.start()
    assert str(error.value) == (
        "RANK is not set, so this process has no others to join: start the script with "
        "`torchrun --nproc-per-node 2 script.py`, or from a notebook with "
        "llama4_lab.parallel.engines(2)"
    )


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError) as error:
        parallel.start()
    assert str(error.value) == (
        "4 processes need as many GPUs and this machine has 2: start 2 processes, or choose "
        'start(device="cpu")'
    )


def test_a_notebook_without_ipyparallel_is_told_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipyparallel", None)
    with pytest.raises(ImportError) as error:
        parallel.engines(2)
    assert str(error.value) == (
        "several processes in a notebook need ipyparallel: `pip install ipyparallel`, or write a "
        "script and start it with torchrun"
    )


@pytest.mark.parametrize("name", ["folder", "model.gguf"])
def test_a_checkpoint_of_another_format_is_sent_to_convert(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError) as error:
        parallel.load(tmp_path / name, DeviceMesh.__new__(DeviceMesh))
    assert str(error.value) == (
        f"{tmp_path / name} lacks config.json: ranks read Hugging Face's format only; a checkpoint "
        "of Meta's or a file of GGUF is converted with `llama4-lab convert`"
    )
