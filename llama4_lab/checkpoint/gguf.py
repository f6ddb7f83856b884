"""GGUF files of llama.cpp, whose numbers of few bits are read as plain weights.

The text decoder is in one file or in parts (``…-00001-of-00002.gguf``), the vision encoder in
another, ``mmproj….gguf``, that lies beside. The package ``gguf`` of that project reads the headers
and turns the codes back into numbers; names and rules follow its ``conversion/llama.py``,
``conversion/llama4.py`` and ``src/models/llama4.cpp``.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import (
    Held,
    Stored,
    check,
    describing,
    fill_rows,
    joined,
)
from llama4_lab.config import Llama4Config, RopeScaling, VisionConfig
from llama4_lab.experts.mapped import ExpertMemory, Mapped
from llama4_lab.model.text import rope_frequencies
from llama4_lab.prompt.tokenizer import PATTERN, Tokenizer

_ARCHITECTURE = "llama4"
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_PIECE = 1 << 26  # numbers that are made at a time
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SPLITTERS = ("llama4", "gpt-4o")  # llama.cpp's names for what cuts a text as `PATTERN` does
_NORMAL, _UNUSED = 1, 5  # kinds of tokens
_WHOLE = {
    "embed_tokens.weight": ("token_embd",),
    "norm.weight": ("output_norm",),
    "lm_head.weight": ("output",),
}
_OF_LAYER = {
    "input_layernorm.weight": ("attn_norm",),
    "self_attn.q_proj.weight": ("attn_q",),
    "self_attn.k_proj.weight": ("attn_k",),
    "self_attn.v_proj.weight": ("attn_v",),
    "self_attn.o_proj.weight": ("attn_output",),
    "post_attention_layernorm.weight": ("ffn_norm",),
    "feed_forward.gate_proj.weight": ("ffn_gate",),
    "feed_forward.up_proj.weight": ("ffn_up",),
    "feed_forward.down_proj.weight": ("ffn_down",),
    "feed_forward.router.weight": ("ffn_gate_inp",),
    "feed_forward.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "feed_forward.experts.down_proj": ("ffn_down_exps",),
    "feed_forward.shared_expert.gate_proj.weight": ("ffn_gate_shexp",),
    "feed_forward.shared_expert.up_proj.weight": ("ffn_up_shexp",),
    "feed_forward.shared_expert.down_proj.weight": ("ffn_down_shexp",),
}
_VISION = {
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear": "v.patch_embd",
    "vision_model.layernorm_pre": "v.pre_ln",
    "vision_model.layernorm_post": "v.post_ln",
    "vision_model.vision_adapter.mlp.fc1": "mm.model.mlp.1",
    "vision_model.vision_adapter.mlp.fc2": "mm.model.mlp.2",
    "multi_modal_projector.linear_1": "mm.model.fc",
}
_OF_VISION_LAYER = {
    "input_layernorm": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_OF_PICTURES = ("v.", "mm.")


def their_names(name: str) -> tuple[str, ...]:
    """Return the tensors that hold a weight of ours; of experts, gate and up lie apart.

    >>> their_names("layers.3.feed_forward.experts.gate_up_proj")
    ('blk.3.ffn_gate_exps.weight', 'blk.3.ffn_up_exps.weight')
    """
    if name in _WHOLE:
        return tuple(f"{theirs}.weight" for theirs in _WHOLE[name])
    if name in _VISION:
        return (_VISION[name],)
    base, kind = name.rsplit(".", 1)
    if base in _VISION:
        return (f"{_VISION[base]}.{kind}",)
    if base.startswith("vision_model.model.layers."):
        _, _, _, layer, part = base.split(".", 4)
        return (f"v.blk.{layer}.{_OF_VISION_LAYER[part]}.{kind}",)
    _, layer, part = name.split(".", 2)
    return tuple(f"blk.{layer}.{theirs}.weight" for theirs in _OF_LAYER[part])


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor, which are made from their codes when they are read."""

    file: Held
    begin: int
    nbytes: int
    rows: int
    kind: str  # ggml's name for how numbers are stored

    def read(self) -> Float[Tensor, "rows k"]:
        from gguf import GGMLQuantizationType, dequantize

        raw = np.empty(self.nbytes, dtype=np.uint8)
        self.file.fill(raw.data, self.begin)
        kind = GGMLQuantizationType[self.kind]
        return torch.from_numpy(dequantize(raw.reshape(self.rows, -1), kind))


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: where it lies, and what its header says."""

    file: Held
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    kind: str

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def part(self, start: int, count: int) -> Rows:
        """Return up to `count` rows, counted through all matrices."""
        size, count = self.nbytes // self.num_rows, min(count, self.num_rows - start)
        return Rows(self.file, self.begin + start * size, count * size, count, self.kind)


@dataclass(frozen=True)
class GgufFile:
    """A file, or all its parts, whose headers have been read; `tensors` are under its names."""

    config: Llama4Config
    listing: Path  # the file that was named
    tensors: Mapping[str, GgufTensor]
    tokenizer: Tokenizer | None
    quantisation: None = None  # all weights are plain when they are read

    @classmethod
    def open(cls, path: Path, text_only: bool = False) -> "GgufFile":
        """Read the headers, also those of a vision encoder beside it, unless `text_only`.

        Warns where there is more than one: none is read then.

        Raises:
            FileNotFoundError: a part is missing.
            ImportError: the package gguf is.
            ValueError: no GGUF file of a Llama 4, or one whose numbers that package cannot read.
        """
        fields: dict[str, Any] = {}
        tensors: dict[str, GgufTensor] = {}
        for file in _parts(path):
            said, held = _header(file)
            fields = said | fields  # the first part describes the model
            tensors |= held
        if (found := fields.get("general.architecture")) != _ARCHITECTURE:
            raise ValueError(f"{path} holds a model of the kind {found!r}, and only llama4 is read")
        fitting = [] if text_only else _beside(path, fields.get("llama4.embedding_length"))
        if len(fitting) == 1:
            said, held = _header(fitting[0])
            fields, tensors = said | fields, tensors | held
        elif fitting:
            warnings.warn(
                f"{', '.join(file.name for file in fitting)} beside {path} hold vision encoders: "
                "only the text model is read; leave one of them there, or say text_only=True",
                stacklevel=4,  # where `load` or `convert` was called
            )
        for kind in {tensor.kind for tensor in tensors.values()}:
            _check_readable(path, kind)
        factors = tensors.pop("rope_freqs.weight", None)
        with describing(path):
            config = _config(fields, tensors, factors)
            tokenizer = _tokenizer(path, fields)
        if tokenizer is not None:
            config = config.replace(**_special(tokenizer, config.vision_config is not None))
        return cls(config, path, MappingProxyType(tensors), tokenizer)

    def check(self, ours: Mapping[str, Tensor]) -> None:
        """Compare the headers with our tensors' shapes.

        Raises:
            ValueError: with the first tensor that does not fit.
        """
        expected = {}
        for name, tensor in ours.items():
            theirs, shape = their_names(name), list(tensor.shape)
            if len(shape) > 1:
                shape[-2] //= len(theirs)
            expected |= dict.fromkeys(theirs, tuple(shape))
        found = {
            name: Stored(tensor.file.path, name, tensor.shape, torch.float32)
            for name, tensor in self.tensors.items()
        }
        check(found, expected, listing=self.listing, config="its metadata")

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights named, each made anew, some rows at a time."""
        for name, shape in shapes.items():
            target = torch.empty(shape, dtype=dtype or self.dtype, device=device)
            fill_rows(target, self.pieces(name, shapes))
            yield name, target

    def pieces(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        """Yield a weight's rows in order: an expert's, or some 64 million numbers, at a time."""
        for part in self._parts_of(name, len(shapes[name]) == 3):
            yield part.read()

    def mapped(
        self,
        name: str,
        shape: tuple[int, ...],
        memory: ExpertMemory,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> Mapped:
        """Return a stack of experts that stays in its file."""
        parts = self._parts_of(name, is_stack=True)
        expert = partial(joined, parts, len(parts) // shape[0])
        like = torch.empty(0, dtype=dtype or self.dtype, device=device)
        return Mapped(name, (shape[1], shape[2]), range(shape[0]), expert, memory, like, None)

    def _parts_of(self, name: str, is_stack: bool) -> list[Rows]:
        tensors = [self.tensors[theirs] for theirs in their_names(name)]
        if not is_stack:
            (tensor,) = tensors
            step = max(1, _PIECE // tensor.shape[-1])
            return [tensor.part(i, step) for i in range(0, tensor.num_rows, step)]
        experts = range(tensors[0].shape[0])
        return [t.part(e * t.shape[1], t.shape[1]) for e in experts for t in tensors]

    @property
    def files(self) -> set[Path]:
        """The files that hold the weights."""
        return {tensor.file.path for tensor in self.tensors.values()}

    @property
    def dtype(self) -> torch.dtype:
        """That of all matrices but the routers'; bfloat16, which Llama 4 has, where they differ."""
        kinds = {
            tensor.kind
            for name, tensor in self.tensors.items()
            if len(tensor.shape) > 1 and not ("ffn_gate_inp" in name or _is_of_pictures(name))
        }
        return _PLAIN.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16


def _parts(path: Path) -> list[Path]:
    """Return the files of a model, given any of them."""
    if (found := _PART.search(path.stem)) is None:
        return [path]
    start, count = path.stem[: found.start()], found[2]
    files = [
        path.with_name(f"{start}-{i + 1:05}-of-{count}{path.suffix}") for i in range(int(count))
    ]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path} is one of {int(count)} parts: {missing[0]} is missing")
    return files


def _beside(path: Path, width: int | None) -> list[Path]:
    """Return the files in the same folder that hold a vision encoder for a text of this width."""
    wanted = {"clip.projector_type": _ARCHITECTURE, "clip.vision.projection_dim": width}
    found = sorted(file for file in path.parent.glob("*mmproj*.gguf") if file != path)
    return [file for file in found if wanted.items() <= _header(file)[0].items()]


def _is_of_pictures(name: str) -> bool:
    return name.startswith(_OF_PICTURES)


def _header(file: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return what a file says, and the tensors that it holds."""
    return _read_header(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)  # the package takes seconds to read a vocabulary
def _read_header(file: Path, _changed: int) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"{file} is read by the package gguf: install it with `pip install gguf`"
        ) from error
    try:
        reader = GGUFReader(file)
    except Exception as error:  # of a broken header the package raises all kinds
        raise ValueError(
            f"{file} is truncated or no GGUF file ({error}): fetch the file again"
        ) from error
    if reader.byte_order != "I":
        raise ValueError(f"{file} was written for machines of another byte order")
    held, tensors = Held.of(file), {}
    for each in reader.tensors:
        # Newer converters give the norm before the MLP of a vision encoder another name.
        name = each.name.replace(".attn_post_norm.", ".ln2.")
        shape = tuple(reversed(each.shape.tolist()))
        kind = each.tensor_type.name
        tensors[name] = GgufTensor(held, int(each.data_offset), int(each.n_bytes), shape, kind)
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def _check_readable(path: Path, kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize
    from gguf.constants import GGML_QUANT_SIZES

    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    try:
        dequantize(np.zeros((1, size), dtype=np.uint8), number)
    except NotImplementedError as error:
        raise ValueError(
            f"{path} holds numbers of the kind {kind} (blocks of {block}), which the package gguf "
            "cannot turn back: give a file of another kind, such as Q4_K_M or Q8_0"
        ) from error


def _config(
    fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor], factors: GgufTensor | None
) -> Llama4Config:
    """Return what the metadata say, and what llama.cpp's code knows of all Llama 4."""

    def given(name: str) -> Any:
        return fields[f"{_ARCHITECTURE}.{name}"]

    num_experts = fields.get(f"{_ARCHITECTURE}.expert_count", 0)
    if not num_experts:
        raise ValueError("it has no experts: of dense models Hugging Face's folders are read")
    heads, hidden_size = given("attention.head_count"), given("embedding_length")
    config = Llama4Config(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        num_hidden_layers=given("block_count"),
        num_attention_heads=heads,
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
        tie_word_embeddings="output.weight" not in tensors,
        vision_config=_vision_config(fields, tensors),
    )
    return config if factors is None else config.replace(rope_scaling=_scaling(config, factors))


def _vision_config(
    fields: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> VisionConfig | None:
    if "clip.projector_type" not in fields:
        return None

    def given(name: str) -> Any:
        return fields[f"clip.vision.{name}"]

    width = tensors["mm.model.fc.weight"].shape[1]
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


def _special(tokenizer: Tokenizer, has_vision: bool) -> dict[str, Any]:
    """Return the ids that a config names."""
    found: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tuple(sorted({*tokenizer.stop_ids})),
        "pad_token_id": tokenizer.pad_id,
    }
    if has_vision:
        found["boi_token_index"] = tokenizer.id_of("<|image_start|>")
        found["eoi_token_index"] = tokenizer.id_of("<|image_end|>")
        found["image_token_index"] = tokenizer.patch_id
    return found


def _short(number: float) -> float:
    """Return the shortest number that has this value in float32."""
    return float(str(np.float32(number)))


def _scaling(config: Llama4Config, factors: GgufTensor) -> RopeScaling | None:
    """Return the scaling that divides the frequencies by these factors.

    Raises:
        ValueError: it is none of Llama 3's with the original context of Llama 4.
    """
    divisors = factors.part(0, 1).read().flatten()
    plain, largest = rope_frequencies(config), float(divisors.max())
    if largest == 1:
        return None
    for high in (1.0, 4.0):
        scaling = RopeScaling(factor=largest, high_freq_factor=high)
        found = plain / rope_frequencies(config.replace(rope_scaling=scaling))
        if torch.allclose(found, divisors, rtol=1e-4):
            return scaling
    raise ValueError("rope_freqs.weight scales RoPE in another way than Llama 4")


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer, if the file has one.

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
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    # Like tiktoken, it takes a word that is a token as it is.
    engine = Engine(models.BPE(vocabulary, merges, ignore_merges=True))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([cut, by_bytes])
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(
        [n for n, kind in zip(names, kinds, strict=True) if kind not in (_NORMAL, _UNUSED)]
    )
    return Tokenizer.from_text(engine.to_str(), path)
