"""A tiny model with every mechanism on, for tests that need no transformers."""

import llama4_lab as l4

VISION = l4.VisionConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=96,
    image_size=24,
    patch_size=4,
    projector_input_dim=20,
    projector_output_dim=20,
    vision_output_dim=20,
)
CONFIG = l4.Llama4Config(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=40,
    intermediate_size_mlp=56,
    num_local_experts=5,
    num_experts_per_tok=2,
    interleave_moe_layer_step=2,
    no_rope_layer_interval=4,
    attention_chunk_size=8,
    floor_scale=4,
    attn_scale=0.3,
    rms_norm_eps=3e-3,
    rope_theta=777.0,
    bos_token_id=1,
    eos_token_id=(2, 3),
    pad_token_id=0,
    image_token_index=90,
    vision_config=VISION,
)


def tiny(seed: int = 0, **changes: object) -> l4.Llama4:
    return l4.random(CONFIG.replace(**changes), seed).eval()
