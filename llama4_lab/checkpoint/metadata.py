"""The metadata of GGUF files: config and tokenizer.

What they do not say is as in llama.cpp's code for all Llama 4 (``src/models/llama4.cpp``): chunks
and the floor of the temperature of 8,192 tokens, its scale of 0.1, and every fourth layer a NoPE
layer, which are the defaults of our config.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.config import Llama4Config, RopeScaling, VisionConfig
from llama4_lab.model.text import rope_frequencies
from llama4_lab.prompt.tokenizer import PATTERN, Tokenizer

ARCHITECTURE = "llama4"
_SPLITTERS = ("llama4", "gpt-4o")  # llama.cpp's names for what cuts a text as `PATTERN` does
_NORMAL, _UNUSED = 1, 5  # kinds of tokens
_OF_ADDED = ("single_word", "lstrip", "rstrip", "normalized")


def config_from_metadata(
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Float[Tensor, "1 half"] | None,
    tokenizer: Tokenizer | None,
) -> Llama4Config:
    """Return the config of a model whose tensors have these shapes.

    Args:
        factors: that the wavelengths of RoPE are stretched by.

    Raises:
        KeyError: something is not said.
        ValueError: a dense model, or another scaling of RoPE than Llama 4 has.
    """

    def given(name: str) -> Any:
        return fields[f"{ARCHITECTURE}.{name}"]

    num_experts = fields.get(f"{ARCHITECTURE}.expert_count", 0)
    if not num_experts:
        raise ValueError("it has no experts: of dense models Hugging Face's folders are read")
    config = Llama4Config(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=given("embedding_length"),
        num_hidden_layers=given("block_count"),
        num_attention_heads=given("attention.head_count"),
        num_key_value_heads=given("attention.head_count_kv"),
        head_dim=given("rope.dimension_count"),
        intermediate_size=given("expert_feed_forward_length"),
        intermediate_size_mlp=given("feed_forward_length"),
        num_local_experts=num_experts,
        num_experts_per_tok=given("expert_used_count"),
        interleave_moe_layer_step=given("interleave_moe_layer_step"),
        use_qk_norm=num_experts != 128,  # which tells Maverick
        rms_norm_eps=_short(given("attention.layer_norm_rms_epsilon")),
        rope_theta=_short(given("rope.freq_base")),
        max_position_embeddings=given("context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        vision_config=_vision_config(fields, shapes),
    )
    if factors is not None:
        config = config.replace(rope_scaling=_scaling(config, factors[0]))
    return config if tokenizer is None else config.replace(**_special(tokenizer, config))


def _vision_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> VisionConfig | None:
    if "clip.projector_type" not in fields:
        return None

    def given(name: str) -> Any:
        return fields[f"clip.vision.{name}"]

    width = shapes["mm.model.fc.weight"][1]
    return VisionConfig(
        hidden_size=given("embedding_length"),
        num_hidden_layers=given("block_count"),
        num_attention_heads=given("attention.head_count"),
        intermediate_size=given("feed_forward_length"),
        image_size=given("image_size"),
        patch_size=given("patch_size"),
        pixel_shuffle_ratio=1 / given("projector.scale_factor"),
        projector_input_dim=width,
        projector_output_dim=width,
        vision_output_dim=width,
    )


def _special(tokenizer: Tokenizer, config: Llama4Config) -> dict[str, Any]:
    """Return the ids that a config names."""
    found: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tuple(sorted({*tokenizer.stop_ids})),
        "pad_token_id": tokenizer.pad_id,
    }
    if config.vision_config is not None:
        found["boi_token_index"] = tokenizer.id_of("<|image_start|>")
        found["eoi_token_index"] = tokenizer.id_of("<|image_end|>")
        found["image_token_index"] = tokenizer.patch_id
    return found


def _short(number: float) -> float:
    """Return the shortest number that has this value in float32."""
    return float(str(np.float32(number)))


def _scaling(config: Llama4Config, factors: Float[Tensor, " half"]) -> RopeScaling | None:
    """Return the scaling that divides the frequencies by these factors.

    Raises:
        ValueError: it is none of Llama 3's with the original context of Llama 4.
    """
    plain, largest = rope_frequencies(config), float(factors.max())
    if largest == 1:
        return None
    for high in (1.0, 4.0):
        scaling = RopeScaling(factor=largest, high_freq_factor=high)
        found = plain / rope_frequencies(config.replace(rope_scaling=scaling))
        if torch.allclose(found, factors, rtol=1e-4):
            return scaling
    raise ValueError("rope_freqs.weight scales RoPE in another way than Llama 4")


def tokenizer_from_metadata(fields: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """Return the tokenizer of a file, if it has one.

    Raises:
        ValueError: one of another model.
    """
    if "tokenizer.ggml.tokens" not in fields:
        return None
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    splitter = fields["tokenizer.ggml.pre"]
    if splitter not in _SPLITTERS:
        raise ValueError(f"its tokenizer cuts texts as {splitter!r} does, and not as Llama 4")
    names = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    vocabulary = {
        n: i for i, (n, kind) in enumerate(zip(names, kinds, strict=True)) if kind != _UNUSED
    }
    # Like tiktoken, it takes a word that is a token as it is.
    engine = Engine(models.BPE(ignore_merges=True))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([cut, by_bytes])
    engine.decoder = decoders.ByteLevel()
    raw = json.loads(engine.to_str())  # filled here, or the vocabulary would be read twice
    raw["model"] |= {"vocab": vocabulary, "merges": fields["tokenizer.ggml.merges"]}
    raw["added_tokens"] = [
        {"id": i, "content": name, "special": True} | dict.fromkeys(_OF_ADDED, False)
        for name, i in vocabulary.items()
        if kinds[i] != _NORMAL
    ]
    return Tokenizer.from_text(json.dumps(raw, ensure_ascii=False), path)
