"""The command line: what a person types, and one sentence when it cannot be done."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from meta_folder import PARAMS
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab import cli
from llama4_lab.checkpoint.params import config_from_params

LAB = Path(__file__).parents[1] / "lab"


def test_plan_counts_a_preset_and_marks_the_estimate(capsys):
    assert cli.main(["plan", "scout"]) == 0
    out = capsys.readouterr().out
    assert "108,641,793,536" in out
    assert "217.28 GB" in out
    assert "ESTIMATE" not in out
    assert cli.main(["plan", "behemoth"]) == 0
    assert capsys.readouterr().out.startswith("AN ESTIMATE")


def test_plan_reads_a_folders_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert cli.main(["plan", str(tmp_path)]) == 0
    assert f"{CONFIG.parameter_counts()['total']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "no_such_folder"], "no_such_folder"),
        (["card", "no_such_model"], "no_such_model"),
        (["train", "nano", "--corpus", "no_such_corpus"], "no_such_corpus"),
        (["convert", "no_such_folder", "target"], "no_such_folder"),
        (
            ["convert", "nano", "target", "--hugging-face", "--quantize", "int8"],
            "--quantize int8 is a format of our own, which --hugging-face is not",
        ),
        (["open", "no_such.ipynb"], "there is no notebook no_such.ipynb"),
        (["plan", "scout", "--model", "maverick"], "plan takes one model, not scout and maverick"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_a_failure(arguments, sentence, capsys):
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("llama4-lab: ")
    assert sentence in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [["plan"], ["points", "--model"]])
@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"model_type": "llama4_text"}', "does not describe a Llama 4 (KeyError: 'hidden_size')"),
        ("[1]", "holds a JSON list where an object is needed"),
    ],
)
def test_a_folder_whose_config_cannot_be_read_is_named(command, text, sentence, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert cli.main([*command, str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == f"llama4-lab: {tmp_path}/config.json {sentence}"


def test_a_model_without_tokenizer_has_no_card(tmp_path, capsys):
    l4.save(tiny(), tmp_path)
    assert cli.main(["card", str(tmp_path)]) == 1
    assert f"{tmp_path} has no tokenizer, and a card is measured on" in capsys.readouterr().err


def test_points_are_those_of_a_meta_folder(tmp_path, capsys):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert cli.main(["points", "--model", str(tmp_path)]) == 0
    points = l4.points(config_from_params(PARAMS))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(points)


def test_numbers_that_no_training_can_have_are_refused(capsys):
    for option, value, said in (
        ("--steps", "0", "'0' is no whole number of at least 1"),
        ("--steps", "-5", "'-5' is no whole number of at least 1"),
        ("--budget-minutes", "0", "'0' is no number of minutes above 0"),
        ("--budget-minutes", "nan", "'nan' is no number of minutes above 0"),
        ("--budget-minutes", "soon", "'soon' is no number of minutes above 0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["train", "nano", f"{option}={value}"])
        assert said in capsys.readouterr().err


def test_a_quantised_source_is_not_called_hugging_faces(tmp_path, capsys):
    l4.convert("nano", tmp_path / "int4", quantize="int4")
    command = ["convert", str(tmp_path / "int4"), str(tmp_path / "t"), "--hugging-face"]
    assert cli.main(command) == 1
    assert "--hugging-face takes plain weights in memory, but " in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_convert_writes_our_layout_or_the_one_that_transformers_opens(tmp_path):
    nano = l4.load("nano", dtype=torch.bfloat16).state_dict()
    for option, is_ours in (([], True), (["--hugging-face"], False)):
        assert cli.main(["convert", "nano", str(tmp_path / str(is_ours)), *option]) == 0
        config = json.loads((tmp_path / str(is_ours) / "config.json").read_text())
        assert ("quantization_config" in config) == is_ours
        found = l4.load(tmp_path / str(is_ours), dtype=torch.bfloat16).state_dict()
        assert found.keys() == nano.keys()
        assert all(torch.equal(found[name], weight) for name, weight in nano.items())


def test_what_opens_a_page_is_named_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("llama4_lab.opening.find_spec", lambda name: None)
    assert cli.main(["open", "--app"]) == 1
    sentence = "Voila is not installed: pip install 'llama4-lab[app]'"
    assert capsys.readouterr().err == f"llama4-lab: {sentence}\n"


def test_both_ways_to_open_a_notebook_give_kernels_the_same_surroundings(monkeypatch):
    started = {}
    monkeypatch.setattr("os.execv", lambda *_: started.update(os.environ))
    opens = LAB.read_text(encoding="utf-8").partition("open_lab() {")[2].partition("\n}\n")[0]
    exported = dict(re.findall(r"((?:OMP|MALLOC)_\w+)=(\w+)", opens))
    for name in exported:
        monkeypatch.setenv(name, "")  # so that it is put back in the end
        monkeypatch.delenv(name)
    assert cli.main(["open"]) == 0
    assert len(exported) == 3 and exported.items() <= started.items()
