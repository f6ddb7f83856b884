"""Our logits equal transformers' on tiny random models, every scale unlike its default."""

import dataclasses

import pytest
import torch
from parity import LARGEST, LLAMA3_ROPE, PATCH_ID, VISION, largest, pair, text_config

from llama4_lab import Llama4, trace

pytestmark = pytest.mark.usefixtures("no_grad")

# float32, logits of order 1 to 5: rounding through 8 layers was seen to reach 8e-6.
TOLERANCE = 1e-5

TEXT = {
    "scout": {"rope_parameters": LLAMA3_ROPE},
    "maverick": {"use_qk_norm": False, "interleave_moe_layer_step": 2},
    "all_dense": {"moe_layers": []},
    "moe_layers_listed": {"moe_layers": [0, 5]},
    "moe_every_third": {"interleave_moe_layer_step": 3},
    "top_2": {"num_experts_per_tok": 2},
    "top_3_of_128": {"num_experts_per_tok": 3, "num_local_experts": 128, "num_hidden_layers": 4},
    "one_expert": {"num_local_experts": 1},
    "no_qk_norm": {"use_qk_norm": False},
    "temperature_off": {"attn_temperature_tuning": False},
    "temperature_every_slot": {"floor_scale": 1, "attn_scale": 0.7},
    "floor_scale_beyond_the_prompt": {"floor_scale": 1000},
    "chunk_1": {"attention_chunk_size": 1},
    "chunk_5": {"attention_chunk_size": 5},
    "chunk_longer_than_the_prompt": {"attention_chunk_size": 64},
    "nope_every_second": {"no_rope_layer_interval": 2},
    "nope_layers_listed": {"no_rope_layers": [1, 0, 0, 1, 1, 1, 0, 1]},
    "rope_everywhere": {"no_rope_layers": [1] * 8},
    "one_head_per_key_head": {"num_key_value_heads": 6},
    "one_key_head": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 32},
    "attention_bias": {"attention_bias": True},
    "large_eps": {"rms_norm_eps": 0.3},
    "llama3_with_a_middle_zone": {
        "rope_parameters": LLAMA3_ROPE
        | {"factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    },
    "llama3_with_its_zone_turned_round": {
        "rope_parameters": LLAMA3_ROPE
        | {"factor": 5.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
    },
}
VISION_GRID = {
    "scout_vision": ({}, {}),
    "top_2_dense_vision": ({"num_experts_per_tok": 2, "interleave_moe_layer_step": 2}, {}),
    "four_patches_a_block": ({}, {"pixel_shuffle_ratio": 1 / 3, "intermediate_size": 216}),
    "four_vision_heads": (
        {},
        {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128},
    ),
}


def assert_close(name, ours, theirs, keep=None):
    difference = largest(ours, theirs, keep)
    LARGEST[name] = max(LARGEST.get(name, 0.0), difference)
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", TEXT)
def test_parity_of_text(name):
    hf, ours = pair(text_config(**TEXT[name]), seed=3)
    ids = torch.randint(3, 97, (3, 37), generator=torch.Generator().manual_seed(1))
    expected = hf(ids, output_router_logits=True)
    with_logits = [i for i in range(ours.config.num_hidden_layers) if ours.config.is_moe(i)]
    names = [f"layers.{i}.router.logits" for i in with_logits]
    with trace(ours, names) as cache:
        logits = ours(ids)
    assert_close(name, logits, expected.logits)
    assert expected.logits.std() > 0.3, "the logits are too small to show a mistake"
    for i, router_logits in zip(names, expected.router_logits or (), strict=True):
        assert_close(name, cache[i].flatten(0, 1), router_logits)

    # The same batch with left padding of unequal length.
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    expected = hf(ids, attention_mask=mask).logits
    padded = ours(ids, attention_mask=mask)
    assert_close(name, padded, expected, mask.bool())
    position = (mask.cumsum(1) - 1).clamp(min=0)
    expected = hf(ids, attention_mask=mask, position_ids=position).logits
    assert_close(name, padded, expected, mask.bool())

    # And in uneven pieces through the cache, across chunk borders, against one pass of theirs.
    cache, pieces, done = ours.new_cache(3), [], 0
    for size in (3, 1, 7, 9, 1, 1, 15):
        end = done + size
        pieces.append(ours(ids[:, done:end], attention_mask=mask[:, :end], cache=cache))
        done = end
    assert_close(name, torch.cat(pieces, dim=1), expected, mask.bool())


@pytest.mark.parametrize("name", VISION_GRID)
def test_parity_of_images(name):
    text, vision = VISION_GRID[name]
    hf, ours = pair(text_config(**text), VISION | vision, seed=5)
    tokens = ours.config.vision_config.tokens_per_tile
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 80, (2, 40), generator=generator)
    ids[0, 4 : 4 + tokens] = PATCH_ID  # one tile in the first row, two in the second
    ids[1, 2 : 2 + tokens] = PATCH_ID
    ids[1, 20 : 20 + tokens] = PATCH_ID
    pixels = torch.randn(3, 3, 24, 24, generator=generator)
    expected = hf(ids, pixel_values=pixels).logits
    assert_close(name, ours(ids, pixels), expected)
    assert largest(ours(ids, pixels.flip(0)), expected) > 0.1

    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = hf(ids, pixel_values=pixels, attention_mask=mask).logits
    cache = ours.new_cache(2)
    first = ours(ids[:, :31], pixels, mask[:, :31], cache)
    rest = ours(ids[:, 31:], attention_mask=mask, cache=cache)
    assert_close(name, torch.cat([first, rest], dim=1), expected, mask.bool())


def test_the_grid_would_notice_a_wrong_constant():
    """Each field of the config that a formula reads moves the logits far beyond the tolerance."""
    hf, ours = pair(text_config(rope_parameters=LLAMA3_ROPE), seed=3)
    ids = torch.randint(3, 97, (1, 37), generator=torch.Generator().manual_seed(1))
    expected = hf(ids).logits
    scaling = ours.config.rope_scaling
    assert scaling is not None
    for change in (
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 500.0},
        {"rope_scaling": dataclasses.replace(scaling, factor=8.0)},
        {"attention_chunk_size": 9},
        {"floor_scale": 5},
        {"attn_scale": 0.2},
        {"attn_temperature_tuning": False},
        {"use_qk_norm": False},
        {"no_rope_layer_interval": 8, "no_rope_layers": None},
        {"num_experts_per_tok": 2},
    ):
        wrong = Llama4(ours.config.replace(**change)).eval()
        wrong.load_state_dict(ours.state_dict())
        assert largest(wrong(ids), expected) > 50 * TOLERANCE, change
