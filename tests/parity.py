"""Tiny random transformers Llama 4 models, and ours with the same weights."""

import torch
from torch import nn
from transformers import Llama4Config as HFConfig
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

from llama4_lab import Llama4, Llama4Config
from llama4_lab.checkpoint.huggingface import to_ours

PATCH_ID = 90
LARGEST: dict[str, float] = {}  # what a run found, for the summary line at its end


def largest(a, b, keep=None):
    difference = (a - b).abs()
    return (difference if keep is None else difference[keep]).max().item()


def text_config(**changes):
    """A small text model with every epsilon and scale unlike its default."""
    return {
        "model_type": "llama4_text",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 40,
        "intermediate_size_mlp": 56,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "attn_scale": 0.3,
        "attn_temperature_tuning": True,
        "use_qk_norm": True,
        "rms_norm_eps": 3e-3,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    } | changes


VISION = {
    "model_type": "llama4_vision_model",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 24,
    "patch_size": 4,
    "num_channels": 3,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 20,
    "projector_output_dim": 20,
    "vision_output_dim": 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 333.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 777.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}


def pair(text, vision=None, seed=0):
    """Return a random transformers model and ours with its weights, both float32."""
    torch.manual_seed(seed)
    if vision is None:
        raw = dict(text)
        hf_config = HFConfig(text_config=raw).text_config
        hf_config._attn_implementation = "eager"
        hf = Llama4ForCausalLM(hf_config)
    else:
        hf_config = HFConfig(
            text_config=dict(text), vision_config=dict(vision), image_token_index=PATCH_ID
        )
        hf_config._attn_implementation = "eager"
        hf = Llama4ForConditionalGeneration(hf_config)
    hf = hf.float().eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            # Large enough that a misplaced scale shows; norms are scattered around one.
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5) if name.endswith("weight") else parameter.normal_(
                    std=0.1
                )
            elif "router" in name:
                nn.init.normal_(parameter, std=0.2)
            else:
                fan_in = (
                    parameter.shape[-2]
                    if name.endswith(("gate_up_proj", "down_proj"))
                    else parameter.shape[-1]
                )
                nn.init.normal_(parameter, std=1.0 if "embed" in name else fan_in**-0.5)
    config = Llama4Config.from_dict(hf.config.to_dict())
    ours = Llama4(config).eval()
    ours.load_state_dict(to_ours(hf.state_dict()))
    return hf, ours
