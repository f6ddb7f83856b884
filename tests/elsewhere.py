"""A device that is not the CPU, for tests where there is none.

Tensors there say that they are on "meta", and are held by plain ones. Operators refuse to mix the
two as devices do: only numbers without axes, indices and the source of a copy may be here. Like
Apple's GPUs it has no float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
_PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_aten = torch.ops.aten
_ABSENT = {torch.float64, torch.complex128}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class Held(Tensor):
    """A tensor elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        places = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), dtype=held.dtype, device=ELSEWHERE, **places
        )
        found.held = held
        return found

    def __repr__(self) -> str:
        return f"Held({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()  # torch's refuses subclasses

    def __format__(self, form: str) -> str:
        return format(self.held, form)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Torch makes a matrix of a vector, and changes it back in its place, which no class sees.
        if func in _PRODUCTS and args[0].ndim == 1:
            return func(args[0][None], *args[1:], **(kwargs or {}))[0]
        if func in _PRODUCTS and args[1].ndim == 1:
            return func(args[0], args[1][:, None], **(kwargs or {}))[..., 0]
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype, device=ELSEWHERE)
        if func in _INDEXING:  # lists become tensors that no mode sees
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(
                torch.tensor(each, dtype=torch.long) if isinstance(each, list) else each
                for each in index
            )
            args = (args[0], index, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@torch.inference_mode(False)  # tensors of inference cannot be held
@torch.no_grad()
def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Held)]
    here = [x for x in tensors if not isinstance(x, Held)]
    if any(x.device == ELSEWHERE for x in here):
        raise NotImplementedError(f"{func}: a tensor was made elsewhere that nobody holds")
    is_mixed = func is _aten.copy_.default or (func in _INDEXED and isinstance(args[0], Held))
    if there and any(x.ndim for x in here) and not is_mixed:
        raise RuntimeError(f"{func}: expected all tensors on one device, found two")
    generator = kwargs.get("generator")
    if there and generator and all(generator._cdata != each._cdata for each in _generators):
        raise RuntimeError(f"{func}: expected a generator of the tensors' device")
    is_there = bool(there)
    if func is _aten.copy_.default:
        is_there = isinstance(args[0], Held)
    elif (device := kwargs.get("device")) is not None:
        is_there = torch.device(device) == ELSEWHERE
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Held) else x, (args, kwargs))
    holders = {id(x.held): x for x in there}

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not is_there:
            return x
        if x.dtype in _ABSENT:
            raise TypeError(f"{func}: {x.dtype} is not there; use float32")
        known = holders.get(id(x))  # of what was changed in its place
        return known if known is not None and known.shape == x.shape else Held(x)

    return tree_map(placed, func(*args, **kwargs))


_generators: list[torch.Generator] = []  # those elsewhere, which draw as one of the CPU does


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        found = torch._C.Generator()
        if torch.device(device) == ELSEWHERE:
            _generators.append(found)
        return found


def _causal_lower_right(t: int, s: int) -> Tensor:
    return torch.ones(t, s, dtype=torch.bool, device=ELSEWHERE).tril(s - t)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Have a device inside the block that is not the CPU."""
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # or they would keep their class
    tensor, as_tensor = torch.tensor, torch.as_tensor  # no mode sees what they make elsewhere

    def moved(data: Any, device: Any = None, **options: Any) -> Tensor:
        found = tensor(data, **options)
        return found if device is None else found.to(device)

    def same(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        found = data if isinstance(data, Tensor) else as_tensor(data)
        return found.to(device=device or found.device, dtype=dtype or found.dtype)

    try:
        with (
            _Device(),
            patch.object(torch, "Generator", _Generator),
            patch.object(torch, "tensor", moved),
            patch.object(torch, "as_tensor", same),
            patch.object(bias, "causal_lower_right", _causal_lower_right),
            patch.object(torch, "is_autocast_enabled", lambda kind=None: False),
        ):
            yield ELSEWHERE
    finally:
        future.set_overwrite_module_params_on_conversion(before)
