"""Files of tensors: what they hold, whether that fits, and memory-mapped access to it.

Everything is checked from headers alone; numbers are read when a parameter is filled.
"""

import io
import json
import os
import pickle
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama4_lab.experts.mapped import pages
from llama4_lab.precision import has_float64

# Names of safetensors, and of torch, for what a weight may be.
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
# And for what codes in few bits may be.
CODES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F8_E4M3": torch.float8_e4m3fn,
}
# The programs whose weights of few bits are read.
PROGRAMS = "llama4-lab, compressed-tensors, ModelOpt, bitsandbytes, MLX and llama.cpp"
PIECE = 1 << 26  # weights in memory at once, of what is read in pieces


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: where it is, and what its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a text for what no weight may be


def spelled(dtype: torch.dtype | str) -> str:
    """Return a dtype's name without torch's.

    >>> spelled(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


# ---- JSON


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__} where an object is needed")
    return content


@contextmanager
def describing(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with the config that is read from it.

    Raises:
        ValueError: instead of whatever a value of the wrong kind raises.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} does not describe a Llama 4 ({type(error).__name__}: {error})"
        ) from error


# ---- safetensors


def list_safetensors(path: Path) -> dict[str, Stored]:
    """Read the header of a safetensors file, which also tells whether the file is whole.

    Raises:
        ValueError: truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_why_unreadable(path, error)) from error
    return {
        name: Stored(path, name, tuple(header.get_shape()), _weight_dtype(header.get_dtype()))
        for name, header in headers.items()
    }


def _weight_dtype(name: str) -> torch.dtype | str:
    return DTYPES.get(name, name)


def map_tensor(stored: Stored) -> Tensor:
    """Map one tensor of a safetensors file into memory; its pages go when it goes."""
    with safe_open(stored.file, "pt") as file:
        return file.get_tensor(stored.name)


def map_tensors(stored: Sequence[Stored]) -> list[Tensor]:
    """Map several tensors, opening each file once: headers of thousands of names take a while."""
    tensors: dict[Stored, Tensor] = {}
    for file in {one.file for one in stored}:
        with safe_open(file, "pt") as opened:
            tensors |= {one: opened.get_tensor(one.name) for one in stored if one.file == file}
    return [tensors[one] for one in stored]


class PartReader:
    """Reads a tensor, or one item of its first axis, and nothing else.

    It reads into memory of its own: pages of a mapped file would count as ours while they live.
    The file stays open: one that takes its name later is another, whose parts are not these.

    Raises:
        OSError: when a part is read, and the file has become shorter.
    """

    def __init__(self, stored: Stored):
        self.stored, self.file = stored, Held.of(stored.file)
        start, header = self.file.header
        entry = header[stored.name]
        self.begin, end = (start + offset for offset in entry["data_offsets"])
        self.dtype = (DTYPES | CODES)[entry["dtype"]]
        self.size = end - self.begin

    def __call__(self, index: int | None = None) -> Tensor:
        begin, size, shape = self.begin, self.size, self.stored.shape
        if index is not None:
            size //= shape[0]
            begin, shape = begin + index * size, shape[1:]
        part = pages((size,), torch.uint8)
        self.file.fill(memoryview(part.numpy().data), begin)
        return part.view(self.dtype).view(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return PartReader, (self.stored,)  # other processes open the file again


class Held:
    """A file that is open as long as somebody reads from it, once for all of them."""

    def __init__(self, path: Path, file: io.FileIO):
        self.path = path
        self.file = file
        self.lock = threading.Lock()
        weakref.finalize(self, file.close)

    @classmethod
    def of(cls, path: Path) -> "Held":
        file = io.FileIO(path)
        found = os.fstat(file.fileno())
        key = found.st_dev, found.st_ino  # no other file gets these while this one is open
        if (known := _HELD.get(key)) is not None:
            file.close()
            return known
        held = _HELD[key] = cls(path, file)
        return held

    def __reduce__(self) -> tuple[Any, ...]:
        return Held.of, (self.path,)  # other processes open the file again

    @cached_property
    def header(self) -> tuple[int, dict[str, Any]]:
        """Where the tensors of a safetensors file begin, and what it says of each."""
        start = bytearray(8)
        self.fill(memoryview(start), 0)
        text = bytearray(int.from_bytes(start, "little"))
        self.fill(memoryview(text), 8)
        return 8 + len(text), json.loads(text)

    def fill(self, room: memoryview, start: int) -> None:
        """Read as many bytes as there is room for.

        Raises:
            OSError: the file ends before.
        """
        with self.lock:
            while room and (count := self._read(room, start)):
                room, start = room[count:], start + count
        if room:
            raise OSError(f"{self.file.name} is shorter than it was: {len(room)} bytes are missing")

    def _read(self, room: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):  # forked processes share the place in the file, and not this
            return os.preadv(self.file.fileno(), [room], start)
        self.file.seek(start)
        return self.file.readinto(room) or 0


_HELD: weakref.WeakValueDictionary[tuple[int, int], Held] = weakref.WeakValueDictionary()


def _why_unreadable(path: Path, error: SafetensorError) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        header_bytes = int.from_bytes(start[:8], "little")
        if start.startswith(b"version https://git-lfs"):
            return f"{path} is a Git LFS pointer: fetch the file itself with `git lfs pull`"
        needed = 8 + header_bytes
        if start[8:9] == b"{" and needed <= size:
            file.seek(8)
            try:
                header = json.loads(file.read(header_bytes))
                ends = [entry["data_offsets"][1] for entry in header.values() if "dtype" in entry]
                needed += max(ends, default=0)
            except (ValueError, KeyError, TypeError, IndexError):
                pass
    if start[8:9] == b"{" and size < needed:
        return f"{path} is truncated: it has {size} of {needed} bytes; fetch the file again"
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"{path} is not a safetensors file ({reason}): fetch the file again"


# ---- torch.save


def map_pth(path: Path) -> dict[str, Tensor]:
    """Map all tensors of a ``.pth`` file into memory, leaving out what is no tensor.

    Raises:
        ValueError: truncated, not a file of ``torch.save``, or one that would run code.
    """
    try:
        # Meta's files carry bytes of its trainer (``_extra_state``) as BytesIO, which is harmless.
        with torch.serialization.safe_globals([io.BytesIO]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "a broken pickle"
        raise ValueError(
            f"{path} holds {what} and is not opened: only tensors are read, because anything else "
            "in a pickle may run code"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # of a broken pickle torch raises all kinds
        raise ValueError(
            f"{path} is truncated or not a file of torch.save: fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not named tensors")
    return {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}


def list_pth(path: Path) -> dict[str, Stored]:
    """List the tensors of a ``.pth`` file."""
    allowed = {*DTYPES.values(), *CODES.values()}
    return {
        name: Stored(
            path, name, tuple(t.shape), t.dtype if t.dtype in allowed else spelled(t.dtype)
        )
        for name, t in map_pth(path).items()
    }


# ---- checks


def first_of(names: Sequence[str]) -> str:
    """Name one tensor and count the others.

    >>> first_of(["norm.weight", "lm_head.weight"])
    'norm.weight and 1 other tensor'
    """
    others = len(names) - 1
    return names[0] + (f" and {others} other tensor{'s' * (others > 1)}" if others else "")


def check(
    found: Mapping[str, Stored],
    expected: Mapping[str, tuple[int, ...]],
    *,
    listing: Path,
    config: str,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Compare a checkpoint's tensors with what its config asks for.

    Args:
        listing: the file to name when a tensor is missing.
        config: the name of the file that asks.
        dtypes: of codes and their scales; the other tensors are weights.

    Raises:
        ValueError: the first of the tensors that is missing, too many, mis-shaped or no weight.
    """
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{listing} lacks {first_of(missing)}, which {config} asks for")
    if foreign := [name for name in found if name not in expected]:
        file = found[foreign[0]].file
        raise ValueError(f"{file} holds {first_of(foreign)}, for which {config} has no place")
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: {name} is {list(tensor.shape)} where {config} asks for "
                f"{list(shape)}"
            )
        if wanted := dtypes.get(name):
            if CODES.get(str(tensor.dtype), tensor.dtype) != wanted:
                raise ValueError(
                    f"{tensor.file}: {name} holds {spelled(tensor.dtype)} where {config} asks for "
                    f"{spelled(wanted)}"
                )
        elif tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{tensor.file}: {name} holds {spelled(tensor.dtype)} where weights are "
                f"{', '.join(map(spelled, DTYPES.values()))}; of quantised files "
                f"those of {PROGRAMS} are read"
            )


def check_one_dtype(found: Sequence[Stored]) -> torch.dtype:
    """Return the dtype that all tensors have; no matrix product takes a mixture.

    Raises:
        ValueError: with one tensor of each of two kinds.
    """
    first = found[0]
    assert isinstance(first.dtype, torch.dtype)
    for other in found:
        if other.dtype != first.dtype:
            raise ValueError(
                f"{other.file}: {other.name} is {spelled(other.dtype)} but {first.name} is "
                f"{spelled(first.dtype)}: choose one for all by dtype"
            )
    return first.dtype


# ---- copies


def fill(target: Tensor, source: Tensor) -> None:
    """Copy, converting dtype and device; a stack matrix by matrix, which torch transposes fast."""
    if source.ndim == 3:
        for to, matrix in zip(target, source, strict=True):
            fill(to, matrix)
        return
    if source.dtype == torch.float64 and not has_float64(target.device):
        source = source.to(target.dtype)
    target.copy_(source.to(target.device))  # moved as it lies, transposed where it arrives


# ---- weights that are made from several pieces


@runtime_checkable
class Part(Protocol):
    """Some rows of a weight, which are made when they are read."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        ...

    def read(self) -> Tensor: ...


def fill_rows(target: Tensor, pieces: Iterable[Tensor]) -> None:
    """Copy pieces that follow each other along the rows of a weight, or of a stack."""
    rows, start = target.view(-1, target.shape[-1]), 0
    for piece in pieces:
        fill(rows[start : start + len(piece)], piece)
        start += len(piece)


def joined(
    parts: Sequence[Part], shape: tuple[int, ...], dtype: torch.dtype, index: int
) -> tuple[Tensor, int]:
    """Return an expert of a stack ``[e, out, in]``, made from its parts, and the bytes read."""
    count = len(parts) // shape[0]
    own = parts[index * count : (index + 1) * count]
    expert = pages(shape[1:], dtype)
    fill_rows(expert, (part.read() for part in own))
    return expert, sum(part.nbytes for part in own)
