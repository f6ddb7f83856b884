"""The command line: what a person types, and one sentence when it cannot be done."""

import json

import pytest
from tiny import CONFIG

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
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_a_failure(arguments, sentence, capsys):
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("llama4-lab: ")
    assert sentence in err
    assert "Traceback" not in err
