"""Every notebook is stored without outputs and runs from top to bottom in under a minute."""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import llama4_lab as l4
from llama4_lab.checkpoint.shipped import MODELS

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.fixture
def notebooks(tmp_path, monkeypatch) -> Path:
    """A copy of the notebooks, with Jupyter's folders beside it so that no other settings count."""
    for name in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return Path(shutil.copytree(FOLDER, tmp_path / "notebooks"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_without_outputs(name):
    for cell in nbformat.read(FOLDER / name, as_version=4).cells:
        assert not cell.get("outputs"), f"run nbstripout on {name}: {cell.source!r} has outputs"


def test_the_first_notebooks_control_may_have_fewer_layers(capsys):
    cells = nbformat.read(FOLDER / "00_start_here.ipynb", as_version=4).cells
    wanted = ("model = ", "texts = {", "trained = specialisation", "bits, ", "for i, layer in ")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    code = [source for source in code if any(each in source for each in wanted)]
    assert len(code) == len(wanted)
    program = "\n".join(code).replace('load("mini")', 'load("nano")')
    advised = "config.replace(num_hidden_layers=2)"
    assert "random(config)" in program
    exec(program.replace("random(config)", f"random({advised})"), {})
    assert len(re.findall("^layer ", capsys.readouterr().out, re.MULTILINE)) == 2


@pytest.mark.notebook
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_from_top_to_bottom_in_a_minute(name, notebooks):
    notebook = nbformat.read(notebooks / name, as_version=4)
    # CPU time, because other work on the machine must not fail the test
    clock = nbformat.v4.new_code_cell("import time\ntime.process_time()")
    notebook.cells.append(clock)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": notebooks}})
    client.execute()
    seconds = float(clock.outputs[0].data["text/plain"])
    assert seconds < 60, f"{name} took {seconds:.0f} s of one core"


@pytest.mark.notebook
def test_the_instruments_find_the_heads_that_look_at_the_object(capsys):
    cells = nbformat.read(FOLDER / "01_instruments.ipynb", as_version=4).cells
    wanted = ("model = ", "scene = ", "grounding(")
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    exec("\n".join(source for source in code if any(each in source for each in wanted)), {})
    (line,) = re.findall("ROC curve (.*)", capsys.readouterr().out)
    assert max(map(float, line.split())) > 0.9


def variables_of(name: str) -> dict[str, Any]:
    """Run a notebook's code here, without showing anything, and return what it defines."""
    cells = nbformat.read(FOLDER / name, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    found: dict[str, Any] = {}
    exec(code.replace(".show()", ""), found)
    return found


@pytest.mark.notebook
def test_a_balancing_loss_costs_specialisation_and_a_bias_does_not():
    found = variables_of("04_balance.ipynb")
    kept, fullest, bits = found["kept"], {}, {}
    for name, (model, _, loads) in found["runs"].items():
        fullest[name] = found["max_over_mean"](loads[45:60, -1].sum(0))  # the bias is whole yet
        bits[name] = found["specialisation"](model, kept).mutual_information[-1]
    assert fullest["left alone"] > 2
    assert max(fullest["by a loss"], fullest["by a bias"]) < 1.5
    assert bits["by a loss"] < 0.8 * min(bits["left alone"], bits["by a bias"])


@pytest.mark.notebook
def test_one_layer_fetches_codes_from_beyond_the_training_length():
    found = variables_of("05_long_context.ipynb")
    as_trained, third, seventh, blind, *others, small = found["counts"].tolist()
    assert as_trained == third == small == [6, 6, 6]
    assert seventh == blind == [6, 0, 0]
    assert others == [[0, 0, 0], [0, 0, 0]]  # NoPE layers with positions, RoPE layers without
    assert found["found"]([], 5000, times=2) == 2
    assert found["found"](found["ways"]["RoPE layers see all"], 5000, times=2) == 0
    as_trained, all_seen = (np.asarray(line.y) for line in found["drawn"].data)
    assert as_trained.max() < as_trained[0] + 0.3
    assert (all_seen[4:] > as_trained[4:] + 0.7).all()  # beyond 2,048 tokens


@pytest.mark.notebook
def test_image_tokens_say_what_and_their_place_says_where(capsys):
    variables_of("06_pictures.ipynb")
    printed = capsys.readouterr().out
    assert "of 16 objects 16 are where they were pasted, and 0 where they came from" in printed
    assert "16 of 16 changed their colour and kept their shape" in printed
    (share,) = re.findall(r"the probe names the place of (\d+)%", printed)
    assert int(share) > 80
    assert "layer 3, objects  share of the experts: [0. 0. 0. 0. 0. 0. 1. 0.]" in printed


@pytest.mark.notebook
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_with_a_folder_of_another_shape(name, notebooks):
    like_maverick = {"interleave_moe_layer_step": 2, "num_local_experts": 12, "use_qk_norm": False}
    other = l4.random(l4.load("nano").config.replace(moe_layers=None, **like_maverick))
    l4.save(other.to(torch.bfloat16), notebooks / "other")
    shutil.copy(MODELS / "nano" / "tokenizer.json", notebooks / "other")
    notebook = nbformat.read(notebooks / name, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('l4.load("mini")', 'l4.load("other")')
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": notebooks}}).execute()
    # What a slider calls writes its errors into a widget.
    assert "'output_type': 'error'" not in str(notebook.metadata["widgets"])
