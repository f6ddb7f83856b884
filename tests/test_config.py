"""Sizes, per-layer rules, published variants of config.json."""

import dataclasses
import inspect
import json

import pytest
import torch
from tiny import CONFIG, VISION

import llama4_lab as l4
from llama4_lab.checkpoint import convert, load
from llama4_lab.cli import main
from llama4_lab.model.text import rope_frequencies


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        (l4.SCOUT, 108_641_793_536, 17_172_894_720),
        (l4.MAVERICK, 401_583_781_376, 17_184_691_200),
        (l4.BEHEMOTH_ESTIMATE, 1_979_736_447_488, 287_683_393_536),
    ],
)
def test_parameter_counts_are_metas_and_those_of_the_model(preset, total, active):
    counts = preset.parameter_counts()
    assert (counts["total"], counts["active"]) == (total, active)
    with torch.device("meta"):
        model = l4.Llama4(preset)
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "vision_config": None},
        {"tie_word_embeddings": True},
        {"moe_layers": ()},
    ],
)
def test_parameter_counts_follow_every_switch(changes):
    config = CONFIG.replace(**changes)
    counted = sum(p.numel() for p in l4.random(config).parameters())
    assert config.parameter_counts()["total"] == counted


def test_layers_of_scout_and_maverick():
    assert [i for i in range(48) if not l4.SCOUT.uses_rope(i)] == list(range(3, 48, 4))
    assert all(l4.SCOUT.is_moe(i) for i in range(48))
    assert [i for i in range(48) if l4.MAVERICK.is_moe(i)] == list(range(1, 48, 2))
    assert l4.SCOUT.attention_chunk(3) is None
    assert l4.SCOUT.attention_chunk(4) == 8192


def test_the_estimate_is_marked_as_one():
    assert l4.BEHEMOTH_ESTIMATE.is_estimate
    assert not l4.SCOUT.is_estimate


def test_no_rope_layers_are_named_backwards():
    config = CONFIG.replace(no_rope_layers=(1, 0, 1, 1, 1, 0))
    assert [config.uses_rope(i) for i in range(6)] == [True, False, True, True, True, False]


@pytest.mark.parametrize(
    "config", [CONFIG, CONFIG.replace(vision_config=None), l4.SCOUT, l4.MAVERICK]
)
def test_a_config_survives_its_file(config):
    again = l4.Llama4Config.from_dict(config.to_dict())
    rules = [(again.uses_rope(i), again.is_moe(i)) for i in range(again.num_hidden_layers)]
    assert rules == [
        (config.uses_rope(i), config.is_moe(i)) for i in range(config.num_hidden_layers)
    ]
    assert again == config


def test_a_config_from_a_file_can_have_fewer_layers():
    read = l4.Llama4Config.from_dict(l4.MAVERICK.to_dict())
    assert read.replace(num_hidden_layers=4).routed_layers == (1, 3)
    unusual = CONFIG.replace(moe_layers=(0, 4, 5), no_rope_layers=(1, 0, 1, 1, 1, 0))
    again = l4.Llama4Config.from_dict(unusual.to_dict())
    assert again.moe_layers == unusual.moe_layers
    assert again.no_rope_layers == unusual.no_rope_layers
    few = again.replace(num_hidden_layers=5)
    assert (few.moe_layers, few.no_rope_layers) == ((0, 4), (1, 0, 1, 1, 1))
    assert again.replace(num_hidden_layers=2, moe_layers=(1,)).routed_layers == (1,)


@pytest.mark.usefixtures("unchecked")
def test_lists_of_layers_become_tuples():
    listed = l4.SCOUT.replace(moe_layers=[1, 3], no_rope_layers=[1] * 48, eos_token_id=[1])
    assert hash(listed) == hash(
        l4.SCOUT.replace(moe_layers=(1, 3), no_rope_layers=(1,) * 48, eos_token_id=(1,))
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_config": None}, "text_config None must be an object"),
        ({"text_config": 3}, "text_config 3 must be an object"),
        ({"vision_config": [1]}, r"vision_config \[1\] must be an object or None"),
    ],
)
def test_parts_that_are_no_objects_are_refused(change, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        l4.Llama4Config.from_dict(CONFIG.to_dict() | change)


def test_both_spellings_of_the_rope_settings_and_the_launch_traps():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    old = {"rope_theta": 5000.0, "rope_scaling": scaling, "attn_temperature_tuning": 4}
    new = {"rope_parameters": scaling | {"rope_theta": 5000.0}, "attn_temperature_tuning": True}
    a, b = (
        l4.Llama4Config.from_dict(
            {"model_type": "llama4", "text_config": text | rope | {"no_rope_layers": []}}
        )
        for rope in (old, new)
    )
    assert a == b
    assert a.rope_theta == 5000.0
    assert a.rope_scaling == l4.RopeScaling(8.0, 1.0, 4.0, 8192)
    assert a.attn_temperature_tuning is True
    assert not a.uses_rope(3)


def test_scouts_frequencies_have_no_zone_in_between():
    freq = rope_frequencies(l4.SCOUT)
    plain = rope_frequencies(l4.SCOUT.replace(rope_scaling=None))
    assert torch.equal(freq[:35], plain[:35])
    torch.testing.assert_close(freq[35:], plain[35:] / 16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"num_key_value_heads": 4},
            "num_attention_heads 6 is not a multiple of num_key_value_heads 4",
        ),
        ({"head_dim": 15}, "head_dim 15 is odd: RoPE rotates pairs of numbers"),
        ({"num_experts_per_tok": 6}, "must lie between 1 and num_local_experts 5"),
        ({"attention_chunk_size": 0}, "must be positive, or None for no chunks"),
        ({"no_rope_layers": (1, 0)}, "no_rope_layers has 2 entries for 6 layers"),
        ({"moe_layers": (9,)}, "moe_layers names layer 9; this model has layers 0 to 5"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        CONFIG.replace(**change)


@pytest.fixture
def unchecked(monkeypatch):
    """Configs as users make them, without the types checked."""
    for kind in (l4.Llama4Config, l4.VisionConfig, l4.RopeScaling):
        monkeypatch.setattr(kind, "__init__", inspect.unwrap(kind.__init__))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": "128"}, "hidden_size '128' must be a whole number"),
        ({"hidden_size": "128", "head_dim": None}, "hidden_size '128' must be a whole number"),
        ({"num_local_experts": 8.0}, "num_local_experts 8.0 must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers True must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1 must be positive, or 0"),
        ({"vocab_size": 0}, "vocab_size 0 must be positive"),
        (
            {"no_rope_layer_interval": 0, "no_rope_layers": []},
            "no_rope_layer_interval 0 must be positive",
        ),
        ({"no_rope_layers": "1110"}, "no_rope_layers '1110' must be a list of whole numbers or "),
        ({"moe_layers": [1.0]}, r"moe_layers \(1\.0,\) must be a list of whole numbers or None"),
        ({"eos_token_id": "2"}, "eos_token_id '2' must be a whole number or a list of whole num"),
        ({"attention_chunk_size": "8"}, "attention_chunk_size '8' must be a whole number or None"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps 'x' must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan must be positive"),
        ({"rope_theta": "x"}, "rope_theta 'x' must be a number"),
        ({"use_qk_norm": 1}, "use_qk_norm 1 must be true or false"),
        ({"attn_temperature_tuning": "no"}, "attn_temperature_tuning 'no' must be true or false"),
        (
            {
                "rope_scaling": dataclasses.asdict(l4.RopeScaling())
                | {"type": "llama3", "factor": 0}
            },
            "rope_scaling factor 0 must be positive",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_values_of_the_wrong_kind_are_refused(change, sentence):
    raw = CONFIG.replace(vision_config=None).to_dict()
    with pytest.raises(ValueError, match=f"^{sentence}"):
        l4.Llama4Config.from_dict(raw | change)


def test_a_model_may_have_no_first_and_no_last_token():
    raw = CONFIG.replace(vision_config=None).to_dict()
    config = l4.Llama4Config.from_dict(raw | {"bos_token_id": None, "eos_token_id": None})
    assert (config.bos_token_id, config.stop_token_ids) == (None, ())
    assert config.to_dict()["eos_token_id"] is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({3: "chunked_attention"}, "layer 3, where only 'full_attention' is supported: it is with"),
        (
            {0: "full_attention"},
            "layer 0, where only 'chunked_attention' is supported: it has RoPE",
        ),
        ({5: "sliding_attention"}, "has 'sliding_attention' for layer 5, where only 'chunked"),
    ],
)
def test_masks_of_other_layers_than_those_with_rope_are_refused(change, sentence):
    raw = CONFIG.replace(vision_config=None).to_dict()
    chunked, full = "chunked_attention", "full_attention"
    types = [*[chunked] * 3, full, chunked, chunked]
    assert l4.Llama4Config.from_dict(raw | {"layer_types": types}) == l4.Llama4Config.from_dict(raw)
    without = raw | {"layer_types": [full] * 6, "attention_chunk_size": None}
    assert l4.Llama4Config.from_dict(without).attention_chunk(0) is None
    with pytest.raises(ValueError, match=sentence):
        wrong = [change.get(i, kind) for i, kind in enumerate(types)]
        l4.Llama4Config.from_dict(raw | {"layer_types": wrong})
    with pytest.raises(ValueError, match="layer_types has None for layer 5"):
        l4.Llama4Config.from_dict(raw | {"layer_types": types[:5]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": "24"}, "vision hidden_size '24' must be a whole number"),
        ({"patch_size": 0}, "vision patch_size 0 must be positive"),
        ({"pixel_shuffle_ratio": "x"}, "vision pixel_shuffle_ratio 'x' must be a number"),
        ({"pixel_shuffle_ratio": 3}, "pixel_shuffle_ratio 3 does not divide a grid"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_vision_values_of_the_wrong_kind_are_refused(change, sentence):
    raw = CONFIG.to_dict()
    raw["vision_config"] |= change
    with pytest.raises(ValueError, match=f"^{sentence}"):
        l4.Llama4Config.from_dict(raw)


@pytest.mark.usefixtures("unchecked")
def test_a_file_with_a_value_of_the_wrong_kind_is_named(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG.to_dict() | {"text_config": {"hidden_size": "128"}}))
    sentence = f"{file}: hidden_size '128' must be a whole number"
    for read in (load, lambda at: convert(at, tmp_path / "target")):
        with pytest.raises(ValueError) as caught:
            read(tmp_path)
        assert str(caught.value) == sentence
    assert main(["plan", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"llama4-lab: {sentence}\n"


def test_a_head_is_as_wide_as_the_model_allows_where_the_file_does_not_say():
    raw = CONFIG.replace(vision_config=None).to_dict() | {"head_dim": None}
    assert l4.Llama4Config.from_dict(raw).head_dim == 8


def test_other_refusals():
    with pytest.raises(TypeError, match="no field 'num_layers'; did you mean"):
        CONFIG.replace(num_layers=3)
    with pytest.raises(
        ValueError, match=r"layer 61 is out of range: this model has 48 layers \(0 to 47\)"
    ):
        l4.SCOUT.is_moe(61)
    with pytest.raises(ValueError, match="model_type 'llama' is not a Llama 4"):
        l4.Llama4Config.from_dict({"model_type": "llama"})
    with pytest.raises(ValueError, match="rope_type 'yarn' is not supported"):
        l4.Llama4Config.from_dict(
            {"model_type": "llama4_text", "rope_scaling": {"rope_type": "yarn"}}
        )
    with pytest.raises(ValueError, match="rope_type 'llama3' without factor"):
        l4.Llama4Config.from_dict(
            {"model_type": "llama4_text", "rope_scaling": {"rope_type": "llama3"}}
        )
    with pytest.raises(ValueError, match="hidden_act 'gelu' is not supported"):
        l4.Llama4Config.from_dict({"model_type": "llama4_text", "hidden_act": "gelu"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"patch_size": 5}, "image_size 24 is not a multiple of patch_size 5"),
        ({"pixel_shuffle_ratio": 0.3}, "does not divide a grid of 6x6 patches"),
        ({"num_attention_heads": 5}, "divisible by 4"),
        ({"intermediate_size": 100}, "must be hidden_size / pixel_shuffle_ratio"),
        ({"projector_input_dim": 21}, "must agree"),
    ],
)
def test_vision_sizes_that_contradict_each_other_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(VISION, **change)
