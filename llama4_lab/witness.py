"""Proof that a value was read: the first operation that uses it, seen from outside the model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llama4_lab.precision import with_float64


class Witness(TorchFunctionMode):
    """Sees which operation first reads a value, through views and concatenations.

    From `follow` on every torch function passes by here, until `settle` finds that all is known, or
    `close`. A function counts as a reader in `used_by` only if the value's checksum is still that
    of `follow`: what was handed out is what was read.
    """

    def __init__(self) -> None:
        super().__init__()
        # By name, the operation; by identity, what is followed, for which names, its checksum.
        self.used_by: dict[str, str] = {}
        self._followed: dict[int, tuple[Tensor, list[str], float]] = {}
        self._is_looking = True
        self._is_entered = False

    def follow(self, name: str, value: Tensor, instead_of: Tensor) -> None:
        """Watch for the operation that reads `value`, which was put in another one's place."""
        _, earlier, _ = self._followed.pop(id(instead_of), (None, [], 0.0))
        with self.looking_away():
            self._followed[id(value)] = (value, [*earlier, name], _checksum(value))
        if not self._is_entered:
            self.__enter__()
            self._is_entered = True

    def settle(self) -> None:
        """Forget what has been read, and step out of the way if nothing is left to follow."""
        known = self.used_by.keys()
        self._followed = {
            key: found for key, found in self._followed.items() if not known >= set(found[1])
        }
        if not self._followed:
            self.close()

    def close(self) -> None:
        """Stop watching."""
        if self._is_entered:
            self.__exit__(None, None, None)
            self._is_entered = False

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Take no notice of what happens inside the block: it is not the model that reads."""
        before, self._is_looking = self._is_looking, False
        try:
            yield
        finally:
            self._is_looking = before

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._followed and self._is_looking:
            with self.looking_away():
                self._notice(func, args, out)
        return out

    def _notice(self, func: Any, args: Any, out: Any) -> None:
        for arg in _tensors(args):
            value, names, checksum = self._followed.get(id(arg), (None, [], 0.0))
            if value is not arg:
                continue
            made = list(_tensors(out))
            passes_on = func in _JOINS or any(_is_view(each, arg) for each in made)
            if passes_on:
                for each in made:
                    if each is not arg:  # else it may have been overwritten in place
                        self._followed[id(each)] = (each, names, _checksum(each))
            elif made and _checksum(arg) == checksum:
                for name in names:
                    self.used_by.setdefault(name, getattr(func, "__name__", str(func)))
                del self._followed[id(arg)]


_JOINS = (torch.cat, torch.Tensor.repeat_interleave)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for each in found:
            yield from _tensors(each)


def _is_view(new: Tensor, old: Tensor) -> bool:
    return new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()


def _checksum(value: Tensor) -> float:
    value = torch.view_as_real(value) if value.is_complex() else value
    value = with_float64(value)
    total = value.sum(dtype=torch.float64).item()
    if math.isfinite(total):
        return total
    return value.double().nan_to_num(neginf=-1e9).sum().item()  # masked scores are -inf
