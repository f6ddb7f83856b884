"""GGUF files of llama.cpp: the same logits as the weights that their codes stand for."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter
from gguf_file import write_gguf, write_mmproj
from parity import VISION, pair, text_config
from small_tokenizer import small_tokenizer

import llama4_lab as l4
from llama4_lab import cli
from llama4_lab.checkpoint.gguf import GgufFile, _header
from llama4_lab.checkpoint.quantised import packable
from llama4_lab.packed import Packed

# What llama.cpp has no numbers for is as in its code: the chunk, NoPE layers and temperature.
FIXED = {
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "no_rope_layer_interval": 4,
}
# Rows of whole blocks of 32, which quantised kinds need.
TEXT = text_config(
    **FIXED,
    vocab_size=352,
    hidden_size=64,
    intermediate_size=32,
    intermediate_size_mlp=96,
    num_attention_heads=4,
    num_hidden_layers=4,
    interleave_moe_layer_step=2,
    rope_parameters={"rope_type": "default", "rope_theta": 777.0},
)
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
IDS = torch.arange(5, 45)[None] * 7 % 352


def written(path, kind="Q8_0", changes=None, **options):
    """Return transformers' model with the weights of a file."""
    theirs, _ = pair(TEXT | (changes or {}))
    write_gguf(theirs, path, kind, **options)
    return theirs.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    small_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return written(folder / "m.gguf", tokenizer=folder / "tokenizer.json")


@pytest.fixture(scope="module")
def file(theirs, folder):
    return folder / "m.gguf"


def same(logits, theirs, ids=IDS):
    expected = theirs(ids).logits
    # The parity of logits of order 1 to 5; those of tied embeddings reach 50.
    atol = 1e-5 * max(1.0, expected.abs().max().item() / 5)
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "TQ2_0"])
@torch.no_grad()
def test_a_file_has_the_logits_of_the_weights_that_it_stands_for(tmp_path, kind):
    wide = {"hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 256}
    heads = {"num_attention_heads": 8, "head_dim": 32}
    path = tmp_path / "m.gguf"
    theirs = written(path, kind, wide | heads if kind == "TQ2_0" else {})
    same(l4.load(path, dtype=torch.float32)(IDS), theirs)
    own = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    assert l4.load(path).dtype == own


@pytest.mark.parametrize(
    "changes",
    [
        {"interleave_moe_layer_step": 1},
        {"num_experts_per_tok": 2},
        {"num_local_experts": 128, "use_qk_norm": False},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_number_of_the_metadata_is_read(tmp_path, changes):
    path = tmp_path / "m.gguf"
    theirs = written(path, "F32", changes)
    model = l4.load(path)
    same(model(IDS), theirs)
    for name, value in changes.items():
        assert getattr(model.config, name) == value
    assert model.config.rms_norm_eps == 3e-3 and model.config.max_position_embeddings == 512


@torch.no_grad()
def test_scaled_frequencies_are_found_from_their_factors(tmp_path):
    path, changes = tmp_path / "m.gguf", {"rope_parameters": SCALED, "head_dim": 32}
    factors = [1.0] * 9 + [
        8.0
    ] * 7  # of wavelengths of 2π·500000^(2i/32) beyond 8192, from i = 9 on
    theirs = written(path, "F32", changes, factors=factors)
    model = l4.load(path)
    assert model.config.rope_scaling == l4.config.RopeScaling(factor=8.0)
    same(model(IDS + 1), theirs, IDS + 1)


def test_other_scalings_are_refused(tmp_path):
    written(tmp_path / "m.gguf", "F32", factors=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    with pytest.raises(ValueError, match=r"m.gguf: rope_freqs.weight scales RoPE in another way"):
        l4.load(tmp_path / "m.gguf")
    written(tmp_path / "plain.gguf", "F32", factors=[1.0] * 8)
    assert l4.load(tmp_path / "plain.gguf").config.rope_scaling is None


@torch.no_grad()
def test_experts_stay_in_the_file(file, theirs):
    model = l4.load(file, experts="mmap", dtype=torch.float32, memory_limit=0)
    same(model(IDS), theirs)
    memory = model.expert_memory
    # gate, up and down of 64 x 32 numbers: 34 bytes for 32 of them
    assert memory.bytes_held == 0 and memory.bytes_read % (3 * 64 * 34) == 0
    assert 0 < memory.bytes_read <= 2 * 5 * 3 * 64 * 34
    read = pickle.loads(pickle.dumps(model.layers[1].feed_forward.experts.gate_up_proj))
    assert torch.equal(read[3], model.layers[1].feed_forward.experts.gate_up_proj[3])
    same(copy.deepcopy(model)(IDS), theirs)
    as_stored = l4.load(file, experts="mmap")  # numbers of few bits are bfloat16
    assert torch.equal(as_stored(IDS), l4.load(file)(IDS))


@torch.no_grad()
def test_the_rest_can_be_packed_while_experts_stay_in_the_file(file):
    model = l4.load(file, experts="mmap", quantize="int8", dtype=torch.float32)
    plain = l4.load(file, dtype=torch.float32)
    experts = [name for name, _ in plain.named_parameters() if ".experts." in name]
    for name, (module, part) in packable(plain).items():
        mine = model.get_submodule(name.rpartition(".")[0])
        weight, old = getattr(mine, part), getattr(module, part)
        if name in experts:
            assert torch.equal(torch.stack([weight[e] for e in range(5)]), old)
        else:
            assert isinstance(weight, Packed)
            old.copy_(weight.unpack())
    torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int8"])
@torch.no_grad()
def test_a_file_becomes_a_folder_of_our_own(file, theirs, tmp_path, quantize):
    l4.convert(file, tmp_path / "ours", quantize=quantize, dtype=torch.float32)
    ours = l4.load(tmp_path / "ours")
    if quantize is None:
        same(ours(IDS), theirs)
    else:
        direct = l4.load(file, quantize=quantize, dtype=torch.float32)
        assert torch.equal(ours(IDS), direct(IDS))
    assert ours.tokenizer.encode("the circle") == l4.load(file).tokenizer.encode("the circle")


@torch.no_grad()
def test_a_loaded_file_is_saved_as_transformers_opens_it(file, theirs, tmp_path):
    l4.save(l4.load(file, dtype=torch.float32), tmp_path / "hf")
    same(l4.load(tmp_path / "hf")(IDS), theirs)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@torch.no_grad()
def test_parts_of_a_model_are_one(tmp_path):
    theirs = written(tmp_path / "m.gguf", max_tensors=20)
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) > 1
    for part in (parts[0], parts[-1]):
        same(l4.load(part, dtype=torch.float32)(IDS), theirs)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"is one of {len(parts)} parts: {parts[1].name}"):
        l4.load(parts[0])


@pytest.fixture
def with_vision(tmp_path):
    """Return transformers' model and the file of its text, beside which its encoder lies."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # as in llama.cpp
    theirs, _ = pair(TEXT, VISION | rope)
    theirs.eval()
    small_tokenizer(tmp_path)
    path = tmp_path / "m.gguf"
    text = pair(TEXT)[0]
    text.load_state_dict(theirs.language_model.state_dict())
    write_gguf(text, path, "F32", tokenizer=tmp_path / "tokenizer.json")
    write_mmproj(theirs, tmp_path / "mmproj-F32.gguf")
    return theirs, path


@torch.no_grad()
def test_pictures_are_read_by_the_encoder_beside(with_vision):
    theirs, path = with_vision
    model, image = l4.load(path), torch.randint(0, 255, (30, 24, 3), dtype=torch.uint8).numpy()
    theirs.config.image_token_id = theirs.config.image_token_index = model.config.image_token_index
    content = [{"type": "image"}, {"type": "text", "text": "the colour"}]
    prompt = model.prompt([{"role": "user", "content": content}], images=[image])
    assert model.config.image_token_index == model.tokenizer.patch_id
    expected = theirs(input_ids=prompt.input_ids, pixel_values=prompt.pixel_values).logits
    torch.testing.assert_close(model(**prompt), expected, atol=1e-5, rtol=0)
    moved = model(input_ids=prompt.input_ids, pixel_values=prompt.pixel_values + 1)
    assert not torch.allclose(moved, expected, atol=1e-2)
    l4.convert(path, path.with_name("ours"))
    torch.testing.assert_close(
        l4.load(path.with_name("ours"))(**prompt), expected, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_which_encoder_is_read_is_clear(with_vision):
    theirs, path = with_vision
    vision = l4.load(path).config.vision_config
    assert vision is not None and l4.load(path, text_only=True).config.vision_config is None
    # One of another width, as of another model in the folder, is none of this one.
    other, _ = pair(TEXT | {"hidden_size": 32}, VISION)
    write_mmproj(other, path.with_name("mmproj-other.gguf"))
    assert l4.load(path).config.vision_config == vision
    write_mmproj(theirs, path.with_name("mmproj-F16.gguf"), norm="attn_post_norm")
    with pytest.warns(UserWarning, match=r"mmproj-F16.gguf, mmproj-F32.gguf beside .*m.gguf hold"):
        assert l4.load(path).config.vision_config is None
    path.with_name("mmproj-F32.gguf").unlink()
    assert l4.load(path).config.vision_config == vision


def test_the_tokenizer_is_that_of_the_file(file, folder, tmp_path):
    mine, original = l4.load(file).tokenizer, small_tokenizer(folder)
    assert mine.special == original.special
    for text in ("Hello! What's the colour of the circle?\n\n\n\n", "für 12345 µ 🦙", ""):
        assert mine.encode(text) == original.encode(text)
        assert mine.decode(mine.encode(text)) == text
    again = pickle.loads(pickle.dumps(mine))
    assert again.encode("the circle") == mine.encode("the circle")
    written(tmp_path / "m.gguf", "F16", tokenizer=folder / "tokenizer.json")  # other weights
    assert l4.load(tmp_path / "m.gguf").tokenizer.content == mine.content
    config = l4.load(file).config
    assert config.eos_token_id == tuple(sorted(mine.stop_ids))
    assert (config.bos_token_id, config.pad_token_id) == (mine.bos_id, mine.pad_id)
    assert (
        l4.load(file).prompt("the circle").tokens[1:]
        == l4.load(file).prompt("the circle", add_bos=False).tokens
    )


def test_arrays_of_the_metadata_are_read_at_once(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    writer, numbers = GGUFWriter(path, "llama4"), {"INT32": [-1, 2**31 - 1], "UINT8": [0, 255]}
    numbers |= {"FLOAT32": [0.5, -2.0, 1e-3], "BOOL": [True, False], "UINT64": [2**63]}
    for kind, values in numbers.items():
        writer.add_key_value(kind, values, GGUFValueType.ARRAY, GGUFValueType[kind])
    writer.add_array("texts", ["", "µ 🦙", "a b", "x" * 300])
    writer.add_array("rows", [[1, 2], [3]])
    writer.add_uint16("behind", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert expected["texts"][1] == "µ 🦙" and expected["behind"] == 7
    calls, theirs = [], GGUFReader._get_field_parts
    monkeypatch.setattr(
        GGUFReader, "_get_field_parts", lambda *args: calls.append(args) or theirs(*args)
    )
    assert _header(path)[0] == expected
    assert len(calls) <= len(expected)


def test_a_file_of_another_byte_order_is_refused(tmp_path):
    path, other = tmp_path / "m.gguf", "BIG" if sys.byteorder == "little" else "LITTLE"
    writer = GGUFWriter(path, "llama4", endianess=GGUFEndian[other])
    writer.add_array("texts", ["some", "words"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="was written for machines of another byte order"):
        l4.load(path)


def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path, folder):
    written(tmp_path / "m.gguf", tokenizer=folder / "tokenizer.json", pre="qwen2")
    with pytest.raises(ValueError, match="its tokenizer cuts texts as 'qwen2' does"):
        l4.load(tmp_path / "m.gguf")


def test_a_broken_vocabulary_is_refused(tmp_path, folder):
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["merges"].append(["a", "nowhere"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    written(tmp_path / "m.gguf", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"m\.gguf is not a Llama 4 tokenizer \(Token `nowhere`"):
        l4.load(tmp_path / "m.gguf")


def test_what_is_no_llama_4_is_refused(tmp_path, file):
    other = tmp_path / "other.gguf"
    writer = GGUFWriter(other, "qwen3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="of the kind 'qwen3', and only llama4 is read"):
        l4.load(other)
    wide = tmp_path / "wide.gguf"
    writer = GGUFWriter(wide, "llama4")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sentence = r"wide\.gguf holds numbers of the kind F64 \(blocks of 1\), which the package gguf"
    with pytest.raises(ValueError, match=f"{sentence} cannot turn back: give a file of another"):
        l4.load(wide)
    short = tmp_path / "short.gguf"
    for size in (0, 3, 20, 2000, file.stat().st_size - 5000):
        short.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=re.escape(f"{short} is truncated or no GGUF file")):
            l4.load(short)
    with pytest.raises(FileNotFoundError, match=r"is a folder of GGUF files: give one, .*m\.gguf"):
        l4.load(shutil.copytree(file.parent, tmp_path / "folder", ignore=_but_gguf))
    with pytest.raises(
        NotADirectoryError, match="is a file: give the folder of the checkpoint, or"
    ):
        l4.load(shutil.copy(file, tmp_path / "m.bin"))


def _but_gguf(_folder, names):
    return [name for name in names if not name.endswith(".gguf")]


def test_a_tensor_that_is_missing_or_foreign_is_named(tmp_path):
    theirs, _ = pair(TEXT)
    del theirs.model.layers[1].self_attn.q_proj
    write_gguf(theirs, tmp_path / "m.gguf", "F32")
    with pytest.raises(ValueError, match=r"lacks blk.1.attn_q.weight, which its metadata asks for"):
        l4.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "call",
    ["l4.load({file!r})", "sys.exit(cli.main(['trace', {file!r}, 'the circle']))"],
    ids=["load", "trace"],
)
def test_without_the_package_one_sentence_says_what_to_do(file, call):
    lines = "import sys", "sys.modules['gguf'] = None", "import llama4_lab as l4"
    code = "\n".join([*lines, "from llama4_lab import cli", call.format(file=str(file))])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = f"{file} is read by the package gguf: install it with `pip install gguf`"
    assert done.returncode != 0 and done.stderr.splitlines()[-1].endswith(said)
    assert "cli" not in call or done.stderr.count("\n") == 1


def test_commands_take_a_file(file, tmp_path, capsys):
    cli.main(["trace", str(file), "the circle"])
    assert "' circle'" in capsys.readouterr().out
    cli.main(["plan", "--model", str(file), "--gpu", "h100"])
    assert "weights" in capsys.readouterr().out
    cli.main(["convert", str(file), str(tmp_path / "ours"), "--quantize", "int8"])
    assert l4.load(tmp_path / "ours", quantize="int8").config == GgufFile.open(file).config
