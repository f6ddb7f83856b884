"""Meta's ``params.json``: other names, and multipliers where we have widths."""

from collections.abc import Mapping
from typing import Any

from llama4_lab.config import Llama4Config, RopeScaling, VisionConfig


def config_from_params(params: Mapping[str, Any]) -> Llama4Config:
    """Translate Meta's names and multipliers; what is left out has Meta's defaults.

    Widths follow the rule of Meta's ``moe.py``: with `auto_scale_F` one routed and one shared
    expert together are as wide as a dense layer. Temperature tuning is off unless asked for,
    while Hugging Face's configs have it on; below `floor_scale` tokens (8192) it changes nothing.

    Raises:
        ValueError: a key without default is missing, or a setting that is not supported.
    """
    params = params.get("model", params)
    if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in params]:
        raise ValueError(f"no value for {', '.join(missing)}")
    for key, choice in (("quantization_args", "scheme"), ("lora_args", "rank")):
        if (params.get(key) or {}).get(choice):
            raise ValueError(f"{key} is set: only plain weights are read")
    dim, layers, heads = params["dim"], params["n_layers"], params["n_heads"]
    vocab_size = params.get("vocab_size", -1)  # -1 is written for that of Llama 4's tokenizer
    interval = params.get("nope_layer_interval")
    moe = params.get("moe_args")
    chosen: dict[str, Any] = {"moe_layers": ()}
    if moe:
        share = moe.get("capacity_factor", 1.0) + 1 if moe.get("auto_scale_F", True) else 1
        chosen = {
            "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe.get("top_k", 1),
            "interleave_moe_layer_step": moe.get("interleave_moe_layer_step", 1),
            "intermediate_size": _width(params, params.get("ffn_exp") or 4.0, share),
        }
    if params.get("use_scaled_rope"):
        chosen["rope_scaling"] = RopeScaling(
            factor=params.get("rope_scaling_factor") or 16.0,
            high_freq_factor=params.get("rope_high_freq_factor") or 1.0,
        )
    if vision := params.get("vision_args"):
        chosen["vision_config"] = _vision_config(vision)
    return Llama4Config(
        vocab_size=Llama4Config.vocab_size if vocab_size == -1 else vocab_size,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=params.get("head_dim") or dim // heads,
        intermediate_size_mlp=_width(params, 4.0, 1),
        no_rope_layer_interval=interval or Llama4Config.no_rope_layer_interval,
        no_rope_layers=None if interval else (1,) * layers,
        attention_chunk_size=params.get("attention_chunk_size"),
        attn_temperature_tuning=bool(params.get("attn_temperature_tuning", False)),
        floor_scale=int(params.get("floor_scale", 8192)),
        attn_scale=params.get("attn_scale", 0.1),
        use_qk_norm=params.get("use_qk_norm", False),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=float(params.get("rope_theta", 500000.0)),
        **chosen,
    )


def _width(params: Mapping[str, Any], expansion: float, share: float) -> int:
    width = int(2 * int(expansion * params["dim"]) / 3)
    width = int((params.get("ffn_dim_multiplier") or 1.0) * width)
    multiple = params.get("multiple_of", 256)
    return -(-int(width / share) // multiple) * multiple


def _vision_config(vision: Mapping[str, Any]) -> VisionConfig:
    sizes = {}
    for key in ("image_size", "patch_size"):
        height, width = vision[key]["height"], vision[key]["width"]
        if height != width:
            raise ValueError(f"{key} {height}x{width} is not square")
        sizes[key] = height
    out = vision["output_dim"]
    return VisionConfig(
        hidden_size=vision["dim"],
        num_hidden_layers=vision["n_layers"],
        num_attention_heads=vision["n_heads"],
        intermediate_size=int(vision["mlp_ratio"] * vision["dim"]),
        pixel_shuffle_ratio=vision["pixel_shuffle_ratio"],
        projector_input_dim=out,
        projector_output_dim=out,
        vision_output_dim=out,
        **sizes,
    )
