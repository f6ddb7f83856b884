"""GGUF files of llama.cpp, whose numbers of few bits are read as plain weights.

The text decoder is in one file or in parts (``…-00001-of-00002.gguf``), the vision encoder in
another, ``mmproj….gguf``, that lies beside. The package ``gguf`` of that project reads the headers
and turns the codes back into numbers; names follow its ``conversion/llama.py`` and
``conversion/llama4.py``. Read `llama4_lab.checkpoint.metadata` for the config.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from struct import Struct
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.checkpoint.files import (
    PIECE,
    Held,
    Stored,
    check,
    describing,
    fill_rows,
    joined,
)
from llama4_lab.checkpoint.metadata import (
    ARCHITECTURE,
    config_from_metadata,
    tokenizer_from_metadata,
)
from llama4_lab.config import Llama4Config
from llama4_lab.experts.mapped import ExpertMemory, Mapped
from llama4_lab.prompt.tokenizer import Tokenizer

_ARRAY, _LENGTH = Struct("=IQ"), Struct("=Q")  # kind and number of values; bytes of a text
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WHOLE = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "vision_model.class_embedding": "v.class_embd",
    "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear": "v.patch_embd",
    "vision_model.layernorm_pre": "v.pre_ln",
    "vision_model.layernorm_post": "v.post_ln",
    "vision_model.vision_adapter.mlp.fc1": "mm.model.mlp.1",
    "vision_model.vision_adapter.mlp.fc2": "mm.model.mlp.2",
    "multi_modal_projector.linear_1": "mm.model.fc",
}
_OF_PICTURES = ("v.", "mm.")  # begin the names of the vision encoder and the projector
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
_OF_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
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


def their_names(name: str) -> tuple[str, ...]:
    """Return the tensors that hold a weight of ours; of experts, gate and up lie apart.

    >>> their_names("layers.3.feed_forward.experts.gate_up_proj")
    ('blk.3.ffn_gate_exps.weight', 'blk.3.ffn_up_exps.weight')
    """
    base, kind = name.rsplit(".", 1)
    if found := re.fullmatch(r"layers\.(\d+)\.feed_forward\.experts", base):
        return tuple(f"blk.{found[1]}.{theirs}.weight" for theirs in _OF_EXPERTS[kind])
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)", base):
        return (f"blk.{found[1]}.{_OF_LAYER[found[2]]}.{kind}",)
    if found := re.fullmatch(r"vision_model\.model\.layers\.(\d+)\.(.+)", base):
        return (f"v.blk.{found[1]}.{_OF_VISION_LAYER[found[2]]}.{kind}",)
    return (_WHOLE.get(name) or f"{_WHOLE[base]}.{kind}",)


@dataclass(frozen=True)
class Coded:
    """A tensor of a file, or some of its rows: where the codes lie, and what they stand for."""

    file: Held
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    kind: str  # ggml's name for how numbers are stored

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def part(self, start: int, count: int) -> "Coded":
        """Return up to `count` rows, counted through all matrices."""
        size, count = self.nbytes // self.num_rows, min(count, self.num_rows - start)
        shape = (count, self.shape[-1])
        return Coded(self.file, self.begin + start * size, count * size, shape, self.kind)

    def read(self) -> Float[Tensor, "rows k"]:
        """Return the numbers."""
        from gguf import GGMLQuantizationType, dequantize

        codes = np.empty((self.num_rows, self.nbytes // self.num_rows), dtype=np.uint8)
        self.file.fill(codes.reshape(-1).data, self.begin)
        return torch.from_numpy(dequantize(codes, GGMLQuantizationType[self.kind]))


@dataclass(frozen=True)
class GgufFile:
    """A file, or all its parts, whose headers have been read; `tensors` are under its names."""

    config: Llama4Config
    listing: Path  # the file that was named
    tensors: Mapping[str, Coded]
    tokenizer: Tokenizer | None
    quantisation: None = None  # all weights are plain when they are read
    is_coded: bool = True

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
        tensors: dict[str, Coded] = {}
        for file in _parts(path):
            said, held = _header(file)
            fields = said | fields  # the first part describes the model
            tensors |= held
        if (found := fields.get("general.architecture")) != ARCHITECTURE:
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
        scaling = tensors.pop("rope_freqs.weight", None)
        factors = None if scaling is None else scaling.read()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        with describing(path):
            tokenizer = tokenizer_from_metadata(fields, path)
            config = config_from_metadata(fields, shapes, factors, tokenizer)
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
        like = torch.empty(0, dtype=dtype or self.dtype, device=device)
        expert = partial(joined, self._parts_of(name, is_stack=True), shape, like.dtype)
        return Mapped(name, (shape[1], shape[2]), range(shape[0]), expert, memory, like, None)

    def _parts_of(self, name: str, is_stack: bool) -> list[Coded]:
        tensors = [self.tensors[theirs] for theirs in their_names(name)]
        if not is_stack:
            (tensor,) = tensors
            step = max(1, PIECE // tensor.shape[-1])
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
            if len(tensor.shape) > 1
            and "ffn_gate_inp" not in name
            and not name.startswith(_OF_PICTURES)
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
    wanted = {"clip.projector_type": ARCHITECTURE, "clip.vision.projection_dim": width}
    found = sorted(file for file in path.parent.glob("*mmproj*.gguf") if file != path)
    return [file for file in found if wanted.items() <= _header(file)[0].items()]


def _header(file: Path) -> tuple[dict[str, Any], dict[str, Coded]]:
    """Return what a file says, and the tensors that it holds."""
    return _read_header(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)  # a vocabulary takes most of a second
def _read_header(file: Path, _changed: int) -> tuple[dict[str, Any], dict[str, Coded]]:
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError as error:
        raise ImportError(
            f"{file} is read by the package gguf: install it with `pip install gguf`"
        ) from error

    class Reader(GGUFReader):
        """Reads arrays at once: the package takes value after value, five times as long."""

        def _get_field_parts(self, orig_offs: int, raw_type: Any) -> tuple[int, list, Any, list]:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            data = self.data.data
            number, count = _ARRAY.unpack_from(data, orig_offs)
            end, types = orig_offs + _ARRAY.size, [GGUFValueType.ARRAY, GGUFValueType(number)]
            if (scalar := self.gguf_scalar_to_np.get(types[1])) is not None:
                values = self._get(end, scalar, count)
                return end + values.nbytes - orig_offs, [values], [0], types
            if types[1] != GGUFValueType.STRING:
                return super()._get_field_parts(orig_offs, raw_type)
            texts = []
            for _ in range(count):
                start = end + _LENGTH.size
                end = start + _LENGTH.unpack_from(data, end)[0]
                texts.append(data[start:end])
            return end - orig_offs, texts, range(count), types

    try:
        reader = Reader(file)
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
        tensors[name] = Coded(held, int(each.data_offset), int(each.n_bytes), shape, kind)
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
