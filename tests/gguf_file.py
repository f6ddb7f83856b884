"""Write a transformers model as llama.cpp's converter does, and give the model it then is.

Spelled out from ``conversion/llama.py`` and ``conversion/llama4.py`` of llama.cpp, so that it
shares nothing with the reader that it tests.
"""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.experts.gate_proj": "ffn_gate_exps",
    "feed_forward.experts.up_proj": "ffn_up_exps",
    "feed_forward.experts.down_proj": "ffn_down_exps",
}
VISION = {
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear": "v.patch_embd",
    "vision_model.layernorm_pre": "v.pre_ln",
    "vision_model.layernorm_post": "v.post_ln",
    "vision_model.vision_adapter.mlp.fc1": "mm.model.mlp.1",
    "vision_model.vision_adapter.mlp.fc2": "mm.model.mlp.2",
    "multi_modal_projector.linear_1": "mm.model.fc",
    "input_layernorm": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def write_gguf(
    model: torch.nn.Module,
    path: Path,
    kind: str,
    factors: list[float] | None = None,
    tokenizer: Path | None = None,
    max_tensors: int = 0,
    pre: str = "llama4",
) -> None:
    """Write a ``Llama4ForCausalLM`` and put the weights that the file stands for into it.

    Norms and routers are float32, all else is of the `kind`. `max_tensors` makes several files.
    """
    config = model.config
    writer = GGUFWriter(path, "llama4", split_max_tensors=max_tensors)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size, pre)
    state = model.state_dict()
    for name, weight in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight.copy_(_add(writer, name, weight, kind))
    model.load_state_dict(state)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    _finish(writer)


def write_mmproj(model: torch.nn.Module, path: Path, norm: str = "ln2") -> None:
    """Write the vision encoder and projector of a ``Llama4ForConditionalGeneration`` in float32.

    Converters have called the norm before the MLP ``ln2`` and ``attn_post_norm``.
    """
    config = model.config.vision_config
    writer = GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("llama4")
    writer.add_vision_projection_dim(model.config.text_config.hidden_size)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_projector_scale_factor(int(1 / config.pixel_shuffle_ratio))
    names = VISION | {"post_attention_layernorm": norm}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.")
        if not name.startswith(("vision_model", "multi_modal_projector")):
            continue
        base, _, kind = name.rpartition(".")
        if name in names:
            theirs = names[name]
        elif base in names:
            theirs = f"{names[base]}.{kind}"
        else:
            _, _, _, layer, part = base.split(".", 4)
            theirs = f"v.blk.{layer}.{names[part]}.{kind}"
        writer.add_tensor(theirs, weight.numpy())
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, name: str, weight: Tensor, kind: str) -> Tensor:
    """Add a weight, and return what it has become."""
    if name.endswith("experts.gate_up_proj"):
        base = name.removesuffix("gate_up_proj")
        halves = weight.chunk(2, dim=-1)  # of e inputs outputs
        parts = zip(("gate_proj", "up_proj"), halves, strict=True)
        return torch.cat([_stack(writer, base + part, half, kind) for part, half in parts], dim=-1)
    if name.endswith("experts.down_proj"):
        return _stack(writer, name, weight, kind)
    return _tensor(writer, name.removesuffix(".weight"), weight, kind)


def _stack(writer: GGUFWriter, name: str, weight: Tensor, kind: str) -> Tensor:
    return _tensor(writer, name, weight.mT.contiguous(), kind).mT


def _tensor(writer: GGUFWriter, name: str, weight: Tensor, kind: str) -> Tensor:
    parts = name.split(".")
    is_layer = parts[:2] == ["model", "layers"]
    theirs = NAMES[".".join(parts[3:]) if is_layer else name]
    theirs = f"blk.{parts[2]}.{theirs}" if is_layer else theirs
    plain = weight.ndim == 1 or theirs.endswith("ffn_gate_inp")
    number = GGMLQuantizationType["F32" if plain else kind]
    data = quantize(weight.float().numpy(), number)
    writer.add_tensor(f"{theirs}.weight", data, raw_dtype=number)
    return torch.from_numpy(np.array(dequantize(data, number)))


def _add_tokenizer(writer: GGUFWriter, tokenizer: Path, size: int, pre: str) -> None:
    raw = json.loads(tokenizer.read_text(encoding="utf-8"))
    added = {token["id"]: token["content"] for token in raw["added_tokens"]}
    tokens = {i: token for token, i in raw["model"]["vocab"].items()} | added
    kinds = [
        TokenType.CONTROL if i in added else TokenType.NORMAL if i in tokens else TokenType.UNUSED
        for i in range(size)
    ]
    merges = raw["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
