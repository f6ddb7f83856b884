"""Weights in few bits: int8, int4 and fp8 codes with scales, in one layout for every kernel.

`linear` multiplies them, and plain weights too.

Codes are symmetric, ``weight ≈ scale · code``, along the last axis, which is the one that a product
contracts:

- int8: a scale for every `group` neighbours; codes −127 … 127.
- int4: likewise with codes −7 … 7, two to a byte: byte j of a group holds code j in its low four
  bits and code ``j + group / 2`` in its high ones, each plus 8. Both halves of a group then meet
  neighbouring inputs.
- fp8: a scale for a whole row, codes in float8_e4m3fn: what scaled matrix products take.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary

from llama4_lab.precision import product_dtype

KINDS = ("int8", "int4", "fp8")
GROUP = 128
CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
_PACKED_AT_ONCE = 1 << 18  # weights: rounding takes some five times their memory in float32
_ON_A_GPU = 1 << 26  # likewise, and unpacked at a time: launching kernels costs more than memory
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight ``[*rows, k]`` in few bits; an index picks along the first axis, as on a tensor."""

    kind: str
    codes: Tensor  # int8 or float8_e4m3fn [*rows, k]; int4: uint8 [*rows, k / 2]
    scales: Float[Tensor, "*rows groups"]  # bfloat16, of fp8 float32 with one group

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that this stands for."""
        width = self.codes.shape[-1] * (2 if self.kind == "int4" else 1)
        return torch.Size([*self.codes.shape[:-1], width])

    @property
    def group(self) -> int:
        """How many neighbours along the last axis share a scale."""
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int | slice | None) -> "Packed":
        return Packed(self.kind, self.codes[index], self.scales[index])

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(self.kind, self.codes.to(device), self.scales.to(device))

    def float(self) -> Float[Tensor, "*rows k"]:
        """Return the weight in float32, as of a tensor."""
        return self.unpack()

    def unpack(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*rows k"]:
        """Return the weight that the codes stand for; the product is taken in float32."""
        on_gpu = self.codes.is_cuda and not torch.compiler.is_compiling()  # Inductor fuses, too
        if on_gpu and (kernels := _triton()) and kernels.can_unpack(self.kind, self.group):
            return kernels.unpack(self.codes, self.scales, self.group, dtype)
        codes = unpack_nibbles(self.codes, self.group) if self.kind == "int4" else self.codes
        grouped = codes.float().unflatten(-1, (-1, self.group))
        return (grouped * self.scales.float()[..., None]).flatten(-2).to(dtype)


def cat(weights: "Sequence[Tensor | Packed]") -> "Tensor | Packed":
    """Return weights behind each other along their first axis, as one.

    Raises:
        ValueError: they are not packed alike.
    """
    kinds = {weight.kind if isinstance(weight, Packed) else "unpacked" for weight in weights}
    if len(kinds) > 1:
        raise ValueError(
            f"weights that one kernel reads need one packing, not {', '.join(sorted(kinds))}: pack "
            "them alike"
        )
    if plain := [weight.detach() for weight in weights if isinstance(weight, Tensor)]:
        return torch.cat(plain)
    parts = zip(*((w.codes, w.scales) for w in weights if isinstance(w, Packed)), strict=True)
    return Packed(kinds.pop(), *map(torch.cat, parts))


@cache
def _triton() -> Any:
    """Return the kernels for GPUs, or None where there is no triton."""
    try:
        from llama4_lab import packed_triton
    except ImportError:
        return None
    return packed_triton


def pack(weight: Float[Tensor, "*rows k"], kind: str, group: int | None = None) -> Packed:
    """Round a weight to the nearest codes; the largest of each group keeps its value.

    Each number is off by at most half a scale, which is its group's largest over 127 (int8) or 7
    (int4), and by what the scale itself is rounded; fp8 is off by a sixteenth at most.

    Args:
        group: None takes 128, or the largest power of two below it that divides k.

    Raises:
        ValueError: an unknown kind, or a group that does not divide the row.
    """
    packed = empty(weight.shape, kind, group, weight.device)
    rows = weight.detach().flatten(0, -2)
    codes, scales = packed.codes.flatten(0, -2), packed.scales.flatten(0, -2)
    at_once = _ON_A_GPU if weight.is_cuda else _PACKED_AT_ONCE
    step = max(1, at_once // weight.shape[-1])
    for part in (slice(start, start + step) for start in range(0, len(rows), step)):
        codes[part], scales[part] = _rounded(rows[part], kind, packed.group)
    return packed


def _rounded(rows: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of some rows; the steps in between are several times their size."""
    grouped = rows.float().unflatten(-1, (-1, group))
    scales = grouped.abs().amax(dim=-1) / _LARGEST[kind]
    scales = scales if kind == "fp8" else scales.bfloat16()
    scaled = grouped / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if kind == "fp8":
        return scaled.flatten(-2).to(torch.float8_e4m3fn), scales
    codes = scaled.round_().clamp_(-_LARGEST[kind], _LARGEST[kind]).to(torch.int8).flatten(-2)
    return pack_nibbles(codes, group) if kind == "int4" else codes, scales


def empty(
    shape: Sequence[int],
    kind: str,
    group: int | None = None,
    device: torch.device | str | None = None,
) -> Packed:
    """Return room for the codes and scales of a weight of this shape.

    Raises:
        ValueError: as for `pack`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of packed weights; choose {', '.join(KINDS)}")
    *rows, k = shape
    if kind == "fp8":
        group = k
    elif group is None:
        group = min(GROUP, k & -k)
    if group < 1 or k % group or (kind == "int4" and group % 2):
        raise ValueError(
            f"rows of {k} weights cannot be cut into groups of {group} for {kind}: give a divisor"
            + (" that is even" if kind == "int4" else "")
        )
    width = k // 2 if kind == "int4" else k
    scale_dtype = torch.float32 if kind == "fp8" else torch.bfloat16
    return Packed(
        kind,
        torch.empty(*rows, width, dtype=CODES[kind], device=device),
        torch.empty(*rows, k // group, dtype=scale_dtype, device=device),
    )


def kind_of(codes: Tensor) -> str:
    """Tell the kind by the codes' dtype."""
    return next(kind for kind, dtype in CODES.items() if dtype == codes.dtype)


def pack_nibbles(codes: Tensor, group: int) -> UInt8[Tensor, "*rows half"]:
    """Put two codes of −8 … 7 into each byte, as the module's first lines say."""
    low, high = (
        (x + 8).to(torch.uint8)
        for x in rearrange(codes, "... (n two j) -> two ... (n j)", two=2, j=group // 2)
    )
    return low | high << 4


def unpack_nibbles(packed: UInt8[Tensor, "*rows half"], group: int) -> Tensor:
    """Undo `pack_nibbles`: int8 codes ``[*rows, k]``."""
    both = torch.stack([packed & 15, packed >> 4]).to(torch.int8) - 8
    return rearrange(both, "two ... (n j) -> ... (n two j)", j=group // 2)


# ---- products

_BLOCK = 1 << 20  # as many weights are unpacked at a time: they stay in the cache
# Up to so many rows, multiplying the codes is faster than to unpack them for a library's product:
# of 8192 x 5120, up to 48 on an EPYC with AVX-512, and 18 to 36 on a Xeon with units for matrices.
_FEW = 32
# Likewise of plain weights: the kernel reads each of them once, and in several places at a time.
# Libraries take up to four times as long for so few rows, except where units multiply bfloat16.
_FEWEST = {torch.float32: 8, torch.bfloat16: 2}
_LEAST = 1 << 21  # products with plain weights: the library makes fewer before ours has begun
# Rows of float32 from which oneDNN, where it is ahead of MKL, is so at every width.
_MANY = 32
_is_onednn_ahead = Event()  # see `prefer_onednn`
_is_prepared = Event()  # whether the kernel for plain weights is there, see `prepare`
_COMPILED = ("int8", "int4")
_ROWS_OF_NUMBERS = {torch.float32: 2, torch.bfloat16: 1}  # see `packed_kernels.whole_numbers`
_CPU: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def linear(
    x: Float[Tensor, "*batch k"], w: "Tensor | Packed", bias: Tensor | None = None
) -> Float[Tensor, "*batch out"]:
    """Return ``x @ w.T + bias``, where the weight ``[out, k]`` may be packed.

    The product is that of the unpacked weight, up to the order of the sum. On the CPU a kernel
    multiplies few rows by the codes, with 30 bits of float32's numbers and 15 of bfloat16's,
    counted from the largest of a group; for more, the weight is unpacked to x's dtype, or to
    float32 where that is bfloat16 and the CPU has no units for it. Plain weights likewise have a
    kernel for few rows, and are multiplied in float32 where there are no such units. Gradients
    reach x, and plain weights.

    Raises:
        ValueError: rows of another width than a packed weight's.
    """
    if isinstance(w, Tensor) and not _is_slow_plain(x, w):
        return _by_library(x, w, bias)
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(
            f"inputs of shape {tuple(x.shape)} do not fit a weight of shape {tuple(w.shape)}: "
            f"their last axis must have {w.shape[-1]} numbers"
        )
    if has_torch_function_unary(x):  # what watches torch's functions sees this as one of them
        return handle_torch_function(linear, (x,), x, w, bias)
    if isinstance(w, Packed) and not torch.compiler.is_compiling() and _is_transformed():
        return F.linear(x, w.unpack(x.dtype), bias)  # which has every derivative
    # Compilers see no derivatives; without them, autograd's part costs as much as a small product.
    is_plain = not torch.compiler.is_compiling() and not _wants_derivatives(x)
    out: Tensor = _product(x, w) if is_plain else _Product.apply(x, w)
    return out if bias is None else out + bias


def prepare() -> None:
    """Load the kernel for plain weights, or compile it: `linear` takes it for float32 from then on.

    Unlike the kernels for packed weights and for bfloat16, it gains too little for anyone to wait.
    """
    x = torch.ones(1, 16, **_CPU)
    _product_of_numbers(x, x)
    _is_prepared.set()


def prefer_onednn() -> None:
    """Let oneDNN multiply many rows of float32 from now on: on AMD it has twice MKL's rate."""
    _is_onednn_ahead.set()


def onednn(
    x: Float[Tensor, "*batch k"], w: Float[Tensor, "out k"], bias: Tensor | None = None
) -> Float[Tensor, "*batch out"]:
    """Equal `F.linear`, by another library than PyTorch asks, and without derivatives."""
    if has_torch_function_unary(x):  # what watches torch's functions sees this as one of them
        return handle_torch_function(onednn, (x,), x, w, bias)
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def _by_library(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_onednn_ahead.is_set():
        return F.linear(x, w, bias)
    given = [x, w] if bias is None else [x, w, bias]
    is_for_it = (
        all(each.dtype == torch.float32 for each in given)
        and x.shape[-1:] == w.shape[1:]
        and is_for_kernels(*given)
        and x.shape[:-1].numel() >= _MANY
        and not torch.is_autocast_enabled("cpu")
    )
    return onednn(x, w, bias) if is_for_it else F.linear(x, w, bias)


def is_for_kernels(*tensors: Tensor) -> bool:
    """Whether compiled kernels take these: contiguous on the CPU, and only values are wanted."""
    return are_only_values(*tensors) and all(t.is_contiguous() for t in tensors)


def are_only_values(*tensors: Tensor) -> bool:
    """Whether these lie on the CPU and nobody wants more than values that are made of them.

    Kernels have no derivatives, backward, forward or for torch.func, and PyTorch's observers of
    operators and compilers do not see them.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not _wants_derivatives(*tensors)
        and all(t.is_cpu and type(t) in _PLAIN for t in tensors)
    )


_PLAIN = (Tensor, nn.Parameter)  # no subclass, which may hold anything


def _wants_derivatives(*tensors: Tensor) -> bool:
    return _is_transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _is_transformed() -> bool:
    """Whether derivatives are taken forward, or by torch.func."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def _is_slow_plain(x: Tensor, w: Tensor) -> bool:
    """Whether the library is slow with a plain weight: few rows, or bfloat16 without units."""
    return (
        w.dtype in _FEWEST
        and x.dtype == w.dtype
        and x.is_cpu
        and type(x) in _PLAIN
        and x.shape[-1:] == w.shape[1:]
        and x.numel() * len(w) >= _LEAST
        and (x.shape[:-1].numel() <= _FEWEST[x.dtype] or _is_slow(x))
        and (x.dtype == torch.bfloat16 or _is_prepared.is_set())
        and not torch.is_autocast_enabled("cpu")
        and is_for_kernels(w)
    )


class _Product(torch.autograd.Function):
    """Keeps the weight as it is for the way back, not unpacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | Packed) -> Tensor:
        ctx.w = w
        return _product(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (given,) = grads
        grad = given.float() if _is_slow(given) else given
        dtype = torch.promote_types(grad.dtype, torch.float32)  # sums of many blocks
        to_x = grad.new_zeros(*grad.shape[:-1], ctx.w.shape[-1], dtype=dtype)
        start = 0
        for block in _blocks(ctx.w, grad.dtype):
            kept = block.clone() if grad.requires_grad else block  # for the second derivative
            to_x += grad[..., start : start + len(block)] @ kept
            start += len(block)
        return to_x.to(given.dtype), None


def _product(x: Tensor, w: Tensor | Packed) -> Tensor:
    if x.shape[:-1].numel() <= _FEW:
        found = _product_of_numbers(x, w) if isinstance(w, Tensor) else _product_of_codes(x, w)
        if found is not None:
            return found
    y = x.float() if _is_slow(x) else x
    parts = [_by_library(y, block) for block in _blocks(w, y.dtype)]
    return (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).to(x.dtype)


def _is_slow(x: Tensor) -> bool:
    """Whether the CPU has no units for x's dtype; whatever Inductor makes of it is left to it."""
    is_half = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return is_half and product_dtype(x.device) != torch.bfloat16


def _is_compiled(w: Packed) -> bool:
    is_traced = torch.compiler.is_compiling()  # which sees no kernels of ours
    return w.device.type == "cpu" and w.kind in _COMPILED and not is_traced


def _product_of_codes(x: Tensor, w: Packed) -> Tensor | None:
    """Return the product by kernels that read the codes, or None where there are none."""
    if not _is_compiled(w) or x.dtype not in _ROWS_OF_NUMBERS or x.numel() == 0:
        return None
    from llama4_lab import packed_kernels as kernels
    from llama4_lab.compiled import beside, threads

    (outputs, width), groups = w.codes.shape, w.scales.shape[1]
    if w.group > kernels.LARGEST_GROUP or width // groups % kernels.BYTES[w.kind]:
        return None
    given = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
    n = len(given) * _ROWS_OF_NUMBERS[x.dtype]
    # In torch's memory, which is aligned; numpy's is not.
    numbers = torch.empty(n, given.shape[1], dtype=torch.int16, device="cpu").numpy()
    steps = torch.empty(n, groups, **_CPU).numpy()
    starts = torch.empty(n, groups, dtype=torch.int32, device="cpu").numpy()
    made = numbers, steps, starts
    if not kernels.whole_numbers(given.numpy(), w.group, w.kind == "int4", *made):
        return None
    out = torch.empty(len(given), outputs, **_CPU)
    products = outputs * (given.numel() + given.shape[1])  # codes are read, once for all
    step = -(-outputs // threads(products) // kernels.ROWS) * kernels.ROWS
    arrays = *made, *_arrays(w), out.numpy()
    beside(
        partial(kernels.product, *arrays, start, min(start + step, outputs))
        for start in range(0, outputs, step)
    )
    return out.view(*x.shape[:-1], outputs).to(x.dtype)


def _arrays(w: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales as kernels read them: row after row."""
    from llama4_lab.compiled import array

    return array(w.codes.contiguous()), array(w.scales.contiguous())


def _product_of_numbers(x: Tensor, w: Tensor) -> Tensor:
    """Return the product with a plain weight for few rows."""
    from llama4_lab import plain_kernels as kernels
    from llama4_lab.compiled import array, beside, threads

    given = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
    rows = np.arange(len(given))
    shares = w.detach().chunk(threads(w.numel() * max(len(given), kernels.PRODUCTS_A_READ)))
    outs = [torch.empty(len(given), len(share), **_CPU) for share in shares]
    beside(
        partial(kernels.product, array(share), array(given), rows, array(out), rows, kernels.SET)
        for share, out in zip(shares, outs, strict=True)
    )
    out = torch.cat(outs, dim=-1) if len(outs) > 1 else outs[0]
    return out.view(*x.shape[:-1], len(w)).to(x.dtype)


def _blocks(w: Tensor | Packed, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the weight some rows at a time; a block is good until the next one is asked for."""
    step = max(1, (_ON_A_GPU if w.device.type == "cuda" else _BLOCK) // w.shape[-1])
    parts: list[Any] = [w[start : start + step] for start in range(0, len(w), step)]
    if isinstance(w, Tensor) and w.dtype == dtype:
        yield from parts
        return
    if isinstance(w, Tensor):
        space = torch.empty(parts[0].shape, dtype=dtype, device=w.device)
        yield from (space[: len(part)].copy_(part) for part in parts)
        return
    if not _is_compiled(w) or dtype not in _ROWS_OF_NUMBERS:
        yield from (part.unpack(dtype) for part in parts)
        return
    from llama4_lab.compiled import array
    from llama4_lab.packed_kernels import unpack

    space = torch.empty(parts[0].shape, dtype=dtype, device="cpu")
    for part in parts:
        block = space[: len(part)]
        unpack(*_arrays(part), array(block))
        yield block
