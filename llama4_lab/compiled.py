"""Compiled code for the CPU: how it is made, kept on disk, and spread over threads.

Kernels are numba's, or, where its loops do not become the instructions that are wanted, written in
LLVM's terms (`in_llvm`), out of the few words at the end of this file.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.numpy_support import carray
from torch import Tensor

LANES = 16 if get_host_cpu_features().get("avx512f", False) else 8
"""Numbers of a vector."""
LINE, AHEAD = 64, 256
"""Bytes of a line of the cache, and how many lines before it is needed one is asked for."""

_OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    # Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}
_SOURCES = {Path(__file__)}  # of all kernels so far, which those that follow may call
_PRODUCTS_A_THREAD = 25_000_000  # half a millisecond's: for less, none is woken up


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function at its first call; a wrapper that checks shapes is taken off first.

    Numba compiles a kernel anew when its own file has changed, not when a kernel that it calls has:
    kernels on disk that are older than any of the sources are deleted.
    """
    function = inspect.unwrap(function)
    _SOURCES.add(Path(inspect.getfile(function)))
    kernel = numba.njit(function, **(_OPTIONS | options))
    changes = (source.stat().st_mtime for source in _SOURCES)
    changed = max((when for when in changes if when <= time.time()), default=0)  # clocks err
    for file in _kept(kernel):
        with suppress(OSError):  # another process was faster
            if file.stat().st_mtime < changed:
                file.unlink()
    return kernel


def in_llvm(function: Callable[..., Any]) -> Any:
    """Make a function that writes LLVM's code callable in kernels; see numba's `intrinsic`."""
    _SOURCES.add(Path(inspect.getfile(function)))
    return intrinsic(function)


def is_kept(kernel: Any) -> bool:
    """Whether a kernel was compiled from these sources before, and is on disk."""
    return any(_kept(kernel))


def _kept(kernel: Any) -> Iterable[Path]:
    source = Path(inspect.getfile(kernel.py_func))
    name = f"{source.stem}.{kernel.py_func.__qualname__}"
    return Path(kernel.stats.cache_path).glob(f"{name}-*.nbi")


def array(tensor: Tensor) -> np.ndarray:
    """Share a tensor's memory; bfloat16 comes as its bits, which numpy has no name for."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def lift(weight):
    """Return a weight as float32: bfloat16 comes as the 16 bits that are a float32's upper half."""
    raise NotImplementedError("only compiled code calls it")


@overload(lift, inline="always")
def _lift(weight):
    if weight == numba.uint16:
        return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
    return lambda weight: weight


@intrinsic
def _pointer(_, address):
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(numba.float32)(numba.int64), code


pointer: Any = _pointer  # called without its first argument


@compiled
def floats(address, shape):
    """Take what lies at an address for an array, contiguous and of float32.

    Few tokens' products take no longer than it takes to hand over a dozen arrays.
    """
    return carray(pointer(address), shape)


# ---- threads


def threads(products: int) -> int:
    """Return over how many of torch's threads to spread so many products."""
    return max(1, min(torch.get_num_threads(), products // _PRODUCTS_A_THREAD))


def beside(calls: Iterable[Callable[[], None]]) -> None:
    """Make calls at the same time, the first on this thread; kernels do not hold up Python's."""
    first, *others = calls
    waiting = [_pool().submit(call) for call in others]
    first()
    for each in waiting:
        each.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "kernels")


if hasattr(os, "register_at_fork"):  # threads are not there in a copy of the process
    os.register_at_fork(after_in_child=_pool.cache_clear)


# ---- in LLVM's terms

NUMBER, WHOLE = ir.FloatType(), ir.IntType(32)


def vector(of: ir.Type) -> ir.VectorType:
    return ir.VectorType(of, LANES)


def vector_at(builder, array_data, i, of: ir.Type):
    """Return where the vector lies that begins with number i of an array."""
    return builder.bitcast(builder.gep(array_data, [i]), vector(of).as_pointer())


def in_all_lanes(builder, value):
    nothing = ir.Constant(vector(value.type), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(WHOLE, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(vector(WHOLE), [0] * LANES))


def widened(builder, bits):
    """Make float32 of bfloat16, one or a vector, that comes as its 16 bits: the upper half."""
    whole, number, sixteen = WHOLE, NUMBER, WHOLE(16)
    if isinstance(bits.type, ir.VectorType):
        whole, number, sixteen = vector(WHOLE), vector(NUMBER), vector(WHOLE)([16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, whole), sixteen), number)


def add_product(builder, a, b, place):
    """Add ``a * b`` to what lies in a place, in one instruction where there is one."""
    product = builder.fmul(a, b, flags=["contract"])
    builder.store(builder.fadd(product, builder.load(place), flags=["contract"]), place)


def sum_of_lanes(builder, first, lanes):
    """Return a number plus all those of a vector."""
    kind = ir.FunctionType(NUMBER, [NUMBER, vector(NUMBER)])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    reduce = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(reduce, [first, lanes], fastmath=["reassoc"])


def at_most(builder, i, last):
    return builder.select(builder.icmp_signed("<", i, last), i, last)


def begin_to_read(builder, array, byte):
    """Ask for the line of the cache that a byte of an array lies in."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, WHOLE, WHOLE, WHOLE])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    place = builder.gep(builder.bitcast(array.data, pointer), [byte])
    # Of data, to read, into the second cache: few lines can be on their way into the first, and a
    # core that has asked for as many waits.
    builder.call(fetch, [place, WHOLE(0), WHOLE(2), WHOLE(1)])


def _wide(_):
    """Let this function use vectors of 512 bits; LLVM stops at 256 on most CPUs that have them."""

    def code(context, builder, signature, arguments):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return numba.void(), code


wide: Any = in_llvm(_wide)
