"""The command line: what a person types, and one sentence when it cannot be done."""

import json

import pytest
import torch
from tiny import CONFIG

import llama4_lab as l4
from llama4_lab import cli


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
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_a_failure(arguments, sentence, capsys):
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("llama4-lab: ")
    assert sentence in err
    assert "Traceback" not in err


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
