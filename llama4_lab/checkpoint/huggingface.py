"""Hugging Face folders: ``config.json`` and safetensors, in one file or in shards with an index.

Parameters carry the same names in our model, up to a prefix; the routed experts' matrices are
stored transposed. Read `llama4_lab.checkpoint.quantised` for our own layout, which `convert`
writes, `.parts` for weights that lie otherwise, most of them in few bits, and `.meta` for Meta's
format.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama4_lab.checkpoint import bitsandbytes, compressed, mlx, modelopt
from llama4_lab.checkpoint.files import (
    PIECE,
    PartReader,
    Stored,
    check,
    check_one_dtype,
    describing,
    fill,
    fill_rows,
    first_of,
    joined,
    list_safetensors,
    map_tensor,
    read_json,
)
from llama4_lab.checkpoint.parts import Format, Opened, Rows, check_parts, take_parts
from llama4_lab.checkpoint.quantised import OF_PACKED, Quantisation
from llama4_lab.config import Llama4Config
from llama4_lab.experts.mapped import ExpertMemory, Mapped
from llama4_lab.packed import Packed

CONFIG = "config.json"
GENERATION = "generation_config.json"
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
    """Whether Hugging Face stores ``[e, inputs, outputs]``, and we ``[e, outputs, inputs]``."""
    return ".experts." in name and not is_of_packed(name)


def is_of_packed(name: str) -> bool:
    """Whether the tensor holds codes or scales of a packed weight."""
    return name.endswith(OF_PACKED)


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
    quantisation: Quantisation | None  # of packed weights
    is_ours: bool  # in our own layout: no tensor is transposed
    parts: dict[str, list[Rows]]  # what stands for weights that lie otherwise
    is_coded: bool  # by another program, whose codes become plain weights

    @classmethod
    def open(cls, folder: Path, text_only: bool = False) -> "HuggingFaceFolder":
        """Read the config and the headers of all files.

        Weights of the text model alone give that, with a warning if the config has a vision
        encoder and `text_only` does not leave it out.

        Raises:
            FileNotFoundError, ValueError: files missing or broken, another model, or codes of an
                unknown kind.
        """
        config, layout = _read_config(folder / CONFIG)
        form = _format(layout, folder / CONFIG)
        is_ours = form is None
        quantisation = Quantisation.from_dict(layout, folder / CONFIG) if is_ours else None
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
        if config.vision_config is not None and not has_vision and not text_only:
            warnings.warn(
                f"{folder / CONFIG} has a vision_config but {listing.name} no vision encoder: only "
                "the text model is read; fetch the other weights, or say text_only=True",
                stacklevel=4,  # where `load` or `convert` was called
            )
        if text_only or not has_vision:
            config = config.replace(vision_config=None)
        if text_only:
            tensors = {name: t for name, t in tensors.items() if not name.startswith(_VISION)}
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            if _has_own_head(tensors):
                warnings.warn(
                    f"{folder / CONFIG} says that the read-out is the table of embeddings, but the "
                    "weights hold another one, which is read",
                    stacklevel=4,
                )
                config = config.replace(tie_word_embeddings=False)
            else:
                for name in [name for name in tensors if name.startswith("lm_head.")]:
                    del tensors[name]  # the table of embeddings serves as both
        parts = take_parts(tensors, config, form, listing) if form else {}
        is_coded = bool(layout) and not is_ours
        return cls(config, listing, tensors, quantisation, is_ours, parts, is_coded)

    def as_ours(self, name: str, stored: Tensor) -> Tensor:
        """Return a tensor of a file, or one of its experts, as a view in our layout."""
        return stored.mT if self.is_transposed(name) else stored

    def is_transposed(self, name: str) -> bool:
        return is_transposed(name) and not self.is_ours

    def check(self, ours: Mapping[str, Tensor]) -> None:
        """Compare the headers with our tensors' shapes, and of codes and scales the dtypes too.

        Raises:
            ValueError: with the first tensor that does not fit.
        """
        multimodal = any(t.name.startswith("language_model.") for t in self.tensors.values())
        expected, dtypes = {}, {}
        for name, tensor in ours.items():
            shape = tuple(tensor.shape)
            if parts := self.parts.get(name):
                check_parts(parts, shape, listing=self.listing, config=CONFIG)
                continue
            stored = self.tensors.get(name)
            theirs = stored.name if stored else their_name(name, multimodal)
            expected[theirs] = (shape[0], *shape[:0:-1]) if self.is_transposed(name) else shape
            if is_of_packed(name):
                dtypes[theirs] = tensor.dtype
        found = {stored.name: stored for stored in self.tensors.values()}
        check(found, expected, listing=self.listing, config=CONFIG, dtypes=dtypes)

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors named; on the CPU those stored as we use them stay memory-mapped.

        The others are copied once, one at a time, each from a mapping of its own, so that no page
        of a copied tensor stays in memory. `dtype` None keeps the files' one; codes and scales keep
        theirs.
        """
        if dtype is None:
            dtype = self.dtype
        wanted = [name for name in self.tensors if name in shapes]
        for file, names in groupby(wanted, key=lambda name: self.tensors[name].file):
            with safe_open(file, "pt") as kept:
                for name in names:
                    stored = self.tensors[name]
                    if is_of_packed(name):
                        yield name, kept.get_tensor(stored.name).to(device)
                        continue
                    is_as_used = stored.dtype == dtype and not self.is_transposed(name)
                    if device.type == "cpu" and is_as_used:
                        yield name, kept.get_tensor(stored.name)
                        continue
                    target = torch.empty(shapes[name], dtype=dtype, device=device)
                    fill(target, self.as_ours(name, map_tensor(stored)))
                    yield name, target
        for name in self.parts.keys() & shapes.keys():
            target = torch.empty(shapes[name], dtype=dtype, device=device)
            if device.type != "meta":
                fill_rows(target, self.pieces(name, shapes))
            yield name, target

    @property
    def files(self) -> set[Path]:
        """The files that hold the weights."""
        parts = [part for parts in self.parts.values() for part in parts]
        held = [*self.tensors.values(), *(stored for part in parts for stored in part.held)]
        return {stored.file for stored in held}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights that are not packed.

        Raises:
            ValueError: there are two.
        """
        return check_one_dtype([t for name, t in self.tensors.items() if not is_of_packed(name)])

    def pieces(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        """Yield a weight's rows in order: an expert's, or some 64 million weights, at a time.

        Each piece has a mapping of its own, whose pages go when it goes.
        """
        shape = shapes[name]
        if parts := self.parts.get(name):
            for part in parts:
                yield from part.pieces(math.prod(shape[:-1]) // len(parts), shape[-1])
            return
        stored = self.tensors[name]
        if len(shape) == 3:
            for expert in range(shape[0]):
                yield self.as_ours(name, map_tensor(stored)[expert])
        else:
            step = max(1, PIECE // shape[-1])
            for start in range(0, shape[0], step):
                yield map_tensor(stored)[start : start + step]

    def mapped(
        self,
        name: str,
        shape: tuple[int, ...],
        memory: ExpertMemory,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> Mapped:
        """Return a stack of experts that stays in its file, as it lies there or packed."""
        like = torch.empty(0, dtype=dtype or self.dtype, device=device)
        if parts := self.parts.get(name):
            expert = partial(joined, [*map(Opened.of, parts)], shape, like.dtype)
        elif self.quantisation is None:
            expert = partial(_plain, PartReader(self.tensors[name]), self.is_transposed(name))
        else:
            parts = [PartReader(self.tensors[name + part]) for part in OF_PACKED]
            expert = partial(_packed, self.quantisation.kind, *parts)
        packed_size = None
        if self.quantisation is not None:
            packed_size = self.quantisation.empty(shape[1:], "meta").nbytes
        every = range(shape[0])
        return Mapped(name, (shape[1], shape[2]), every, expert, memory, like, packed_size)


def _plain(read: PartReader, is_transposed: bool, index: int) -> tuple[Tensor, int]:
    """Return an expert in our layout, and the bytes that were read."""
    part = read(index)
    return part.mT if is_transposed else part, part.nbytes


def _packed(kind: str, codes: PartReader, scales: PartReader, index: int) -> tuple[Packed, int]:
    packed = Packed(kind, codes(index), scales(index))
    return packed, packed.nbytes


def _has_own_head(tensors: Mapping[str, Stored]) -> bool:
    """Whether the read-out is stored with other numbers than the embeddings."""
    head, table = tensors["lm_head.weight"], tensors.get("embed_tokens.weight")
    if table is None or (head.shape, head.dtype) != (table.shape, table.dtype):
        return True
    step = max(1, PIECE // max(1, head.shape[-1]))
    return any(
        not torch.equal(map_tensor(head)[i : i + step], map_tensor(table)[i : i + step])
        for i in range(0, head.shape[0], step)
    )


def _read_config(path: Path) -> tuple[Llama4Config, dict[str, Any]]:
    """Return the config, and what it says of how weights are quantised."""
    raw = read_json(path)
    text = raw.get("text_config")
    places = (raw, text if isinstance(text, dict) else {})
    names = ("quantization_config", "quantization")  # the second is MLX's
    layout = next((place[name] for place in places for name in names if place.get(name)), {})
    if not layout and (listing := path.with_name(modelopt.LISTING)).is_file():
        said = read_json(listing).get("quantization")
        layout = {"quant_method": modelopt.METHOD, **(said if isinstance(said, dict) else {})}
    if not isinstance(layout, dict):
        layout = {"method": layout}
    with describing(path):
        config = Llama4Config.from_dict(raw)
    return ending_as_said(config, path.parent), layout


def ending_as_said(config: Llama4Config, folder: Path) -> Llama4Config:
    """Put in the tokens that end a text by generation_config.json, if a folder has one.

    As in transformers they go before config.json's.
    """
    if not (path := folder / GENERATION).is_file():
        return config
    if (ends := read_json(path).get("eos_token_id")) is None:
        return config
    with describing(path):
        return config.replace(eos_token_id=tuple(ends) if isinstance(ends, list) else ends)


def _format(layout: Mapping[str, Any], path: Path) -> Format | None:
    """Return how weights lie, and None where config.json says it in our own way or unknown ones."""
    if not layout:
        return Format()
    method = layout.get("quant_method")
    if method == bitsandbytes.METHOD:
        return bitsandbytes.format_of()
    for program in (compressed, modelopt):
        if method == program.METHOD:
            return program.format_of(layout, path)
    return mlx.format_of(layout, path) if mlx.is_layout(layout) else None


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
