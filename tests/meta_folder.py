"""Writes a transformers model's weights as Meta's ``params.json`` and ``consolidated.*.pth``.

Spelled out with plain torch from the shapes of Meta's files, so that it shares nothing with the
reader that it tests.
"""

import io
import json

import torch

# A model whose multipliers give whole quarters of everything, and both kinds of layers.
PARAMS = {
    "dim": 48,
    "n_layers": 8,
    "n_heads": 8,
    "n_kv_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4,
    "multiple_of": 8,
    "norm_eps": 3e-3,
    "rope_theta": 777.0,
    "use_scaled_rope": False,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attention_chunk_size": 8,
    "attn_temperature_tuning": True,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "moe_args": {
        "num_experts": 5,
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "top_k": 1,
        "interleave_moe_layer_step": 2,
    },
}
# The same in Hugging Face's names, with the widths that the multipliers give.
TEXT = {
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "intermediate_size": 80,
    "intermediate_size_mlp": 160,
    "interleave_moe_layer_step": 2,
}
VISION_ARGS = {
    "image_size": {"height": 24, "width": 24},
    "patch_size": {"height": 4, "width": 4},
    "dim": 24,
    "n_layers": 3,
    "n_heads": 2,
    "mlp_ratio": 4.0,
    "output_dim": 20,
    "pixel_shuffle_ratio": 0.5,
}


def write_meta(folder, state, params, num_files, fp8=None):
    """Write a transformers state dict, text only or multimodal.

    With `fp8` the rows of routed experts are rounded as by Meta's script: to codes, whose scales
    have the names of "weights" or of "modules", or "plain" in their own dtype.
    """
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    state = {name.removeprefix("language_model."): tensor for name, tensor in state.items()}
    for rank in range(num_files):
        held = shard(state, params, rank, num_files)
        if fp8:
            scales = round_experts(held, params, fp8)
            torch.save(scales, folder / f"fp8_scales_{rank}.pt")
        torch.save(held, folder / f"consolidated.{rank:02}.pth")


def round_experts(held, params, fp8):
    """Round the experts of all layers but the first and last, in place; return the scales."""
    scales = {}
    for i in range(1, params["n_layers"] - 1):
        for module, name in (("w1", "in_eD_F"), ("w3", "swiglu_eD_F"), ("w2", "out_eF_D")):
            prefix = f"layers.{i}.feed_forward.experts"
            if (key := f"{prefix}.moe_w_{name}") not in held:
                continue
            rows = held[key].unflatten(0, (params["moe_args"]["num_experts"], -1)).mT
            scale = rows.float().abs().amax(-1) / 448
            codes = (rows / scale[..., None]).to(torch.float8_e4m3fn)
            if fp8 == "plain":
                codes = (codes.float() * scale[..., None]).to(rows.dtype)
            held[key] = torch.nn.Parameter(codes.mT.flatten(0, 1).contiguous())
            scales[key if fp8 == "weights" else f"{prefix}.{module}"] = scale
    return scales


def shard(state, params, rank, num_files):
    """Return what the file of one rank holds."""

    def rows(name):
        return state[name].chunk(num_files, 0)[rank].clone()

    def columns(name):
        return state[name].chunk(num_files, 1)[rank].clone()

    out = {
        "tok_embeddings.weight": rows("model.embed_tokens.weight"),
        "output.weight": rows("lm_head.weight"),
        "norm.weight": state["model.norm.weight"],
        "rope.freqs": torch.ones(8),
    }
    step = params["moe_args"]["interleave_moe_layer_step"] if params["moe_args"] else 0
    for i in range(params["n_layers"]):
        hf, meta = f"model.layers.{i}", f"layers.{i}"
        out |= {
            f"{meta}.attention.wqkv.weight": torch.cat(
                [rows(f"{hf}.self_attn.{x}_proj.weight") for x in "qkv"]
            ),
            f"{meta}.attention.wqkv.layer_norm_weight": state[f"{hf}.input_layernorm.weight"],
            f"{meta}.attention.wqkv._extra_state": io.BytesIO(b"bytes of the trainer"),
            f"{meta}.attention.wo._extra_state": io.BytesIO(b"\x00\xff"),
            f"{meta}.attention.wo.weight": columns(f"{hf}.self_attn.o_proj.weight"),
        }
        norm = state[f"{hf}.post_attention_layernorm.weight"]
        hf, meta = f"{hf}.feed_forward", f"{meta}.feed_forward"
        if not step or (i + 1) % step:
            halves = [rows(f"{hf}.{x}_proj.weight") for x in ("gate", "up")]
            out |= {
                f"{meta}.mlp.layer_norm_weight": norm,
                f"{meta}.mlp.fc1_weight": torch.cat(halves),
                f"{meta}.mlp.fc2_weight": columns(f"{hf}.down_proj.weight"),
            }
            continue
        gate, up = state[f"{hf}.experts.gate_up_proj"].chunk(2, -1)
        down = state[f"{hf}.experts.down_proj"]
        experts, shared = f"{meta}.experts.moe_w", f"{hf}.shared_expert"
        out |= {
            f"{meta}.norm.weight": norm,
            f"{meta}.router_DE": state[f"{hf}.router.weight"].T.contiguous(),
            f"{experts}_in_eD_F": gate.chunk(num_files, -1)[rank].flatten(0, 1),
            f"{experts}_swiglu_eD_F": up.chunk(num_files, -1)[rank].flatten(0, 1),
            f"{experts}_out_eF_D": down.chunk(num_files, 1)[rank].flatten(0, 1),
            f"{meta}.w_in_shared_FD.weight": rows(f"{shared}.gate_proj.weight"),
            f"{meta}.w_swiglu_FD.weight": rows(f"{shared}.up_proj.weight"),
            f"{meta}.w_out_shared_DF.weight": columns(f"{shared}.down_proj.weight"),
            f"{meta}.running_gate_stats_3E": torch.zeros(3, len(down)),
            f"{meta}.global_gate_stats_3E": torch.zeros(3, len(down)),
            f"{meta}.expert_activation_DE": torch.zeros(4, len(down)),
        }
    if params.get("vision_args"):
        out |= vision_shard(state, params["vision_args"], rows, columns)
    return out


def vision_shard(state, args, rows, columns):
    encoder, adapter = "vision_embeddings.vision_encoder", "vision_embeddings.vision_adapter.mlp"
    hf = "vision_model"
    out = {
        "vision_projection.weight": rows("multi_modal_projector.linear_1.weight"),
        f"{encoder}.conv1._linear.weight": rows(f"{hf}.patch_embedding.linear.weight"),
        f"{encoder}.class_embedding": state[f"{hf}.class_embedding"],
        f"{encoder}.positional_embedding_vlm": state[f"{hf}.positional_embedding_vlm"],
        f"{adapter}.c_fc.weight": rows(f"{hf}.vision_adapter.mlp.fc1.weight"),
        f"{adapter}.c_proj.weight": columns(f"{hf}.vision_adapter.mlp.fc2.weight"),
    }
    for kind in ("weight", "bias"):
        out[f"{encoder}.ln_pre.{kind}"] = state[f"{hf}.layernorm_pre.{kind}"]
        out[f"{encoder}.ln_post.{kind}"] = state[f"{hf}.layernorm_post.{kind}"]
    for j in range(args["n_layers"]):
        meta, hf = f"{encoder}.transformer.resblocks.{j}", f"vision_model.model.layers.{j}"
        for kind in ("weight", "bias"):
            out[f"{meta}.ln_1.{kind}"] = state[f"{hf}.input_layernorm.{kind}"]
            out[f"{meta}.ln_2.{kind}"] = state[f"{hf}.post_attention_layernorm.{kind}"]
            out[f"{meta}.mlp.c_fc.{kind}"] = rows(f"{hf}.mlp.fc1.{kind}")
            for x in "qkv":
                out[f"{meta}.attn.w{x}.{kind}"] = rows(f"{hf}.self_attn.{x}_proj.{kind}")
        out[f"{meta}.attn.wo.weight"] = columns(f"{hf}.self_attn.o_proj.weight")
        out[f"{meta}.attn.wo.bias"] = state[f"{hf}.self_attn.o_proj.bias"]
        out[f"{meta}.mlp.c_proj.weight"] = columns(f"{hf}.mlp.fc2.weight")
        out[f"{meta}.mlp.c_proj.bias"] = state[f"{hf}.mlp.fc2.bias"]
    return out
