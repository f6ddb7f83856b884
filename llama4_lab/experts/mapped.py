"""Routed experts that stay in their files: one is read when a token asks for it.

`llama4_lab.load` puts a `Mapped` where the weights of a layer's experts would be. The readable
backend takes one expert after the other from it, for all the tokens of a forward pass.
"""

import math
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, overload

import torch
from torch import Tensor

from llama4_lab.packed import Packed


class ExpertMemory:
    """Keeps the experts that were read last, up to a limit in bytes, and counts what is read.

    `bytes_read` counts bytes of the files since the model was loaded, and `bytes_held` those of the
    experts that are kept now. The expert that is computed with may come on top of the limit.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes_read = 0
        self.bytes_held = 0
        self._kept: OrderedDict[Hashable, Tensor | Packed] = OrderedDict()
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None

    def get(
        self, key: Hashable, size: int, read: Callable[[], tuple[Tensor | Packed, int]]
    ) -> Tensor | Packed:
        """Return what is kept under a key, or read it: `size` bytes in memory.

        Room is made before, so that the limit holds while reading too.
        """
        if self._reader is not None:
            self._reader.join()  # perhaps it is reading just this
        return self._get(key, size, read)

    def read_ahead(
        self, key: Hashable, size: int, read: Callable[[], tuple[Tensor | Packed, int]]
    ) -> None:
        """Begin to read what `get` is asked for next, if it will be kept till then."""
        if size <= self.limit and key not in self._kept:
            self._reader = threading.Thread(
                target=self._get_quietly, args=(key, size, read), daemon=True
            )
            self._reader.start()

    def _get_quietly(self, *of: Any) -> None:
        with suppress(Exception):  # whoever asks for it reads again, and is told
            self._get(*of)

    def _get(
        self, key: Hashable, size: int, read: Callable[[], tuple[Tensor | Packed, int]]
    ) -> Tensor | Packed:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            while self._kept and self.bytes_held + size > self.limit:
                _, gone = self._kept.popitem(last=False)
                self.bytes_held -= gone.nbytes
            value, from_file = read()
            self.bytes_read += from_file
            if self.bytes_held + size <= self.limit:
                self._kept[key] = value
                self.bytes_held += value.nbytes
            return value

    def clear(self) -> None:
        """Forget all experts; they are read again when they are asked for."""
        with self._lock:
            self._kept.clear()
            self.bytes_held = 0

    def __deepcopy__(self, _: object) -> "ExpertMemory":
        return self  # copies of a model share the limit

    def __reduce__(self) -> tuple[Any, ...]:
        return ExpertMemory, (self.limit,)  # other processes read for themselves


def pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor whose memory goes back to the system when it goes.

    What the allocator gets back it may keep, and it may be in pieces: then no limit would hold.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    # By default mmap shares memory with processes that are forked, of which Linux takes small pages
    # only: an expert of Scout has 60,000 of 4 kB, and asking for them takes longer than reading it.
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    memory = mmap.mmap(-1, size, private) if private else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system that has no large ones
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A stack of experts' weights ``[e, out, in]`` in a file; an index reads one of them."""

    name: str
    matrix: tuple[int, int]  # out, in
    experts: range
    read: Callable[[int], tuple[Tensor | Packed, int]]  # an expert, and the bytes that it took
    memory: ExpertMemory
    like: Tensor  # empty; of the dtype that plain weights get, and on the device of all
    packed_size: int | None  # bytes of an expert that is packed

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.experts), *self.matrix])

    @property
    def size(self) -> int:
        """Bytes of one expert in memory."""
        return self.packed_size or self.matrix[0] * self.matrix[1] * self.like.itemsize

    def __len__(self) -> int:
        return len(self.experts)

    def __deepcopy__(self, _: object) -> "Mapped":
        return self  # nothing in it changes, and the files stay those that are open

    @overload
    def __getitem__(self, index: int) -> Tensor | Packed: ...
    @overload
    def __getitem__(self, index: slice) -> "Mapped": ...
    def __getitem__(self, index: int | slice) -> "Tensor | Packed | Mapped":
        if isinstance(index, slice):
            return replace(self, experts=self.experts[index])
        return self.memory.get(*self._request(index))

    def in_turn(self, indices: Sequence[int]) -> Iterator[Tensor | Packed]:
        """Yield experts, each read while the one before is computed with."""
        for i, after in zip_longest(indices, indices[1:]):
            weight = self[i]
            if after is not None and self.like.device.type == "cpu":  # others have streams
                self.memory.read_ahead(*self._request(after))
            yield weight
            del weight  # before the next is read

    def _request(self, index: int) -> tuple[Hashable, int, Callable[[], tuple[Any, int]]]:
        expert = self.experts[index]
        # Copies of a model, which share the memory, may have another dtype or device.
        key = self.name, expert, self.like.dtype, self.like.device
        return key, self.size, lambda: self._placed(expert)

    @torch.inference_mode(False)  # what is kept serves passes with gradients, too
    def _placed(self, expert: int) -> tuple[Tensor | Packed, int]:
        weight, from_file = self.read(expert)
        if isinstance(weight, Packed):
            return weight.to(self.like.device), from_file
        if self.like.device.type != "cpu":
            return weight.to(self.like).contiguous(), from_file
        if weight.dtype == self.like.dtype and weight.is_contiguous():
            return weight, from_file
        return pages(tuple(weight.shape), self.like.dtype).copy_(weight), from_file

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "Mapped":
        """Follow a module that moves or changes its dtype."""
        self.memory.clear()
        return replace(self, like=fn(self.like))
