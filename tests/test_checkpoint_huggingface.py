"""Hugging Face folders, read and written."""

import inspect
import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from parity import LLAMA3_ROPE, PATCH_ID, VISION, pair, text_config
from peak_memory import peak_of_loading
from safetensors import safe_open
from safetensors.torch import save_file
from small_tokenizer import small_tokenizer
from transformers import Llama4ForCausalLM

from llama4_lab import SCOUT, Llama4Config, random, trace
from llama4_lab.checkpoint import convert, huggingface, load, save, shipped
from llama4_lab.generate import tokens

# What a model has: text config, vision config, bytes in one file when saved.
MODELS = {
    "dense and MoE": (text_config(interleave_moe_layer_step=2), None, "5GB"),
    "scaled RoPE, no qk norm": (
        text_config(rope_parameters=LLAMA3_ROPE, use_qk_norm=False),
        None,
        "5GB",
    ),
    "top-2 in shards": (text_config(num_experts_per_tok=2), None, "100KB"),
    "pictures": (text_config(), VISION, "5GB"),
    "pictures in shards": (text_config(interleave_moe_layer_step=2), VISION, "100KB"),
}
ROUNDING = {"atol": 1e-5, "rtol": 0}  # logits are of order 1


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A transformers model, the folder that it wrote, and what to feed it."""
    text, vision, shard = MODELS[request.param]
    hf, _ = pair(text, vision)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    inputs = {"input_ids": torch.randint(3, 80, (2, 37))}
    if vision is not None:
        inputs["input_ids"][0, 4:13] = inputs["input_ids"][1, 20:29] = PATCH_ID
        inputs["pixel_values"] = torch.randn(2, 3, 24, 24)
    return hf, tmp_path / "theirs", inputs


def small(**changes):
    """Return one of our models, random and small."""
    sizes = {
        "vocab_size": 336,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "vision_config": None,
    }
    return random(SCOUT.replace(**sizes | changes))


def stored(folder):
    """Return the tensors of all files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@torch.no_grad()
def test_a_transformers_folder_gives_equal_logits(saved):
    hf, folder, inputs = saved
    torch.testing.assert_close(load(folder)(**inputs), hf(**inputs).logits, **ROUNDING)


@torch.no_grad()
def test_transformers_opens_what_we_save_and_gives_the_same_logits(saved, tmp_path):
    hf, folder, inputs = saved
    save(load(folder), tmp_path / "ours", max_shard_bytes=200_000)
    again = type(hf).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert again.dtype == torch.float32
    assert torch.equal(again(**inputs).logits, hf(**inputs).logits)


def test_transformers_opens_a_model_whose_vocabulary_has_no_token_for_padding(tmp_path):
    model = small()
    assert model.config.pad_token_id >= model.config.vocab_size
    save(model, tmp_path)
    again = Llama4ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_to_ours_to_transformers_keeps_every_byte(saved, tmp_path, dtype):
    hf, _, _ = saved
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype)
    hf.save_pretrained(tmp_path / "first")
    save(load(tmp_path / "first"), tmp_path / "ours")
    type(hf).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "second")
    assert_same_bytes(stored(tmp_path / "first"), stored(tmp_path / "ours"))
    assert_same_bytes(stored(tmp_path / "first"), stored(tmp_path / "second"))


def test_config_survives_saving_and_loading(tmp_path):
    _, ours = pair(text_config(rope_parameters=LLAMA3_ROPE, interleave_moe_layer_step=2), VISION)
    save(ours, tmp_path)
    again = load(tmp_path).config
    rules = [(c.is_moe(i), c.attention_chunk(i)) for c in (ours.config, again) for i in range(8)]
    assert rules[:8] == rules[8:]
    layers = {"moe_layers": None, "no_rope_layers": None}  # rules in one, lists in the other
    assert again.replace(**layers) == ours.config.replace(**layers)


def test_spellings_of_the_launch_are_read(tmp_path):
    _, ours = pair(text_config())
    save(ours, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"attn_temperature_tuning": 4, "no_rope_layers": [], "moe_layers": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load(tmp_path).config
    assert again.attn_temperature_tuning is True
    assert [again.uses_rope(i) for i in range(8)] == [True, True, True, False] * 2


@pytest.mark.parametrize("vision", [None, VISION])
@torch.no_grad()
def test_tied_embeddings_stay_one_tensor(tmp_path, vision):
    hf, _ = pair(text_config(), vision)
    hf.get_input_embeddings().weight.mul_(48**-0.5)  # for logits of order 1
    hf.get_output_embeddings().weight = hf.get_input_embeddings().weight
    hf.config.tie_word_embeddings = hf.config.get_text_config().tie_word_embeddings = True
    hf.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.lm_head.weight is ours.embed_tokens.weight
    ids = torch.randint(3, 80, (2, 37))
    torch.testing.assert_close(ours(ids), hf(ids).logits, **ROUNDING)

    save(ours, tmp_path / "ours")
    assert not any("lm_head" in name for name in stored(tmp_path / "ours"))
    again = type(hf).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(again(ids).logits, hf(ids).logits)


def test_a_second_table_in_the_file_of_a_tied_model_is_left_out(tmp_path):
    model = small(tie_word_embeddings=True)
    save(model, tmp_path)
    tensors = stored(tmp_path)
    table = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": table}, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).lm_head.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("row", [0, 5, 335])
def test_a_second_table_with_one_row_of_its_own_is_read(tmp_path, monkeypatch, row):
    monkeypatch.setattr(huggingface, "PIECE", 6 * 32)  # some rows at a time
    save(small(tie_word_embeddings=True), tmp_path)
    tensors = stored(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][row, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="another one, which is read"):
        assert torch.equal(load(tmp_path).lm_head.weight, tensors["lm_head.weight"])


@torch.no_grad()
def test_a_dense_model_that_counts_no_experts_opens(tmp_path):
    # As the small published models of this architecture are: dense, with RoPE in all layers.
    none = {"num_local_experts": 0, "num_experts_per_tok": 0, "moe_layers": []}
    text = text_config(
        **none, interleave_moe_layer_step=0, no_rope_layers=[1] * 8, attention_chunk_size=64
    )
    hf, _ = pair(text)
    hf.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    ids = torch.randint(3, 80, (2, 37))
    torch.testing.assert_close(ours(ids), hf(ids).logits, **ROUNDING)
    with trace(ours, ["layers.*.mlp.out", "layers.*.attn.pattern"]) as cache:
        ours(ids)
    assert len(cache) == 16
    save(ours, tmp_path / "ours")
    again = Llama4ForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, hf(ids).logits, **ROUNDING)
    sentence = "num_local_experts 0 must be positive: layer 1 has experts"
    with pytest.raises(ValueError, match=sentence):
        Llama4Config.from_dict({**text, "model_type": "llama4_text", "moe_layers": [1, 3]})


@pytest.mark.parametrize("vision", [None, VISION])
@torch.no_grad()
def test_a_read_out_of_its_own_is_read_whatever_the_config_says(tmp_path, vision):
    hf, _ = pair(text_config(), vision)
    hf.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    raw = json.loads(file.read_text())
    raw.get("text_config", raw)["tie_word_embeddings"] = True
    file.write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match="but the weights hold another one, which is read"):
        ours = load(tmp_path / "theirs")
    ids = torch.randint(3, 80, (2, 37))
    torch.testing.assert_close(ours(ids), hf(ids).logits, **ROUNDING)
    assert not ours.config.tie_word_embeddings
    with pytest.warns(UserWarning, match="another one, which is read"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours").lm_head.weight, ours.lm_head.weight)


def test_of_two_words_on_ties_the_inner_one_counts():
    raw = SCOUT.to_dict() | {"tie_word_embeddings": True}
    assert not Llama4Config.from_dict(raw).tie_word_embeddings
    del raw["text_config"]["tie_word_embeddings"]
    assert not Llama4Config.from_dict(raw).tie_word_embeddings


@torch.no_grad()
def test_a_multimodal_folder_can_be_loaded_without_its_vision_encoder(tmp_path):
    hf, _ = pair(text_config(), VISION)
    hf.save_pretrained(tmp_path)
    model = load(tmp_path, text_only=True)
    assert model.config.vision_config is None and not hasattr(model, "vision_model")
    ids = torch.randint(3, 80, (2, 37))
    torch.testing.assert_close(model(ids), hf(ids).logits, **ROUNDING)
    save(model, tmp_path / "text")
    again = Llama4ForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    torch.testing.assert_close(again(ids).logits, hf(ids).logits, **ROUNDING)


def test_a_multimodal_config_over_text_weights_gives_a_text_model(tmp_path):
    multimodal, _ = pair(text_config(), VISION)
    multimodal.save_pretrained(tmp_path)
    text, expected = pair(text_config())
    text.save_pretrained(tmp_path / "text")
    shutil.copy(tmp_path / "text/model.safetensors", tmp_path / "model.safetensors")
    sentence = (
        f"^{tmp_path}/config.json has a vision_config but model.safetensors no vision encoder: "
        "only the text model is read; fetch the other weights, or say text_only=True$"
    )
    with pytest.warns(UserWarning, match=sentence):
        model = load(tmp_path)
    with warnings.catch_warnings(action="error"):
        load(tmp_path, text_only=True)
        load(tmp_path / "text")
    assert model.config == expected.config.replace(image_token_index=PATCH_ID, vision_config=None)
    assert torch.equal(model.norm.weight, expected.norm.weight)


def test_a_loaded_model_is_ready_to_run_and_to_train(tmp_path):
    save(small(), tmp_path)
    model = load(tmp_path)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.layers[0].feed_forward.experts.gate_up_proj.grad is not None
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # goes to the mapping's own pages
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_dtype_is_kept_or_converted(tmp_path):
    save(small().bfloat16(), tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    wide = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.gpu
def test_a_model_loads_onto_the_gpu_with_the_same_numbers(tmp_path):
    model = small()
    save(model, tmp_path)
    on_gpu = load(tmp_path, device="cuda").state_dict()
    for name, tensor in model.state_dict().items():
        assert on_gpu[name].is_cuda and torch.equal(on_gpu[name].cpu(), tensor), name


def test_saving_replaces_an_earlier_checkpoint_and_nothing_else(tmp_path):
    save(small(), tmp_path, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*"))) > 3
    (tmp_path / "notes.txt").write_text("mine")
    second = small(num_local_experts=2)
    save(second, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "notes.txt"]
    assert torch.equal(load(tmp_path).norm.weight, second.norm.weight)
    save(second, tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(load(tmp_path).lm_head.weight, second.lm_head.weight)


def test_shards_are_no_larger_than_asked(tmp_path):
    save(small(), tmp_path, max_shard_bytes=30_000)
    sizes = {}
    for path in tmp_path.glob("model-*"):
        with safe_open(path, "pt") as file:
            sizes[path.name] = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
    assert all(sum(each) <= 30_000 or len(each) == 1 for each in sizes.values())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert set(index["weight_map"].values()) == set(sizes)


def test_a_model_can_be_saved_over_the_folder_that_it_came_from(tmp_path):
    model = small()
    save(model, tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load(tmp_path)
    save(loaded, tmp_path)
    for state in (loaded.state_dict(), load(tmp_path).state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_the_folders_tokenizer_makes_prompts_for_the_model(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    raw = text_config(model_type="llama4", vision_config=VISION)
    vision = Llama4Config.from_dict(raw).vision_config
    model = small(vision_config=vision, image_token_index=tokenizer.patch_id)
    assert model.tokenizer is None
    save(model, tmp_path / "model")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "model")
    model = load(tmp_path / "model", max_tiles=2)
    picture = np.zeros((24, 200, 3), dtype=np.uint8)
    prompt = model.prompt("What colour is it?", images=[picture])
    assert prompt.pixel_values.shape == (3, 3, 24, 24)  # two tiles and the global one
    assert model(**prompt).isfinite().all()


def test_a_folder_without_tokenizer_gives_a_model_without_prompts(tmp_path):
    save(small(), tmp_path)
    model = load(tmp_path)
    assert model.tokenizer is None and model.build_prompt is None


def test_a_saved_model_carries_its_tokenizer_and_what_lies_beside_it(tmp_path):
    save(small(), tmp_path / "first")
    small_tokenizer(tmp_path / "first")
    (tmp_path / "first/generation_config.json").write_text('{"temperature": 0.6}')
    save(load(tmp_path / "first"), tmp_path / "second")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert load(tmp_path / "second").tokenizer.encode("Hello") != []


def test_a_text_ends_where_generation_config_says(tmp_path, monkeypatch):
    hf, _ = pair(text_config())  # whose config says that it ends at 2
    hf.save_pretrained(tmp_path / "first")
    file, ids = tmp_path / "first/generation_config.json", torch.arange(5, 29)[None]
    free = [step.item() for step in tokens(load(tmp_path / "first"), ids, 9, temperature=0)]
    ends = [free[4], 96]
    file.write_text(json.dumps({"eos_token_id": ends, "temperature": 0.1}))
    model = load(tmp_path / "first")
    assert model.tokenizer is None and model.config.stop_token_ids == (*ends,)
    found = [step.item() for step in tokens(model, ids, 9, temperature=0)]
    assert len(free) == 9 and found == free[: free.index(free[4]) + 1]
    theirs = Llama4ForCausalLM.from_pretrained(tmp_path / "first")
    expected = theirs.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    assert found == expected.tolist()

    save(model, tmp_path / "saved")
    convert(tmp_path / "first", tmp_path / "converted")
    for name in ("saved", "converted"):
        assert load(tmp_path / name).config.stop_token_ids == (*ends,)
    file.write_text(json.dumps({"eos_token_id": 7}))
    assert load(tmp_path / "first").config.eos_token_id == 7
    file.write_text(json.dumps({"eos_token_id": None}))
    assert load(tmp_path / "first").config.eos_token_id == 2
    file.write_text(json.dumps({"eos_token_id": "</s>"}))
    monkeypatch.setattr(Llama4Config, "__init__", inspect.unwrap(Llama4Config.__init__))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id '</s>' must be"):
        load(tmp_path / "first")


def test_where_a_text_ends_can_be_changed_and_saved(tmp_path):
    save(small(), tmp_path / "first")
    small_tokenizer(tmp_path / "first")
    said = {"eos_token_id": [3, 4], "temperature": 0.6}
    (tmp_path / "first/generation_config.json").write_text(json.dumps(said))
    model = load(tmp_path / "first")
    model.config = model.config.replace(eos_token_id=(5, 6))
    save(model, tmp_path / "second")
    assert load(tmp_path / "second").config.eos_token_id == (5, 6)
    said["eos_token_id"] = [5, 6]
    assert json.loads((tmp_path / "second/generation_config.json").read_text()) == said


def test_a_model_finds_its_folder_wherever_its_process_goes(tmp_path, monkeypatch):
    save(small(), tmp_path / "first")
    small_tokenizer(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    model = load("first")
    monkeypatch.chdir("/")
    save(pickle.loads(pickle.dumps(model)), tmp_path / "second")
    assert load(tmp_path / "second").tokenizer.encode("Hello") != []


def test_the_tokenizer_of_an_earlier_checkpoint_goes_with_it(tmp_path):
    save(small(), tmp_path)
    small_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("stay")
    save(small(vocab_size=97, image_token_index=90), tmp_path)
    assert load(tmp_path).tokenizer is None
    assert {file.name for file in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "notes.txt")
    }


def test_a_shipped_model_is_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    model = small()
    save(model, tmp_path / "tiny")
    (tmp_path / "not-a-model").mkdir()
    assert shipped.names() == ["tiny"]
    assert torch.equal(load("tiny").norm.weight, model.norm.weight)


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = SCOUT.replace(
        vocab_size=16384,
        hidden_size=512,
        num_hidden_layers=24,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=384,
        num_local_experts=8,
        vision_config=None,
    )
    model = random(config, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 3e8
    save(model, tmp_path, max_shard_bytes=10**8)
    peak = peak_of_loading(tmp_path)
    assert peak <= 1.2 * weights, f"{peak / weights:.2f} times the weights"
