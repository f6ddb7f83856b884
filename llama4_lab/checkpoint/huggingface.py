"""Hugging Face folders: ``config.json`` and safetensors, in one file or in shards with an index.

Parameters carry the same names in our model, up to a prefix; the routed experts' matrices are
stored transposed. Read `llama4_lab.checkpoint.meta` for Meta's format.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llama4_lab.checkpoint.files import (
    Stored,
    check,
    check_one_dtype,
    describing,
    fill,
    first_of,
    list_safetensors,
    map_tensor,
    read_json,
)
from llama4_lab.config import Llama4Config

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PREFIXES = ("language_model.model.", "language_model.", "model.")
_VISION = ("vision_model.", "multi_modal_projector.")


def our_name(name: str) -> str:
    """Take off the prefix of the text model.

    >>> our_name("language_model.model.norm.weight"), our_name("lm_head.weight")
    ('norm.weight', 'lm_head.weight')
    """
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def their_name(name: str, multimodal: bool) -> str:
    """Put on the prefix that transformers gives the text model.

    >>> their_name("norm.weight", multimodal=False), their_name("norm.weight", multimodal=True)
    ('model.norm.weight', 'language_model.model.norm.weight')
    """
    if name.startswith(_VISION):
        return name
    inner = name if name.startswith("lm_head.") else f"model.{name}"
    return f"language_model.{inner}" if multimodal else inner


def is_transposed(name: str) -> bool:
    """Whether the files hold ``[e, inputs, outputs]`` where we hold ``[e, outputs, inputs]``."""
    return ".experts." in name


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn transformers' state dict into ours, on the same device."""
    return {
        our_name(name): tensor.mT.contiguous() if is_transposed(name) else tensor
        for name, tensor in state.items()
    }


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder whose files have been listed but not read; `tensors` are under our names."""

    config: Llama4Config
    listing: Path  # the file that says which tensors there are
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, folder: Path, text_only: bool = False) -> "HuggingFaceFolder":
        """Read the config and the headers of all files.

        Raises:
            FileNotFoundError, ValueError: files missing or broken, another model, or quantised.
        """
        config = _read_config(folder / CONFIG)
        listing, files = _files(folder)
        tensors: dict[str, Stored] = {}
        for file, promised in files.items():
            held = list_safetensors(file)
            if lost := [name for name in promised if name not in held]:
                raise ValueError(f"{file} lacks {first_of(lost)}, which {INDEX} lists there")
            for stored in held.values():
                twin = tensors.setdefault(our_name(stored.name), stored)
                if twin is not stored:
                    raise ValueError(
                        f"{file} holds {stored.name} again: it is in {twin.file.name} already"
                    )
        has_vision = any(name.startswith(_VISION) for name in tensors)
        if text_only or not has_vision:
            config = config.replace(vision_config=None)
        if text_only:
            tensors = {name: t for name, t in tensors.items() if not name.startswith(_VISION)}
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # the table of embeddings serves as both
        return cls(config, listing, tensors)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the headers with our parameters' shapes.

        Raises:
            ValueError: with the first tensor that does not fit.
        """
        multimodal = any(t.name.startswith("language_model.") for t in self.tensors.values())
        expected = {}
        for name, shape in shapes.items():
            stored = self.tensors.get(name)
            theirs = stored.name if stored else their_name(name, multimodal)
            expected[theirs] = (shape[0], shape[2], shape[1]) if is_transposed(name) else shape
        found = {stored.name: stored for stored in self.tensors.values()}
        check(found, expected, listing=self.listing, config=CONFIG)

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield our parameters; on the CPU those stored as we use them stay memory-mapped.

        The others are copied once, one at a time, each from a mapping of its own, so that no page
        of a copied tensor stays in memory. `dtype` None keeps the files' one.
        """
        if dtype is None:
            dtype = check_one_dtype(list(self.tensors.values()))
        for file, names in groupby(self.tensors, key=lambda name: self.tensors[name].file):
            with safe_open(file, "pt") as kept:
                for name in names:
                    stored = self.tensors[name]
                    if device.type == "cpu" and stored.dtype == dtype and not is_transposed(name):
                        yield name, kept.get_tensor(stored.name)
                        continue
                    target = torch.empty(shapes[name], dtype=dtype, device=device)
                    source = map_tensor(stored)
                    fill(target, source.mT if is_transposed(name) else source)
                    yield name, target


def _read_config(path: Path) -> Llama4Config:
    raw = read_json(path)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"{path}: quant_method {method!r}: quantised files are not read yet; "
            "use the bfloat16 checkpoint"
        )
    with describing(path):
        return Llama4Config.from_dict(raw)


def _files(folder: Path) -> tuple[Path, dict[Path, list[str]]]:
    """Return the file that lists the tensors, and the files that hold them with what they should.

    A single file lists its own.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return single, {single: []}
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no weights: it needs {SINGLE}, or {INDEX} and the shards that it lists"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: fetch the file again")
    shards: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if Path(str(shard)).name != shard:
            raise ValueError(f"{index} lists {shard!r}: shards must lie beside the index")
        shards.setdefault(folder / shard, []).append(name)
    for shard, names in shards.items():
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing: {INDEX} lists it for {first_of(names)}")
    return index, shards
