"""Write a checkpoint in our own layout, from folder to folder, an expert in memory at a time.

Files grow in the target's ``.unfinished-conversion`` and become a checkpoint when all are whole.
An interrupted conversion goes on behind the last whole file: its header says what it was made from.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.checkpoint.files import CODES, DTYPES
from llama4_lab.checkpoint.gguf import GgufFile
from llama4_lab.checkpoint.huggingface import CONFIG, HuggingFaceFolder, their_name
from llama4_lab.checkpoint.meta import MetaFolder
from llama4_lab.checkpoint.quantised import PLAIN, Quantisation, check_rows, of_packed, packable
from llama4_lab.checkpoint.saving import (
    UNFINISHED,
    check_vacant,
    config_as_json,
    copy_companions,
    in_shards,
    locked,
    publish,
    write_listings,
)
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.prompt import Tokenizer

Folder = HuggingFaceFolder | MetaFolder | GgufFile
_NAMES = {dtype: name for name, dtype in (DTYPES | CODES).items()}  # what safetensors calls them


def convert_folder(
    source: Folder,
    tokenizer: Tokenizer | None,
    target: Path,
    quantisation: Quantisation | None,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> None:
    """Write a folder that `load` maps: packed as ``load(..., quantize=)`` packs, or plain.

    Raises:
        FileExistsError: the target holds something else than what was made from this source.
        OSError: a file could not be written, and a second call goes on from there; or another
            conversion writes the same target.
        ValueError: the source does not fit its config, or its rows cannot be packed.
    """
    new = target / f"{UNFINISHED}conversion"
    is_moving = (new / CONFIG).is_file()  # it was interrupted while its files were moved
    check_vacant(target)
    origin = _origin(source)
    _check_made_from(origin, target, new)
    with torch.device("meta"):
        model = Llama4(source.config)
    weights = dict(model.named_parameters())
    source.check(weights)
    dtype, pack = dtype or source.dtype, {}
    if quantisation is not None:
        check_rows(model, quantisation)
        pack = dict.fromkeys(packable(model), quantisation)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    becomes = {
        name: of_packed(name, pack[name].empty(shapes[name], "meta"))
        if name in pack
        else {name: weight.to(dtype)}
        for name, weight in weights.items()
    }
    sizes = {name: sum(tensor.nbytes for tensor in t.values()) for name, t in becomes.items()}
    new.mkdir(parents=True, exist_ok=True)
    with locked(new) as is_free:
        if is_free is False or not new.exists():  # the other has just come to its end
            raise OSError(
                f"{target} is being written by another conversion: wait for it, or stop it"
            )
        for part in new.glob("*.part"):  # of an interrupted one, which would count as taken room
            part.unlink()
        weight_map: dict[str, str] = {}
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="written") as bar:
            for file, names in in_shards(sizes, max_shard_bytes).items():
                layout = _Layout.of([becomes[name] for name in names], source.config, origin)
                weight_map |= dict.fromkeys(layout.begins, file)
                if layout.is_in(new / file) or (is_moving and layout.is_in(target / file)):
                    bar.update(sum(sizes[name] for name in names))
                else:
                    _check_room(new, layout.size)
                    layout.write(new / file, _pieces(source, names, shapes, pack, dtype), bar)
        for file in {each.name for each in new.iterdir()} - {*weight_map.values(), CONFIG}:
            (new / file).unlink()  # left by a conversion into other shards
        copy_companions(tokenizer, source.config, new)
        ours = quantisation.to_dict() if quantisation else PLAIN
        config = config_as_json(source.config, dtype, ours)
        write_listings(new, sum(sizes.values()), weight_map, config)
        publish(new, target, weight_map.values())


def _pieces(
    source: Folder,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    pack: Mapping[str, Quantisation],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield what follows next in each tensor."""
    for name in names:
        for rows in source.pieces(name, shapes):
            if name in pack:
                yield from of_packed(name, pack[name].pack(rows)).items()
            else:
                yield name, rows.to(dtype)


@dataclass(frozen=True)
class _Layout:
    """A safetensors file before it is written."""

    header: bytes
    begins: dict[str, int]  # where the bytes of each tensor begin, by its name in the file
    size: int
    multimodal: bool

    @classmethod
    def of(
        cls, weights: Sequence[Mapping[str, Tensor]], config: Llama4Config, origin: str
    ) -> "_Layout":
        """Place tensors, the widest numbers first, so that all are aligned."""
        multimodal = config.vision_config is not None
        tensors = {their_name(name, multimodal): t for made in weights for name, t in made.items()}
        entries, end = {}, 0
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
            tensor, begin = tensors[name], end
            end += tensor.nbytes
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        metadata = {"format": "pt", "made_from": origin}
        text = json.dumps({"__metadata__": metadata} | entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        begins = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
        return cls(header, begins, len(header) + end, multimodal)

    def is_in(self, file: Path) -> bool:
        """Whether a file is whole and was made from the same source."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        with file.open("rb") as held:
            return held.read(len(self.header)) == self.header

    def write(self, file: Path, pieces: Iterable[tuple[str, Tensor]], bar: tqdm) -> None:
        """Write a file under another name first."""
        ends = dict(self.begins)
        part = file.with_name(f"{file.name}.part")
        with part.open("wb") as out:
            out.write(self.header)
            for name, piece in pieces:
                theirs = their_name(name, self.multimodal)
                out.seek(ends[theirs])
                out.write(piece.detach().contiguous().view(torch.uint8).numpy().data)
                ends[theirs] += piece.nbytes
                bar.update(piece.nbytes)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)


def _origin(source: Folder) -> str:
    """Return what tells one source from another: sizes and times of its files."""
    known = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(source.files)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _check_made_from(origin: str, target: Path, new: Path) -> None:
    """Refuse to replace a checkpoint, whole or unfinished, that this source cannot give again."""
    for file in (each for at in (new, target) for each in sorted(at.glob("model*.safetensors"))):
        with file.open("rb") as held:
            is_made_from = origin.encode() in held.read(200)  # it stands first in the header
        if not is_made_from:
            raise FileExistsError(
                f"{target} holds {file.relative_to(target)}, which was not made from the files "
                "that are converted now: give a new or empty folder, or remove what is there"
            )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"{folder} has room for {free / 1e6:,.0f} MB, and the next file takes "
            f"{size / 1e6:,.0f} MB: make room, and convert again to go on"
        )
