"""Conversion, plain or to few bits: what is written, what an interruption leaves, what it takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta_folder import PARAMS, write_meta
from safetensors.torch import load_file, save_file
from small_tokenizer import small_tokenizer
from tiny import CONFIG, tiny

import llama4_lab as l4
from llama4_lab.checkpoint import convert, converting
from llama4_lab.checkpoint.huggingface import HuggingFaceFolder
from llama4_lab.checkpoint.meta import MetaFolder
from llama4_lab.checkpoint.params import config_from_params
from llama4_lab.cli import main
from llama4_lab.packed import KINDS

IDS = torch.arange(5, 29)[None] % 89


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    l4.save(tiny(), folder, max_shard_bytes=150_000)
    return folder


def contents(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_weights_of_two_dtypes_are_converted_to_one(folder, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    for file in mixed.glob("*.safetensors"):
        tensors = load_file(file)
        halves = {n: t if "router" in n else t.bfloat16() for n, t in tensors.items()}
        save_file(halves, file, {"format": "pt"})
    with pytest.raises(ValueError, match="choose one for all by dtype"):
        convert(mixed, tmp_path / "none")
    assert main(["convert", str(mixed), str(tmp_path / "plain"), "--dtype", "bfloat16"]) == 0
    convert(mixed, tmp_path / "packed", quantize="int8", dtype=torch.bfloat16)
    expected = l4.load(mixed, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(l4.load(tmp_path / "plain")(IDS), expected(IDS))
    packed = l4.load(tmp_path / "packed", experts="mmap")
    assert packed.norm.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype torch.int32 is not one for weights: give"):
        convert(mixed, tmp_path / "wrong", dtype=torch.int32)
    assert not (tmp_path / "wrong").exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_is_what_saving_a_quantised_model_writes(folder, kind, tmp_path):
    convert(folder, tmp_path / "a", quantize=kind, max_shard_bytes=40_000)
    l4.save(l4.load(folder, quantize=kind), tmp_path / "b")
    found, expected = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    texts = [(tmp_path / at / "config.json").read_text() for at in "ab"]
    assert texts[0] == texts[1]
    files = {file.name for file in (tmp_path / "a").iterdir()}
    count = len(files) - 2
    assert count > 3 and files == {
        "config.json",
        "model.safetensors.index.json",
        *(f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)),
    }
    with torch.no_grad():
        logits = l4.load(tmp_path / "a")(IDS)
        assert torch.equal(logits, l4.load(folder, quantize=kind)(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"vision_config": None}, {"vision_config": None, "tie_word_embeddings": True}]
)
def test_a_plain_conversion_opens_as_its_source_and_is_saved_as_it_was(changes, dtype, tmp_path):
    l4.save(tiny(**changes).to(dtype), tmp_path / "a", max_shard_bytes=150_000)
    convert(tmp_path / "a", tmp_path / "own", max_shard_bytes=40_000)
    content = json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]
    assert content == {"method": "llama4_lab", "kind": "none"}
    model, source = l4.load(tmp_path / "own"), l4.load(tmp_path / "a")
    found, expected = model.state_dict(), source.state_dict()
    assert model.dtype == dtype and found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    with torch.no_grad():
        assert torch.equal(model(IDS), source(IDS))
    l4.save(model, tmp_path / "b", max_shard_bytes=150_000)
    assert len(list((tmp_path / "a").iterdir())) == len(list((tmp_path / "b").iterdir())) > 3
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_converted_plain_can_be_packed(folder, kind, tmp_path):
    convert(folder, tmp_path / "own")
    found = l4.load(tmp_path / "own", quantize=kind).state_dict()
    expected = l4.load(folder, quantize=kind).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    convert(tmp_path / "own", tmp_path / "a", quantize=kind)
    convert(folder, tmp_path / "b", quantize=kind)
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    for name, tensor in contents(tmp_path / "b").items():
        other = contents(tmp_path / "a")[name]
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("kind", [None, "int4"])
def test_mapped_numbers_are_aligned(folder, kind, tmp_path):
    convert(folder, tmp_path / "own", quantize=kind)
    for name, tensor in l4.load(tmp_path / "own").state_dict().items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name


@pytest.mark.parametrize("kind", [None, "int4"])
def test_a_meta_folder_is_converted(tmp_path, kind):
    l4.save(l4.random(config_from_params(PARAMS)), tmp_path / "hf")
    write_meta(tmp_path / "meta", load_file(tmp_path / "hf" / "model.safetensors"), PARAMS, 2)
    for source in ("hf", "meta"):
        convert(tmp_path / source, tmp_path / f"{source}-own", quantize=kind)
    found, expected = (contents(tmp_path / f"{at}-own") for at in ("meta", "hf"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def stop_after(monkeypatch, count):
    """Let reading fail after so many pieces."""
    left, pieces = [count], HuggingFaceFolder.pieces

    def reading(self, name, shapes):
        for piece in pieces(self, name, shapes):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield piece

    monkeypatch.setattr(HuggingFaceFolder, "pieces", reading)
    return left


@pytest.mark.parametrize("kind", [None, "int4"])
def test_an_interrupted_conversion_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, kind):
    with monkeypatch.context() as patch:
        left = stop_after(patch, 10**6)
        convert(folder, tmp_path / "whole", quantize=kind, max_shard_bytes=40_000)
        pieces = 10**6 - left[0]
    target = tmp_path / "target"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, pieces // 2)
        convert(folder, target, quantize=kind, max_shard_bytes=40_000)
    unfinished = target / ".unfinished-conversion"
    assert [file.name for file in target.iterdir()] == [unfinished.name]
    written = {file: file.stat().st_mtime_ns for file in unfinished.glob("*.safetensors")}
    assert len(written) > 1 and len(list(unfinished.glob("*.part"))) == 1
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        l4.load(target)
    # A file that was cut is written again, the others are not.
    spoilt = sorted(written)[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    usage = shutil.disk_usage

    def usage_without_parts(at):
        assert not list(at.glob("*.part"))  # what will be written anew takes no room
        return usage(at)

    with monkeypatch.context() as patch:
        left = stop_after(patch, 10**6)
        patch.setattr(shutil, "disk_usage", usage_without_parts)
        convert(folder, target, quantize=kind, max_shard_bytes=40_000)
        assert 0 < 10**6 - left[0] < pieces
    for file, time in written.items():
        assert ((target / file.name).stat().st_mtime_ns == time) == (file != spoilt)
    assert not unfinished.exists()
    for file in (tmp_path / "whole").iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


def test_two_conversions_do_not_write_one_target(folder, tmp_path, monkeypatch):
    pieces, said = HuggingFaceFolder.pieces, []

    def slowly(*of):
        if not said:
            said.append("")
            with pytest.raises(OSError) as caught:
                convert(folder, tmp_path / "target")
            said.append(str(caught.value))
        return pieces(*of)

    monkeypatch.setattr(HuggingFaceFolder, "pieces", slowly)
    convert(folder, tmp_path / "target")
    assert said[1:] == [
        f"{tmp_path / 'target'} is being written by another conversion: wait for it, or stop it"
    ]
    convert(folder, tmp_path / "target")


def test_files_of_another_kind_are_not_taken_over(folder, tmp_path, monkeypatch):
    target = tmp_path / "target"
    for kind in (None, "int8"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, 20)
            convert(folder, target, quantize=kind, max_shard_bytes=40_000)
    convert(folder, target, quantize="int4", max_shard_bytes=40_000)
    found, expected = l4.load(target), l4.load(folder, quantize="int4")
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert len(list(target.glob("*.safetensors"))) == len(contents_of_index(target))


def test_a_source_is_the_same_in_whatever_order_its_files_are_named(folder):
    files = [*folder.glob("*.safetensors")]
    origins = {converting._origin(MetaFolder(CONFIG, by, [], [])) for by in (files, files[::-1])}
    assert len(files) > 1 and len(origins) == 1


@pytest.mark.parametrize("held", ["saved", "converted", "unfinished", "half moved"])
def test_what_was_made_from_something_else_is_not_replaced(folder, tmp_path, monkeypatch, held):
    other, target = tmp_path / "other", tmp_path / "target"
    l4.save(tiny(seed=1), other, max_shard_bytes=150_000)
    if held == "saved":
        l4.save(tiny(seed=1), target)
    elif held == "converted":
        convert(other, target, quantize="int4")
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, 20) if held == "unfinished" else stop_moving(patch, target, 1)
            convert(other, target, max_shard_bytes=40_000)
    before = {f: f.read_bytes() for f in target.rglob("*") if f.is_file()}
    with pytest.raises(FileExistsError) as caught:
        convert(folder, target, quantize="int4")
    first = min(before, key=lambda f: (f.parent == target, f.suffix != ".safetensors", f.name))
    assert str(caught.value) == (
        f"{target} holds {first.relative_to(target)}, which was not made from the files that are "
        "converted now: give a new or empty folder, or remove what is there"
    )
    assert {f: f.read_bytes() for f in target.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("moved", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_conversion_interrupted_while_files_are_moved_ends_whole(
    folder, tmp_path, monkeypatch, moved, kind
):
    convert(folder, tmp_path / "whole", quantize=kind, max_shard_bytes=40_000)
    target = tmp_path / "target"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_moving(patch, target, moved)
        convert(folder, target, quantize="int4", max_shard_bytes=40_000)
    assert min(moved, 4) <= len(list(target.glob("model*"))) <= moved
    with monkeypatch.context() as patch:
        read = stop_after(patch, 10**6)
        convert(folder, target, quantize=kind, max_shard_bytes=40_000)
        assert (read[0] == 10**6) == (kind == "int4")  # what is there is not made again
    found, whole = (
        {file.name: file.read_bytes() for file in made.iterdir()}
        for made in (target, tmp_path / "whole")
    )
    assert found == whole


def stop_moving(monkeypatch, target, most):
    """Let moving fail after so many files, and at the last one."""
    moved, replace = [], Path.replace

    def moving(self, to):
        if to.parent == target:
            if len(moved) == most or to.name == "config.json":
                raise KeyboardInterrupt
            moved.append(to)
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", moving)


def contents_of_index(folder):
    return set(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    )


def test_an_earlier_conversion_is_replaced_at_the_end(folder, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert(folder, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 20)
        convert(folder, target, quantize="int4")
    assert {f.name: f.read_bytes() for f in target.iterdir() if f.is_file()} == before
    convert(folder, target, quantize="int4", max_shard_bytes=40_000)
    assert not (target / "model.safetensors").exists()
    assert l4.load(target).lm_head.weight.kind == "int4"


def test_the_tokenizer_comes_along(tmp_path):
    l4.save(tiny(vocab_size=336, image_token_index=334, vision_config=None), tmp_path / "a")
    small_tokenizer(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", quantize="int8")
    assert l4.load(tmp_path / "b").prompt("a")["input_ids"].numel() > 1


def test_the_command_says_what_went_wrong(folder, tmp_path, capsys, monkeypatch):
    assert main(["convert", str(folder), str(tmp_path / "t"), "--quantize", "int8"]) == 0
    assert l4.load(tmp_path / "t").lm_head.weight.kind == "int8"
    assert capsys.readouterr().out == f"saved to {tmp_path / 't'}\n"
    assert main(["convert", str(folder), str(tmp_path / "own")]) == 0
    assert HuggingFaceFolder.open(tmp_path / "own").is_ours
    assert l4.load(tmp_path / "own").lm_head.weight.dtype == torch.float32

    def said(*arguments):
        assert main(["convert", *map(str, arguments), "--quantize", "int4"]) == 1
        return capsys.readouterr().err.splitlines()[-1].removeprefix("llama4-lab: ")

    t = tmp_path / "t"
    assert said(t, tmp_path / "u") == (
        f"{t} is quantised already, to int8: convert the checkpoint that it was made from"
    )
    assert said(folder, folder) == (
        f"{folder} is what is converted: give another folder to write to"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert said(folder, tmp_path / "full") == (
        f"{tmp_path / 'full'} holds x and no Llama 4 checkpoint of Hugging Face's format: give a "
        "new or empty folder"
    )
    free = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    at = tmp_path / "v" / ".unfinished-conversion"
    assert said(folder, tmp_path / "v").startswith(f"{at} has room for 0 MB, and the next file")


_PEAK = """
import sys, torch
from pathlib import Path
from llama4_lab.checkpoint import convert, converting

def kilobytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

torch.ones(512, 512) @ torch.ones(512, 512)
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
convert(sys.argv[1], sys.argv[2], quantize=None if sys.argv[3] == "None" else sys.argv[3])
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int4"])
def test_converting_takes_the_memory_of_one_expert(tmp_path, kind):
    config = CONFIG.replace(
        hidden_size=512, intermediate_size=1024, num_local_experts=16,
        num_hidden_layers=2, interleave_moe_layer_step=1, vision_config=None,
    )  # fmt: skip
    model = l4.random(config)
    l4.save(model, tmp_path / "a")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    expert = 2 * 1024 * 512 * 4
    del model
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "a"), str(tmp_path / "b"), str(kind)]
    # A matrix that is given up goes back to the system, or the heap keeps up to four, by chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    # Beside an expert's larger matrix and its codes, rounding takes blocks of 262,144 weights,
    # five times in float32, and the modules that are imported on the way some 10 MB.
    assert weights > 36 * expert and peak < expert + expert // 8 + 20e6
