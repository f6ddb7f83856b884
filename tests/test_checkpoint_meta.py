"""Meta's folders: what params.json means, and weights cut over several files."""

import pytest
import torch
from meta_folder import PARAMS, TEXT, VISION_ARGS, write_meta
from parity import PATCH_ID, VISION, pair, text_config
from peak_memory import peak_of_loading

from llama4_lab import MAVERICK, SCOUT, random
from llama4_lab.checkpoint import convert, load
from llama4_lab.checkpoint.huggingface import is_transposed, their_name
from llama4_lab.checkpoint.params import config_from_params

# Logits are of order 1 and eight float32 layers, summed in another order, leave about 1e-5; a
# piece in the wrong place shows at 0.1.
ROUNDING = {"atol": 3e-5, "rtol": 0}

# As in the published params.json.
PUBLISHED = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "vocab_size": 202048,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "multiple_of": 2048,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "nope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "vision_args": {
        "image_size": {"height": 336, "width": 336},
        "patch_size": {"height": 14, "width": 14},
        "dim": 1408,
        "n_layers": 34,
        "n_heads": 16,
        "mlp_ratio": 4.0,
        "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    },
}
SCOUT_PARAMS = PUBLISHED | {
    "use_scaled_rope": True,
    "use_qk_norm": True,
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
}
MAVERICK_PARAMS = PUBLISHED | {
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": {"num_experts": 128, "capacity_factor": 1.0, "interleave_moe_layer_step": 2},
}
VISION_OF_META = VISION | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}  # params.json has no key
}


@pytest.mark.parametrize(
    ("params", "preset"), [(SCOUT_PARAMS, SCOUT), (MAVERICK_PARAMS, MAVERICK)], ids=["16E", "128E"]
)
def test_published_params_give_the_presets(params, preset):
    not_in_params = {"max_position_embeddings": 262144, "attn_temperature_tuning": False}
    assert config_from_params(params) == preset.replace(**not_in_params)


def test_params_can_lie_in_a_model_entry_and_leave_the_vocabulary_open():
    assert config_from_params({"model": SCOUT_PARAMS}) == config_from_params(SCOUT_PARAMS)
    assert config_from_params(SCOUT_PARAMS | {"vocab_size": -1}).vocab_size == 202048


def test_what_params_leave_out_has_metas_defaults():
    params = {"dim": 96, "n_layers": 2, "n_heads": 3, "use_scaled_rope": True}
    left_out = {
        "n_kv_heads": 3,
        "head_dim": 32,
        "vocab_size": 202048,
        "ffn_dim_multiplier": 1.0,
        "ffn_exp": 4.0,
        "multiple_of": 256,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling_factor": 16,
        "rope_high_freq_factor": 1,
        "nope_layer_interval": None,
        "attention_chunk_size": None,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "floor_scale": 8192.0,
        "attn_scale": 0.1,
        "vision_args": None,
        "quantization_args": {"scheme": None},
        "lora_args": None,
    }
    moe = {"capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1, "interleave_moe_layer_step": 1}
    for experts in ({}, {"num_experts": 5}):
        found = config_from_params(params | {"moe_args": experts})
        said = params | left_out | {"moe_args": experts and experts | moe}
        assert config_from_params(said) == found
        none = dict.fromkeys(("n_kv_heads", "head_dim", "ffn_dim_multiplier", "ffn_exp"))
        assert config_from_params(params | {"moe_args": experts} | none) == found


def test_params_without_experts_or_nope_layers_mean_dense_layers_with_rope():
    params = PARAMS | {"moe_args": None, "nope_layer_interval": None}
    config = config_from_params(params)
    assert not any(config.is_moe(i) for i in range(8))
    assert all(config.uses_rope(i) for i in range(8))
    config = config_from_params(PARAMS | {"nope_layer_interval": 3})
    assert [i for i in range(8) if not config.uses_rope(i)] == [2, 5]


def test_params_can_change_scaling_and_temperature():
    config = config_from_params(
        PARAMS | {"use_scaled_rope": True, "rope_scaling_factor": 8, "rope_high_freq_factor": 4}
    )
    assert (config.rope_scaling.factor, config.rope_scaling.high_freq_factor) == (8, 4)
    assert (config.floor_scale, config.attn_scale) == (4, 0.3)
    assert config_from_params(PARAMS).attn_temperature_tuning
    without = {key: value for key, value in PARAMS.items() if key != "attn_temperature_tuning"}
    assert not config_from_params(without).attn_temperature_tuning


def test_params_without_auto_scale_keep_the_experts_wide():
    moe = PARAMS["moe_args"] | {"auto_scale_F": False}
    assert config_from_params(PARAMS | {"moe_args": moe}).intermediate_size == 160


@pytest.mark.parametrize("num_files", [1, 2, 4])
@torch.no_grad()
def test_text_weights_cut_over_files_give_equal_logits(tmp_path, num_files):
    hf, _ = pair(text_config(**TEXT))
    write_meta(tmp_path, hf.state_dict(), PARAMS, num_files)
    ours = load(tmp_path)
    ids = torch.randint(3, 96, (2, 37))
    torch.testing.assert_close(ours(ids), hf(ids).logits, **ROUNDING)


@pytest.mark.parametrize("num_files", [1, 2, 4])
@torch.no_grad()
def test_vision_weights_cut_over_files_give_equal_logits(tmp_path, num_files):
    hf, _ = pair(text_config(**TEXT), VISION_OF_META)
    write_meta(tmp_path, hf.state_dict(), PARAMS | {"vision_args": VISION_ARGS}, num_files)
    ours = load(tmp_path)
    ours.config = ours.config.replace(image_token_index=PATCH_ID)  # beyond this small vocabulary
    ids = torch.randint(3, 80, (2, 37))
    ids[0, 4:13] = ids[1, 2:11] = ids[1, 20:29] = PATCH_ID
    pixels = torch.randn(3, 3, 24, 24)
    expected = hf(ids, pixel_values=pixels).logits
    torch.testing.assert_close(ours(ids, pixels), expected, **ROUNDING)


@pytest.mark.parametrize("num_files", [1, 4])
def test_files_give_the_same_numbers_as_the_same_weights_from_hugging_face(tmp_path, num_files):
    hf, expected = pair(text_config(**TEXT), VISION_OF_META)
    write_meta(tmp_path, hf.state_dict(), PARAMS | {"vision_args": VISION_ARGS}, num_files)
    ours = load(tmp_path).state_dict()
    assert ours.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_the_vision_encoder_can_be_left_out(tmp_path):
    hf, _ = pair(text_config(**TEXT), VISION_OF_META)
    write_meta(tmp_path, hf.state_dict(), PARAMS | {"vision_args": VISION_ARGS}, 2)
    model = load(tmp_path, text_only=True)
    assert model.config == load(tmp_path).config.replace(vision_config=None)
    assert not hasattr(model, "vision_model")


def test_dtype_is_kept_or_converted(tmp_path):
    hf, _ = pair(text_config(**TEXT))
    write_meta(tmp_path, hf.bfloat16().state_dict(), PARAMS, 2)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    wide = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize(("num_files", "names"), [(1, "weights"), (2, "modules"), (4, "weights")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_fp8_are_the_numbers_that_their_codes_stand_for(
    tmp_path, num_files, names, dtype
):
    state = pair(text_config(**TEXT))[0].to(dtype).state_dict()
    for kind in (names, "plain"):
        write_meta(tmp_path / kind, state, PARAMS, num_files, fp8=kind)
    coded, plain = load(tmp_path / names), load(tmp_path / "plain")
    for name, weight in plain.named_parameters():
        assert torch.equal(coded.get_parameter(name), weight), name
    assert {(p.dtype, p.is_leaf, p.requires_grad) for p in coded.parameters()} == {
        (dtype, True, True)
    }
    name = "layers.5.feed_forward.experts.down_proj"
    exact = state["model.layers.5.feed_forward.experts.down_proj"].mT
    assert 0 < (coded.get_parameter(name) - exact).abs().max() < 0.05 * exact.abs().max()
    convert(tmp_path / names, tmp_path / "ours")
    converted = load(tmp_path / "ours")
    assert all(torch.equal(converted.get_parameter(n), w) for n, w in plain.named_parameters())


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    wide = {"dim": 512, "head_dim": 64, "vocab_size": 8192, "multiple_of": 64, "n_layers": 24}
    params = PARAMS | wide
    model = random(config_from_params(params), dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 2.9e8
    state = {
        their_name(name, multimodal=False): tensor.mT if is_transposed(name) else tensor
        for name, tensor in model.state_dict().items()
    }
    write_meta(tmp_path, state, params, 4)
    peak = peak_of_loading(tmp_path)
    assert peak <= 1.2 * weights, f"{peak / weights:.2f} times the weights"
