"""What a user is told about each kind of bad input, word for word.

In a sentence, ``{at}`` is the checkpoint's folder, ``{whole}`` the bytes of model.safetensors
before it was spoilt, and ``{header}`` those before its numbers.
"""

import codecs
import inspect
import json
import os
import pickle
import re
import resource
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from meta_folder import PARAMS, TEXT, write_meta
from parity import VISION, pair, text_config
from safetensors import safe_open
from safetensors.torch import save_file
from small_tokenizer import small_tokenizer

from llama4_lab.checkpoint import convert, huggingface, load, meta, save, saving, shipped
from llama4_lab.model.random import random

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One good folder of each format: single file, shards, with pictures, Meta's, also in fp8."""
    root = tmp_path_factory.mktemp("good")
    hf, ours = pair(text_config(**TEXT))
    save(ours, root / "single")
    save(ours, root / "shards", max_shard_bytes=650_000)
    write_meta(root / "meta", hf.state_dict(), PARAMS, 4)
    write_meta(root / "meta-fp8", hf.state_dict(), PARAMS, 4, fp8="weights")
    save(pair(text_config(vocab_size=336), VISION)[1], root / "pictures")
    return root


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, edit):
    """Rewrite a safetensors file after `edit` has changed its dict of tensors."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(tensors)
    save_file(tensors, path)


def edit_pth(path, edit):
    tensors = torch.load(path, weights_only=False)
    edit(tensors)
    torch.save(tensors, path)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


class RunsCode:
    def __reduce__(self):
        return codecs.open, ("/dev/null",)


NORM = "model.norm.weight"
TABLE = "model.embed_tokens.weight"
EXPERTS = "model.layers.1.feed_forward.experts.gate_up_proj"
QKV = "layers.0.attention.wqkv.weight"
CODES = "layers.3.feed_forward.experts.moe_w_out_eF_D"
LAST = "model-00004-of-00004.safetensors"


# kind: (good folder, how it is spoilt, exception, sentence)
KINDS = {
    "the folder does not exist": (
        "single",
        shutil.rmtree,
        FileNotFoundError,
        "{at} does not exist: give a checkpoint folder of this machine (nothing is downloaded), or "
        "a shipped model's name (maxi, mini)",
    ),
    "a folder without any config": (
        "single",
        lambda at: (at / "config.json").unlink(),
        FileNotFoundError,
        "{at} is not a checkpoint: it needs config.json (Hugging Face) or params.json (Meta)",
    ),
    "config.json is not JSON": (
        "single",
        lambda at: (at / "config.json").write_text("<html>"),
        ValueError,
        "{at}/config.json is not JSON (Expecting value: line 1 column 1 (char 0)): "
        "fetch the file again",
    ),
    "config.json is not an object": (
        "single",
        lambda at: (at / "config.json").write_text("[]"),
        ValueError,
        "{at}/config.json holds a JSON list where an object is needed",
    ),
    "another architecture": (
        "single",
        lambda at: edit_json(at / "config.json", model_type="mixtral"),
        ValueError,
        "{at}/config.json: model_type 'mixtral' is not a Llama 4: "
        "expected one of llama4, llama4_text",
    ),
    "a config that contradicts itself": (
        "single",
        lambda at: edit_json(at / "config.json", num_attention_heads=6),
        ValueError,
        "{at}/config.json: num_attention_heads 6 is not a multiple of num_key_value_heads 4",
    ),
    "a config with a value of the wrong kind": (
        "single",
        lambda at: edit_json(at / "config.json", rope_scaling="linear"),
        ValueError,
        "{at}/config.json does not describe a Llama 4 (AttributeError: 'str' object has no "
        "attribute 'get')",
    ),
    "a quantised checkpoint": (
        "single",
        lambda at: edit_json(at / "config.json", quantization_config={"quant_method": "gptq"}),
        ValueError,
        "{at}/config.json: quant_method 'gptq': of quantised files those of {programs} are read; "
        "convert the bfloat16 checkpoint with `llama4-lab convert --quantize`",
    ),
    "a quantised checkpoint told in a word": (
        "single",
        lambda at: edit_json(at / "config.json", quantization_config="fp8"),
        ValueError,
        "{at}/config.json: quant_method 'fp8': of quantised files those of {programs} are read; "
        "convert the bfloat16 checkpoint with `llama4-lab convert --quantize`",
    ),
    "no weights": (
        "single",
        lambda at: (at / "model.safetensors").unlink(),
        FileNotFoundError,
        "{at} has no weights: it needs model.safetensors, or model.safetensors.index.json and the "
        "shards that it lists",
    ),
    "an index without its map": (
        "shards",
        lambda at: (at / INDEX).write_text('{"metadata": {}}'),
        ValueError,
        "{at}/model.safetensors.index.json has no weight_map: fetch the file again",
    ),
    "an index of nothing": (
        "shards",
        lambda at: edit_json(at / INDEX, weight_map={}),
        ValueError,
        "{at}/model.safetensors.index.json has no weight_map: fetch the file again",
    ),
    "an index that is a list": (
        "shards",
        lambda at: edit_json(at / INDEX, weight_map=["model-00001-of-00002.safetensors"]),
        ValueError,
        "{at}/model.safetensors.index.json has no weight_map: fetch the file again",
    ),
    "an index that points elsewhere": (
        "shards",
        lambda at: edit_json(at / INDEX, weight_map={NORM: "../other.safetensors"}),
        ValueError,
        "{at}/model.safetensors.index.json lists '../other.safetensors': shards must lie beside "
        "the index",
    ),
    "a missing shard": (
        "shards",
        lambda at: (at / LAST).unlink(),
        FileNotFoundError,
        "{at}/model-00004-of-00004.safetensors is missing: model.safetensors.index.json lists it "
        "for model.layers.7.feed_forward.experts.gate_up_proj and 6 other tensors",
    ),
    "a shard without what the index lists there": (
        "shards",
        lambda at: edit_tensors(at / LAST, lambda t: t.pop(NORM)),
        ValueError,
        "{at}/model-00004-of-00004.safetensors lacks model.norm.weight, which "
        "model.safetensors.index.json lists there",
    ),
    "a tensor in two shards": (
        "shards",
        lambda at: edit_tensors(at / LAST, lambda t: t.update({TABLE: torch.zeros(96, 48)})),
        ValueError,
        "{at}/model-00004-of-00004.safetensors holds model.embed_tokens.weight again: it is in "
        "model-00001-of-00004.safetensors already",
    ),
    "a truncated safetensors file": (
        "single",
        lambda at: cut(at / "model.safetensors", 100_000),
        ValueError,
        "{at}/model.safetensors is truncated: it has 100000 of {whole} bytes; fetch the file again",
    ),
    "a safetensors file truncated in its header": (
        "single",
        lambda at: cut(at / "model.safetensors", 1000),
        ValueError,
        "{at}/model.safetensors is truncated: it has 1000 of {header} bytes; fetch the file again",
    ),
    "not a safetensors file": (
        "single",
        lambda at: (at / "model.safetensors").write_bytes(pickle.dumps([0] * 100)),
        ValueError,
        "{at}/model.safetensors is not a safetensors file (header too large): fetch the file again",
    ),
    "a Git LFS pointer": (
        "single",
        lambda at: (at / "model.safetensors").write_text("version https://git-lfs.github.com/"),
        ValueError,
        "{at}/model.safetensors is a Git LFS pointer: fetch the file itself with `git lfs pull`",
    ),
    "a missing tensor": (
        "single",
        lambda at: edit_tensors(at / "model.safetensors", lambda t: t.pop(NORM)),
        ValueError,
        "{at}/model.safetensors lacks model.norm.weight, which config.json asks for",
    ),
    "missing tensors of a multimodal model": (
        "pictures",
        lambda at: edit_json(at / "config.json", text_config=text_config(num_hidden_layers=9)),
        ValueError,
        "{at}/model.safetensors lacks language_model.model.layers.8.input_layernorm.weight and 11 "
        "other tensors, which config.json asks for",
    ),
    "foreign tensors": (
        "single",
        lambda at: edit_tensors(
            at / "model.safetensors", lambda t: t.update({"model.layers.8.x": torch.zeros(1)})
        ),
        ValueError,
        "{at}/model.safetensors holds model.layers.8.x, for which config.json has no place",
    ),
    "a mis-shaped tensor": (
        "single",
        lambda at: edit_json(at / "config.json", vocab_size=100),
        ValueError,
        "{at}/model.safetensors: model.embed_tokens.weight is [96, 48] where config.json asks for "
        "[100, 48]",
    ),
    "experts stored the other way round": (
        "single",
        lambda at: edit_tensors(
            at / "model.safetensors", lambda t: t.update({EXPERTS: t[EXPERTS].mT.contiguous()})
        ),
        ValueError,
        "{at}/model.safetensors: model.layers.1.feed_forward.experts.gate_up_proj is [5, 160, 48] "
        "where config.json asks for [5, 48, 160]",
    ),
    "whole numbers for weights": (
        "single",
        lambda at: edit_tensors(
            at / "model.safetensors", lambda t: t.update({NORM: t[NORM].long()})
        ),
        ValueError,
        "{at}/model.safetensors: model.norm.weight holds I64 where weights are float32, bfloat16, "
        "float16, float64; of quantised files those of {programs} are read",
    ),
    "two kinds of numbers": (
        "single",
        lambda at: edit_tensors(
            at / "model.safetensors", lambda t: t.update({NORM: t[NORM].half()})
        ),
        ValueError,
        "{at}/model.safetensors: model.norm.weight is float16 but lm_head.weight is float32: "
        "choose one for all by dtype",
    ),
    "a broken tokenizer": (
        "single",
        lambda at: (at / "tokenizer.json").write_text('{"model"'),
        ValueError,
        "{at}/tokenizer.json is not a Llama 4 tokenizer (EOF while parsing an object at line 1 "
        "column 8): use the file that came with the checkpoint",
    ),
    "a tokenizer with more tokens than the model": (
        "single",
        small_tokenizer,
        ValueError,
        "{at}/tokenizer.json has 336 tokens, but the model's vocab_size is 96: use the tokenizer "
        "that came with the checkpoint",
    ),
    "a tokenizer with another place for pictures": (
        "pictures",
        small_tokenizer,
        ValueError,
        "{at}/tokenizer.json has <|patch|> at 335, but the model's image_token_index is 90: use "
        "the tokenizer that came with the checkpoint",
    ),
    "params.json is not JSON": (
        "meta",
        lambda at: cut(at / "params.json", 10),
        ValueError,
        "{at}/params.json is not JSON (Expecting ',' delimiter: line 1 column 11 (char 10)): "
        "fetch the file again",
    ),
    "params.json without a size": (
        "meta",
        lambda at: (at / "params.json").write_text('{"n_heads": 8}'),
        ValueError,
        "{at}/params.json: no value for dim, n_layers",
    ),
    "params.json with tiles that are not square": (
        "meta",
        lambda at: edit_json(
            at / "params.json", vision_args={"image_size": {"height": 24, "width": 48}}
        ),
        ValueError,
        "{at}/params.json: image_size 24x48 is not square",
    ),
    "params.json of quantised weights": (
        "meta",
        lambda at: edit_json(at / "params.json", quantization_args={"scheme": "int4"}),
        ValueError,
        "{at}/params.json: quantization_args is set: only plain weights are read",
    ),
    "no consolidated files": (
        "meta",
        lambda at: [file.unlink() for file in at.glob("*.pth")],
        FileNotFoundError,
        "{at} has no weights: it needs consolidated.00.pth and the other ranks' files",
    ),
    "a missing rank": (
        "meta",
        lambda at: (at / "consolidated.01.pth").unlink(),
        FileNotFoundError,
        "{at}/consolidated.01.pth is missing: the folder has ranks 0, 2, 3",
    ),
    "only the first ranks": (
        "meta",
        lambda at: [(at / f"consolidated.0{rank}.pth").unlink() for rank in (2, 3)],
        ValueError,
        "{at}/consolidated.00.pth: layers.0.attention.wqkv.weight is [64, 48] where params.json "
        "with 2 files asks for [128, 48]",
    ),
    "ranks of different widths": (
        "meta",
        lambda at: edit_pth(
            at / "consolidated.02.pth", lambda t: t.update({QKV: torch.zeros(48, 48)})
        ),
        ValueError,
        "{at}/consolidated.02.pth: layers.0.attention.wqkv.weight is [48, 48] but [64, 48] in "
        "consolidated.00.pth: the files are not parts of one checkpoint",
    ),
    "a number of ranks that does not divide the model": (
        "meta",
        lambda at: shutil.copy(at / "consolidated.00.pth", at / "consolidated.04.pth"),
        ValueError,
        "{at}: layers.0.attention.wqkv.weight cannot be cut into 5 equal parts, one for each file",
    ),
    "a truncated .pth file": (
        "meta",
        lambda at: cut(at / "consolidated.03.pth", 10_000),
        ValueError,
        "{at}/consolidated.03.pth is truncated or not a file of torch.save: fetch the file again",
    ),
    "a .pth file with a broken name": (
        "meta",
        lambda at: (at / "consolidated.03.pth").write_bytes(
            (at / "consolidated.03.pth").read_bytes().replace(b"tok_emb", b"\xfftok_em")
        ),
        ValueError,
        "{at}/consolidated.03.pth is truncated or not a file of torch.save: fetch the file again",
    ),
    "a pickle that is no file of torch.save": (
        "meta",
        lambda at: (at / "consolidated.00.pth").write_bytes(pickle.dumps({"a": 1})),
        ValueError,
        "{at}/consolidated.00.pth is truncated or not a file of torch.save: fetch the file again",
    ),
    "a pickle that would run code": (
        "meta",
        lambda at: edit_pth(at / "consolidated.00.pth", lambda t: t.update(x=RunsCode())),
        ValueError,
        "{at}/consolidated.00.pth holds codecs.open and is not opened: only tensors are read, "
        "because anything else in a pickle may run code",
    ),
    "a .pth file without names": (
        "meta",
        lambda at: torch.save([torch.zeros(1)], at / "consolidated.00.pth"),
        ValueError,
        "{at}/consolidated.00.pth holds a list, not named tensors",
    ),
    "a missing tensor of Meta's": (
        "meta",
        lambda at: edit_pth(at / "consolidated.01.pth", lambda t: t.pop(QKV)),
        ValueError,
        "{at}/consolidated.01.pth lacks layers.0.attention.wqkv.weight, which params.json with 4 "
        "files asks for",
    ),
    "a foreign tensor in Meta's": (
        "meta",
        lambda at: edit_pth(
            at / "consolidated.01.pth", lambda t: t.update({"layers.0.x": torch.zeros(1)})
        ),
        ValueError,
        "{at}/consolidated.01.pth holds layers.0.x, for which params.json with 4 files has no "
        "place",
    ),
    "Meta's quantised experts": (
        "meta",
        lambda at: edit_pth(
            at / "consolidated.00.pth", lambda t: t.update({QKV: t[QKV].to(torch.float8_e4m3fn)})
        ),
        ValueError,
        "{at}/consolidated.00.pth: layers.0.attention.wqkv.weight holds float8_e4m3fn where "
        "weights are float32, bfloat16, float16, float64; of quantised files those of {programs} "
        "are read",
    ),
    "the scales of a rank of Meta's are missing": (
        "meta-fp8",
        lambda at: (at / "fp8_scales_2.pt").unlink(),
        FileNotFoundError,
        "{at}/fp8_scales_2.pt is missing: it has the scales of what consolidated.02.pth holds in 8 "
        "bits, layers.1.feed_forward.experts.moe_w_in_eD_F and 8 other tensors",
    ),
    "a missing scale of Meta's": (
        "meta-fp8",
        lambda at: edit_pth(at / "fp8_scales_0.pt", lambda t: t.pop(CODES)),
        ValueError,
        "{at}/fp8_scales_0.pt lacks layers.3.feed_forward.experts.moe_w_out_eF_D, which "
        "consolidated.00.pth asks for",
    ),
    "no scale of Meta's": (
        "meta-fp8",
        lambda at: edit_pth(at / "fp8_scales_0.pt", dict.clear),
        ValueError,
        "{at}/fp8_scales_0.pt lacks layers.1.feed_forward.experts.moe_w_in_eD_F and 8 other "
        "tensors, which consolidated.00.pth asks for",
    ),
    "a scale of Meta's of another shape": (
        "meta-fp8",
        lambda at: edit_pth(at / "fp8_scales_3.pt", lambda t: t.update({CODES: t[CODES].T})),
        ValueError,
        "{at}/fp8_scales_3.pt: layers.3.feed_forward.experts.moe_w_out_eF_D is [48, 5] where "
        "consolidated.03.pth asks for [5, 48]",
    ),
    "ranks of Meta's of which some are in fp8": (
        "meta-fp8",
        lambda at: edit_pth(
            at / "consolidated.02.pth", lambda t: t.update({CODES: t[CODES].float()})
        ),
        ValueError,
        "{at}/consolidated.02.pth: layers.3.feed_forward.experts.moe_w_out_eF_D holds float32 "
        "where params.json with 4 files asks for float8_e4m3fn",
    ),
}


def sizes(path):
    content = path.read_bytes()
    return {"whole": len(content), "header": 8 + int.from_bytes(content[:8], "little")}


def never(*_):
    raise AssertionError("numbers are read before everything is checked")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_folder_is_refused_in_one_sentence(good, tmp_path, monkeypatch, kind):
    folder, spoil, exception, sentence = KINDS[kind]
    monkeypatch.setattr(shipped, "names", lambda: ["maxi", "mini"])
    at = tmp_path / "model"
    shutil.copytree(good / folder, at)
    spoil(at)
    monkeypatch.setattr(huggingface, "fill", never)
    monkeypatch.setattr(meta, "fill", never)
    with pytest.raises(exception) as caught:
        load(at)
    known = {
        "programs": "llama4-lab, compressed-tensors, ModelOpt, bitsandbytes, MLX and llama.cpp"
    }
    known |= sizes(good / "single/model.safetensors")
    assert str(caught.value) == sentence.format(at=at, **known)


@pytest.mark.parametrize("folder", ["single", "shards", "meta", "meta-fp8", "pictures"])
def test_the_folders_were_good_before_they_were_spoilt(good, folder):
    assert load(good / folder).norm.weight.isfinite().all()


def test_an_unknown_name_is_answered_with_the_closest_shipped_one(monkeypatch):
    monkeypatch.setattr(shipped, "names", lambda: ["maxi", "mini"])
    with pytest.raises(ValueError) as caught:
        load("mimi")
    assert str(caught.value) == (
        "unknown model 'mimi': did you mean 'mini'? give a shipped model's name (maxi, mini) or a "
        "checkpoint folder"
    )
    with pytest.raises(FileNotFoundError, match=r"^mimi does not exist: give a checkpoint folder"):
        load(Path("mimi"))


def test_a_file_is_no_folder(good):
    with pytest.raises(NotADirectoryError) as caught:
        load(good / "single/config.json")
    sentence = (
        f"{good}/single/config.json is a file: give the folder of the checkpoint, or a file of GGUF"
    )
    assert str(caught.value) == sentence


@pytest.mark.parametrize("device", ["mps:9", "gpu"])
def test_a_device_that_is_not_there_is_named(good, device):
    config = load(good / "single").config
    for make in (partial(load, good / "single"), partial(random, config)):
        with pytest.raises(ValueError, match=f"no device '{device}' was found: this machine has"):
            make(device=device)


def test_weights_are_not_loaded_as_whole_numbers(good):
    with pytest.raises(ValueError) as caught:
        load(good / "single", dtype=torch.int8)
    assert str(caught.value) == (
        "dtype torch.int8 is not one for weights: give torch.float32, torch.bfloat16, "
        "torch.float16, torch.float64, or None"
    )


@pytest.mark.parametrize("given", [0, 1.5])
def test_a_number_of_tiles_that_is_none_is_refused_before_anything_is_read(good, given):
    with pytest.raises(ValueError) as caught:
        inspect.unwrap(load)(good / "single", max_tiles=given)  # without the types checked
    sentence = f"max_tiles {given} is no number of tiles: give a whole number from 1 up"
    assert str(caught.value) == sentence


# ---- saving


@pytest.fixture
def model(good):
    return load(good / "single")


def test_a_folder_with_something_else_is_not_written_to(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError) as caught:
        save(model, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds thesis.tex and no Llama 4 checkpoint of Hugging Face's format: give a "
        "new or empty folder"
    )
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="no Llama 4 checkpoint"):
        save(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "thesis.tex"]


def test_a_file_is_not_written_over(model, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError) as caught:
        save(model, tmp_path / "model")
    assert str(caught.value) == f"{tmp_path}/model is a file: give the name of a folder"


@contextmanager
def little_disk():
    """No file may grow beyond 300 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(model, tmp_path):
    save(model, tmp_path, max_shard_bytes=650_000)
    before = content(tmp_path)
    sentence = (
        rf"^{tmp_path} could not be written \(.*File too large.*\); the files that were there are "
        "intact$"
    )
    with little_disk(), pytest.raises(OSError, match=sentence):
        save(model, tmp_path)
    assert content(tmp_path) == before


def test_a_model_is_saved_over_the_files_that_it_has_mapped(good, tmp_path, mapped_files_stay):
    for name in good.glob("shards/*"):
        shutil.copy(name, tmp_path)
    model = load(tmp_path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for size in (5_000_000, 650_000):
        save(model, tmp_path, max_shard_bytes=size)
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    del model
    save(load(good / "single"), tmp_path)
    assert content(tmp_path) == content(good / "single")  # what was moved out of the way is gone


@pytest.mark.parametrize("name", ["model-00002", "model.safetensors.index"])
@pytest.mark.parametrize("is_old", [True, False])
def test_a_file_that_cannot_be_moved_leaves_all_where_they_were(
    model, tmp_path, monkeypatch, name, is_old
):
    save(pair(text_config(**TEXT), seed=1)[1], tmp_path, max_shard_bytes=650_000)
    before, replace, refused = content(tmp_path), Path.replace, []

    def moving(file, to):
        at = file if is_old else to
        if at.name.startswith(name) and at.parent == tmp_path and not refused:
            refused.append(at)
            raise PermissionError(13, "Access is denied")
        return replace(file, to)

    monkeypatch.setattr(Path, "replace", moving)
    with pytest.raises(OSError) as caught:
        save(model, tmp_path, max_shard_bytes=650_000)
    assert str(caught.value) == (
        f"{tmp_path} could not be replaced ([Errno 13] Access is denied); the files that were "
        "there are intact: close what has them open, or give another folder"
    )
    assert refused and content(tmp_path) == before


def test_a_full_disk_leaves_no_new_folder(model, tmp_path):
    sentence = rf"^{tmp_path}/new could not be written \(.*File too large.*\)$"
    with little_disk(), pytest.raises(OSError, match=sentence):
        save(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with little_disk(), pytest.raises(OSError, match="the files that were there are intact"):
        (tmp_path / "empty").mkdir()
        save(model, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_interruption_leaves_the_earlier_checkpoint_intact(model, tmp_path, monkeypatch):
    save(model, tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(saving, "_write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path, max_shard_bytes=1_000_000)
    assert content(tmp_path) == before


@pytest.mark.parametrize("moved", [1, 3, 1000])
@pytest.mark.parametrize("size", [650_000, 5_000_000])  # in several files and in one
def test_files_of_two_checkpoints_are_never_taken_for_one(
    model, good, tmp_path, monkeypatch, moved, size
):
    save(pair(text_config(**TEXT), seed=1)[1], tmp_path, max_shard_bytes=size)
    replace, left = Path.replace, iter(range(moved))

    def moving(file, to):
        if file.name == "config.json" or next(left, None) is None:
            raise KeyboardInterrupt
        return replace(file, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", moving)
        save(model, tmp_path, max_shard_bytes=650_000)
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it needs config\.json"):
        load(tmp_path)
    save(model, tmp_path)
    assert content(tmp_path) == content(good / "single")


def test_what_others_wrote_meanwhile_stays_after_an_interruption(model, tmp_path, monkeypatch):
    def interrupt(*_):
        (tmp_path / "new" / "notes.txt").write_text("mine")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["notes.txt"]


def test_two_saves_at_once_leave_each_other_alone(model, good, tmp_path, monkeypatch):
    write, other = saving.save_file, load(good / "pictures")

    def slowly(*given, **options):
        monkeypatch.setattr(saving, "save_file", write)
        save(other, tmp_path)
        write(*given, **options)

    monkeypatch.setattr(saving, "save_file", slowly)
    save(model, tmp_path)
    assert content(tmp_path) == content(good / "single")


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_killed_saves_left_goes_when_a_save_completes(model, tmp_path):
    left = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=tmp_path))
    (left / "model.safetensors").write_text("half")
    kept = [tmp_path / ".unfinished-conversion", tmp_path / ".unfinished-Chapter3"]
    for folder in kept:
        folder.mkdir()
    save(model, tmp_path)
    assert not left.exists() and all(folder.is_dir() for folder in kept)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_who_may_read_a_saved_model_is_for_the_umask_to_say(model, tmp_path, mask):
    before = os.umask(mask)
    try:
        save(model, tmp_path / "single")
        save(model, tmp_path / "shards", max_shard_bytes=650_000)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*")}
    assert len(modes) > 4 and set(modes.values()) == {0o666 & ~mask}


# ---- models that are no longer what their config says


def test_a_model_that_has_lost_layers_is_not_saved(model, tmp_path):
    last = len(model.layers) - 1
    del model.layers[last]
    with pytest.raises(ValueError) as caught:
        save(model, tmp_path / "new")
    assert re.fullmatch(
        rf"the model lacks layers\.{last}\.\S+ and \d+ other tensors, which its config asks for: "
        "change model.config to what the model has become",
        str(caught.value),
    )
    assert not (tmp_path / "new").exists()
    model.config = model.config.replace(num_hidden_layers=last)
    save(model, tmp_path / "new")
    assert len(load(tmp_path / "new").layers) == last


def test_what_the_config_has_no_place_for_is_not_saved(model, tmp_path):
    shape = list(model.norm.weight.shape)
    model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError) as caught:
        save(model, tmp_path / "new")
    assert str(caught.value) == (
        f"norm.weight is [3] where the model's config asks for {shape}: change model.config to "
        "what the model has become"
    )
    model.norm = torch.nn.LayerNorm(*shape)
    with pytest.raises(
        ValueError, match=r"the model holds norm\.bias, for which its config has no"
    ):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def test_weights_in_two_places_are_saved_twice(model, tmp_path):
    model.lm_head.weight = model.embed_tokens.weight
    model.layers[0].self_attn.q_proj = model.layers[1].self_attn.q_proj
    save(model, tmp_path)
    ids = torch.arange(5, 20)[None]
    assert torch.equal(load(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("write", [save, convert])
def test_a_size_of_files_is_a_number(write, good, model, tmp_path):
    given = model if write is save else good / "single"
    with pytest.raises(ValueError) as caught:  # unwrapped: the tests' type checker would say it
        inspect.unwrap(write)(given, tmp_path / "new", max_shard_bytes="5GB")
    assert str(caught.value) == "max_shard_bytes='5GB': give a number of bytes, as 5_000_000_000"
    assert list(tmp_path.iterdir()) == []
