"""The command line: what a person types, and one sentence when it cannot be done."""

import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from meta_folder import PARAMS
from PIL import Image
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab import cli, opening
from llama4_lab.analysis.routing import routing_of
from llama4_lab.checkpoint import convert
from llama4_lab.checkpoint.huggingface import HuggingFaceFolder
from llama4_lab.checkpoint.params import config_from_params
from llama4_lab.checkpoint.quantised import Quantisation, quantisation_of
from llama4_lab.opening import chosen_model
from llama4_lab.points import described
from llama4_lab.prompt.chat import question
from llama4_lab.train import loop
from llama4_lab.train.recipes import RECIPES, TEXT

LAB = Path(__file__).parents[1] / "lab"


def test_plan_counts_a_preset_and_marks_the_estimate(capsys):
    assert cli.main(["plan", "scout"]) == 0
    out = capsys.readouterr().out
    assert "108,641,793,536" in out
    assert "217.28 GB" in out
    assert "ESTIMATE" not in out
    assert cli.main(["plan", "behemoth"]) == 0
    assert capsys.readouterr().out.startswith("AN ESTIMATE")


def test_plan_counts_a_folders_weights_as_they_are_packed(tmp_path, capsys):
    l4.convert("nano", tmp_path / "int4", quantize="int4")
    said = []
    for arguments in (["nano", "--quantize", "int4"], [str(tmp_path / "int4")], ["nano"]):
        assert cli.main(["plan", *arguments]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    totals = [line for text in said for line in text.splitlines() if line.startswith("total")]
    assert totals[0].endswith(" packed in int4") and totals[2].endswith(" MB in bfloat16")


def test_plan_reads_a_folders_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert cli.main(["plan", str(tmp_path)]) == 0
    assert f"{CONFIG.parameter_counts()['total']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "no_such_folder"], "no_such_folder"),
        (["plan", "scoutt"], "checkpoint folder; or scout, maverick, behemoth"),
        (["card", "no_such_model"], "no_such_model"),
        (["train", "nano", "--corpus", "no_such_corpus"], "no_such_corpus"),
        (["convert", "no_such_folder", "target"], "no_such_folder"),
        (
            ["convert", "nano", "target", "--hugging-face", "--quantize", "int8"],
            "--quantize int8 is a format of our own, which --hugging-face is not",
        ),
        (["open", "no_such.ipynb"], "there is no notebook no_such.ipynb"),
        (["bench", "--device", "xpu"], "no device 'xpu' was found: run this on a machine with one"),
        (["bench", "--device", "meta"], "no device 'meta' was found"),
        (["train", "nano", "--device", "gpu"], "no device 'gpu' was found: train on one, or with"),
        (["plan", "scout", "--model", "maverick"], "plan takes one model, not scout and maverick"),
        (
            ["trace", "scout", "hi"],
            "unknown model 'scout': give a shipped model's name (mini, nano)",
        ),
        (["trace", "nano", "hi", "--points", "embed"], "--points says what --out keeps: give it"),
        (
            ["trace", "nano", "hi", "--points", "rooter", "--out", "no_such_folder"],
            "unknown point 'rooter'",
        ),
        (["trace", "nano", "hi", "--image", "no.png"], "No such file or directory: 'no.png'"),
        (["plan", ""], f"{Path.cwd()} is not a checkpoint: it needs config.json (Hugging Face) or"),
        (["points", "--model", str(LAB.parent)], f"{LAB.parent} is not a checkpoint: it needs"),
        (
            ["card", "nano", "--corpus", "no_such_corpus"],
            "there is no folder no_such_corpus: give that of a built corpus",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_a_failure(arguments, sentence, capsys):
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("llama4-lab: ")
    assert sentence in err
    assert "Traceback" not in err


def refusal(capsys, *arguments: str) -> str:
    """Return what is said about arguments that are refused before anything is done."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [["card", "nano"], ["bench", "--device", "cpu"]])
def test_figures_that_cannot_be_written_are_refused_before_they_are_measured(
    command, tmp_path, capsys, monkeypatch
):
    assert f"'{tmp_path}' is a folder: give" in refusal(capsys, *command, "--json", str(tmp_path))
    file = tmp_path / "new" / "a.json"
    said = refusal(capsys, *command, "--json", str(file))
    assert f"'{file}' cannot be written: make {tmp_path / 'new'} first" in said
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    said = refusal(capsys, *command, "--json", str(tmp_path / "a.json"))
    assert f"'{tmp_path / 'a.json'}' may not be written: give another file" in said


@pytest.mark.parametrize(
    "command", [["corpus"], ["corpus", "c", "--held-out"], ["train", "nano", "--out"]]
)
def test_a_file_is_no_folder_to_write_to(command, tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    said = refusal(capsys, *command, str(tmp_path / "a.txt"))
    assert f"{tmp_path / 'a.txt'} is a file: give the name of a folder" in said


def test_steps_and_minutes_are_not_both_taken(capsys):
    said = refusal(capsys, "train", "nano", "--steps", "5", "--budget-minutes", "1")
    assert "argument --budget-minutes: not allowed with argument --steps" in said


def test_every_argument_says_what_it_is():
    actions = cli.parser()._actions
    commands = next(each.choices for each in actions if isinstance(each.choices, dict))
    arguments = [(name, each) for name, c in commands.items() for each in c._actions]
    assert len(arguments) > 40
    assert [(name, each.dest) for name, each in arguments if not each.help] == []


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"llama4-lab {metadata.version('llama4-lab')}\n"


def test_a_reader_that_has_enough_is_no_failure():
    command = [sys.executable, "-m", "llama4_lab.cli", "points", "--model", "behemoth"]
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, b"")


@pytest.mark.parametrize("command", [["card", "nano"], ["convert", "nano", "t", "--hugging-face"]])
def test_an_interrupted_command_says_so_without_a_traceback(command, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(l4, "load", stop)
    assert cli.main(command) == 130
    assert capsys.readouterr().err == "\nllama4-lab: interrupted\n"


@pytest.mark.parametrize("shard_bytes", [1_000_000, 5_000_000_000])
def test_an_interrupted_conversion_says_whether_the_same_command_goes_on(
    shard_bytes, tmp_path, monkeypatch, capsys
):
    pieces, read = HuggingFaceFolder.pieces, []

    def interrupted(self, name, shapes):
        read.append(name)
        if len(read) == 40:
            raise KeyboardInterrupt
        return pieces(self, name, shapes)

    monkeypatch.setattr(HuggingFaceFolder, "pieces", interrupted)
    monkeypatch.setattr(l4, "convert", partial(convert, max_shard_bytes=shard_bytes))
    command = ["convert", "nano", str(tmp_path)]
    assert cli.main(command) == 130
    kept = tmp_path / ".unfinished-conversion"
    goes_on = f": the same command goes on from what is kept in {kept}"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "llama4-lab: interrupted" + goes_on * (shard_bytes == 1_000_000)
    assert cli.main(command) == 0
    assert l4.load(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("option", [[], ["--hugging-face"]])
def test_what_is_converted_is_not_replaced(option, tmp_path, capsys):
    l4.save(tiny(), tmp_path)
    held = (tmp_path / "model.safetensors").stat()
    assert cli.main(["convert", str(tmp_path), f"{tmp_path}/../{tmp_path.name}", *option]) == 1
    assert "is what is converted: give another folder to write to" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").stat() == held


@pytest.mark.parametrize("command", [["plan"], ["points", "--model"]])
@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            '{"model_type": "llama4", "rope_scaling": "x"}',
            " does not describe a Llama 4 (AttributeError: 'str' object has no attribute 'get')",
        ),
        ('{"model_type": "llama4", "text_config": null}', ": text_config None must be an object"),
        ("[1]", " holds a JSON list where an object is needed"),
    ],
)
def test_a_folder_whose_config_cannot_be_read_is_named(command, text, sentence, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert cli.main([*command, str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == f"llama4-lab: {tmp_path}/config.json{sentence}"


def test_a_model_without_tokenizer_has_no_card(tmp_path, capsys):
    l4.save(tiny(), tmp_path)
    assert cli.main(["card", str(tmp_path)]) == 1
    assert f"{tmp_path} has no tokenizer, and a card is measured on" in capsys.readouterr().err


def test_points_are_those_of_a_meta_folder(tmp_path, capsys):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert cli.main(["points", "--model", str(tmp_path)]) == 0
    points = described(config_from_params(PARAMS))
    for line, (name, point) in zip(
        capsys.readouterr().out.splitlines(), points.items(), strict=True
    ):
        assert line.split()[0] == name and line.endswith(f"{point.axes:12} {point.meaning}")


def test_a_port_that_cannot_be_is_refused(capsys):
    assert "'70000' is no port: give 1 to 65535" in refusal(capsys, "open", "--port", "70000")


@pytest.mark.parametrize("streams", ["PYTHONIOENCODING=ascii", "exec >&-;"])
def test_a_report_needs_no_terminal_that_knows_every_letter(streams):
    command = f"{streams} {sys.executable} -m llama4_lab.cli plan nano --gpu h100"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


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
    assert (
        "is quantised already, to int4: convert the checkpoint that it" in capsys.readouterr().err
    )
    assert not (tmp_path / "t").exists()


def test_convert_writes_our_layout_or_the_one_that_transformers_opens(tmp_path):
    nano = l4.load("nano", dtype=torch.bfloat16).state_dict()
    for option, is_ours in (([], True), (["--hugging-face"], False)):
        assert cli.main(["convert", "nano", str(tmp_path / str(is_ours)), *option]) == 0
        config = json.loads((tmp_path / str(is_ours) / "config.json").read_text())
        assert ("quantization_config" in config) == is_ours
        model = l4.load(tmp_path / str(is_ours))
        assert model.dtype == torch.bfloat16  # as in the files, not as `load` widens them
        found = model.state_dict()
        assert found.keys() == nano.keys()
        assert all(torch.equal(found[name], weight) for name, weight in nano.items())


def test_what_opens_a_page_is_named_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("llama4_lab.opening.find_spec", lambda name: None)
    assert cli.main(["open", "--app"]) == 1
    sentence = 'Voila is not installed: pip install "llama4-lab[app]"'
    assert capsys.readouterr().err == f"llama4-lab: {sentence}\n"


def test_the_page_opens_a_model_of_ones_own(monkeypatch, tmp_path):
    folder, opened = tmp_path / "ours", []
    l4.save(l4.load("nano"), folder)
    monkeypatch.setattr("llama4_lab.opening.open_page", lambda *given: opened.append(given))
    assert cli.main(["open", "--app", "--model", str(folder), "--quantize", "int8"]) == 0
    assert cli.main(["open", "--app"]) == 0
    (mine, usual) = opened
    assert mine[:2] == (None, None) and usual == (None, None)
    monkeypatch.setenv("LLAMA4_LAB_MODEL", json.dumps(mine[2]))
    model = chosen_model()
    assert model.config == l4.load("nano").config
    assert quantisation_of(model) == Quantisation("int8")
    monkeypatch.delenv("LLAMA4_LAB_MODEL")
    assert chosen_model().config == l4.load("mini").config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "nano"], "--model is that of the lab's page: give --app and no notebook"),
        (
            ["x.ipynb", "--app", "--model", "nano"],
            "--model is that of the lab's page: give --app and no notebook",
        ),
        (
            ["--app", "--experts", "mmap"],
            "--quantize and --experts say how --model is loaded: give it, too",
        ),
        (["--app", "--model", "nanu"], "unknown model 'nanu': did you mean 'nano'? "),
    ],
)
def test_a_model_that_cannot_be_opened_is_refused_before_the_page(capsys, options, sentence):
    assert cli.main(["open", *options]) == 1
    assert capsys.readouterr().err.startswith(f"llama4-lab: {sentence}")


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


def test_jupyterlab_is_waited_for_where_nothing_takes_the_place_of_a_process(monkeypatch, tmp_path):
    notebook = tmp_path / "my notebook.ipynb"
    notebook.touch()
    started = []

    class Process:
        def __init__(self, command):
            started.extend(command)

        def wait(self):
            return 3

    for name, value in dict(opening._FOR_KERNELS).items():
        monkeypatch.setenv(name, value)  # so that it is put back in the end
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["open", str(notebook)])
    assert ended.value.code == 3
    assert started[1:3] == ["-m", "jupyterlab"] and started[-1] == str(notebook)


def test_domains_without_text_are_left_out_of_the_training(tmp_path, monkeypatch, capsys):
    given = []

    def train(recipe, *_, **__):
        given.append(recipe)
        raise ValueError("that will do")

    monkeypatch.setattr(loop, "train", train)
    for name in TEXT:
        (tmp_path / f"{name}.train.bin").write_bytes(b"" if name in ("german", "french") else b"..")
    arguments = ["train", "nano", "--corpus", str(tmp_path), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert f"left out, because {tmp_path} has no text of them: german, french\n" in said.out
    assert "that will do" in said.err
    assert given[0].domains == [name for name in TEXT if name not in ("german", "french")]
    assert given[0].without(["english"]).domains == given[0].domains[1:]
    assert [len(stage.lessons) for stage in given[0].stages] == [
        len(stage.lessons) for stage in RECIPES["nano"].stages
    ]
    for name in TEXT:
        (tmp_path / f"{name}.train.bin").write_bytes(b"")
    assert cli.main(arguments) == 1
    assert f"{tmp_path} has no text at all" in capsys.readouterr().err


def traced(capsys, *arguments: str) -> list[str]:
    assert cli.main(["trace", "nano", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_trace_prints_each_tokens_experts_and_what_may_follow(capsys):
    model = l4.load("nano")
    prompt = model.prompt(text := "two times two is")
    head, *rows, following = traced(capsys, text)
    assert head.split() == ["token,", "layer:", "0", "1", "2", "3"]
    found = routing_of(model, prompt)
    assert [re.findall(r" (\d+)", row)[-4:] for row in rows] == [
        [str(found.expert[layer, place, 0]) for layer in range(4)] for place in range(len(rows))
    ]
    assert rows[1].startswith(f"1 {prompt.tokens[1]!r} ") and len(rows) == len(prompt.tokens)
    shares = model(**prompt)[0, -1].softmax(dim=0)
    words = re.findall(r"('[^']*') ([\d.]+)%", following)
    assert [word for word, _ in words] == [
        repr(model.tokenizer.token_text(idx)) for idx in shares.topk(5).indices.tolist()
    ]
    assert [float(share) / 100 for _, share in words] == pytest.approx(
        shares.topk(5).values.tolist(), abs=6e-4
    )


def test_trace_marks_what_edits_change_and_writes_the_edited_runs_values(
    tmp_path, capsys, monkeypatch
):
    model = l4.load("nano")
    prompt = model.prompt(text := "two times two is")
    edits = [
        l4.edits.SkipLayer(1),
        l4.edits.Patch("layers.0.resid_post", source="clean", tokens=[2]),
    ]
    (tmp_path / "edits.json").write_text(l4.edits.dumps(edits))
    folder = tmp_path / "run"
    names = ("--points", "layers.*.router.*", "--points", "logits")
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    said = traced(capsys, "-", "--edits", f"{tmp_path}/edits.json", "--out", str(folder), *names)
    assert said[-1].startswith("13 values written to") and str(folder) in said[-1]
    assert [line.partition(":")[0] for line in said[-3:-1]] == ["next, clean", "next, edited"]
    clean = routing_of(model, prompt)
    with l4.edits.edited(model, edits, {"clean": prompt}):
        with torch.no_grad(), l4.trace(model, names[1::2]) as cache:
            model(**prompt)
        run = routing_of(model, prompt)
    stars = np.array([["*" in cell for cell in line.split()[-4:]] for line in said[1:-3]]).T
    assert (stars == (clean.expert != run.expert)[..., 0]).all() and stars.any()
    kept = l4.load_trace(folder)
    assert len(kept) == 13
    assert all(torch.equal(value, cache[name]) for name, value in kept.items())
    facts = json.loads((folder / "prompt.json").read_text())
    assert facts["tokens"] == prompt.tokens
    assert l4.edits.loads(json.dumps(facts["edits"])) == edits
    assert cli.main(["trace", "nano", text, "--out", str(folder)]) == 1
    assert "give a new or empty folder" in capsys.readouterr().err


def test_trace_reads_utf8_whatever_the_system_thinks_texts_are(tmp_path, capsys, monkeypatch):
    text, bom = "два плюс два", b"\xef\xbb\xbf"
    (tmp_path / "edits.json").write_bytes(bom + l4.edits.dumps([l4.edits.SkipLayer(1)]).encode())
    piped = io.TextIOWrapper(io.BytesIO(bom + text.encode()), encoding="cp1252")
    monkeypatch.setattr("sys.stdin", piped)
    given = ("--edits", f"{tmp_path}/edits.json")
    assert traced(capsys, "-", *given) == traced(capsys, text, *given)


def test_trace_asks_about_pictures_as_the_lab_does(tmp_path, capsys):
    picture = Image.new("RGB", (40, 30), "red")
    picture.save(tmp_path / "red.png")
    rows = traced(capsys, "What is it?", "--image", str(tmp_path / "red.png"))[1:-1]
    prompt = l4.load("nano").prompt(question("What is it?", 1), [picture])
    assert [int(row.split()[0]) for row in rows] == list(range(len(prompt.tokens)))
    assert "'<|image|>'" in " ".join(rows)
    assert cli.main(["trace", "nano", "Who?", "--chat"]) == 0
