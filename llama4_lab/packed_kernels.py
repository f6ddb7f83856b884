"""Compiled CPU kernels for int8 and int4 codes; `llama4_lab.packed` chooses between them.

Numba compiles them at their first call and keeps the result on disk. Loops run over slices of one
group, because that is the form that LLVM turns into vector instructions. Scales come as the 16 bits
of a bfloat16, which are the upper half of a float32.
"""

from typing import no_type_check

import numpy as np
from numba import njit

_OPTIONS = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},  # sums in any order; NaNs stay NaNs
}


@no_type_check
@njit(**_OPTIONS)
def _widened(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@no_type_check
@njit(**_OPTIONS)
def _low(byte):
    return np.float32(np.int32(byte & 15) - 8)


@no_type_check
@njit(**_OPTIONS)
def _high(byte):
    return np.float32(np.int32(byte >> 4) - 8)


# ---- products of few rows


@no_type_check
@njit(**_OPTIONS)
def _dot_int8(x, codes):
    total = np.float32(0)
    for j in range(codes.size):
        total += x[j] * np.float32(codes[j])
    return total


@no_type_check
@njit(**_OPTIONS)
def _dot_int4(x, codes):
    total = np.float32(0)
    half = codes.size
    for j in range(half):
        total += x[j] * _low(codes[j]) + x[half + j] * _high(codes[j])
    return total


@no_type_check
@njit(**_OPTIONS)
def product_int8(x, codes, scales, out):
    """Fill ``out [n, o]`` with ``x [n, k]`` times the weight; both are float32."""
    size = codes.shape[1] // scales.shape[1]
    for o in range(codes.shape[0]):
        row = codes[o]
        for n in range(x.shape[0]):
            total = np.float32(0)
            for g in range(scales.shape[1]):
                part = slice(g * size, (g + 1) * size)
                total += _dot_int8(x[n][part], row[part]) * _widened(scales[o, g])
            out[n, o] = total


@no_type_check
@njit(**_OPTIONS)
def product_int4(x, codes, scales, out):
    """Fill ``out [n, o]`` with ``x [n, k]`` times the weight; both are float32."""
    size = codes.shape[1] // scales.shape[1]
    for o in range(codes.shape[0]):
        row = codes[o]
        for n in range(x.shape[0]):
            total = np.float32(0)
            for g in range(scales.shape[1]):
                group = x[n][2 * g * size : 2 * (g + 1) * size]
                held = row[g * size : (g + 1) * size]
                total += _dot_int4(group, held) * _widened(scales[o, g])
            out[n, o] = total


# ---- the weight itself


@no_type_check
@njit(**_OPTIONS)
def _scale_int8(codes, scale, out):
    for j in range(codes.size):
        out[j] = np.float32(codes[j]) * scale


@no_type_check
@njit(**_OPTIONS)
def _scale_int4(codes, scale, out):
    low, high = out[: codes.size], out[codes.size :]
    for j in range(codes.size):
        low[j] = _low(codes[j]) * scale
        high[j] = _high(codes[j]) * scale


@no_type_check
@njit(**_OPTIONS)
def unpack_int8(codes, scales, out):
    """Fill ``out [o, k]`` with the weight in float32."""
    size = codes.shape[1] // scales.shape[1]
    for o in range(codes.shape[0]):
        row, to = codes[o], out[o]
        for g in range(scales.shape[1]):
            part = slice(g * size, (g + 1) * size)
            _scale_int8(row[part], _widened(scales[o, g]), to[part])


@no_type_check
@njit(**_OPTIONS)
def unpack_int4(codes, scales, out):
    """Fill ``out [o, k]`` with the weight in float32."""
    size = codes.shape[1] // scales.shape[1]
    for o in range(codes.shape[0]):
        row, to = codes[o], out[o]
        for g in range(scales.shape[1]):
            held = row[g * size : (g + 1) * size]
            _scale_int4(held, _widened(scales[o, g]), to[2 * g * size : 2 * (g + 1) * size])


PRODUCT = {"int8": product_int8, "int4": product_int4}
UNPACK = {"int8": unpack_int8, "int4": unpack_int4}
