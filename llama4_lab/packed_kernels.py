"""Compiled CPU kernels for int8 and int4 codes; `llama4_lab.packed` chooses between them.

A code is one byte to read where a float32 is four, but to make a number of it costs more than the
product that it is for. So the inputs become whole numbers, too: of each group that shares a scale,
in steps of its largest over 2**15 or 2**30. Products of whole numbers are added up exactly, two to
an instruction's lane, and scaled once a group: what comes out does not depend on how many are
multiplied at a time, nor by which kernel or thread. Scales come as the 16 bits of a bfloat16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload

from llama4_lab.compiled import (
    AHEAD,
    LANES,
    LINE,
    NUMBER,
    WHOLE,
    add_product,
    at_most,
    begin_to_read,
    compiled,
    in_all_lanes,
    in_llvm,
    lift,
    sum_of_lanes,
    vector,
    wide,
)

ROWS = 4
"""Rows of codes whose products are made at a time."""
_HALVES = 2 * LANES  # numbers of 16 bits in a vector
BYTES = {"int8": _HALVES, "int4": 2 * _HALVES}
"""Bytes of codes that are read at a time; a group has to be whole ones."""
LARGEST_GROUP = 4096
"""Sums of a group this large stay below 2**31 in each lane."""
SMALLEST, LARGEST = 1e-25, 1e30
"""Of a group, what its largest may be: beyond, factors of products leave float32."""
_MOST = 4 if LANES == 16 else 2  # rows of inputs whose sums fit into the registers
_AT_ONCE = 32  # rows of inputs: they stay in the second cache while all codes pass by
_BYTE = ir.VectorType(ir.IntType(8), _HALVES)
_HALF = ir.VectorType(ir.IntType(16), _HALVES)


def _load(builder, start, i, kind: ir.VectorType):
    loaded = builder.load(builder.bitcast(builder.gep(start, [i]), kind.as_pointer()))
    loaded.align = 1
    return loaded


def _codes(builder, start, byte, is_int4: bool) -> list:
    """Return vectors of the codes that begin at a byte, in 16 bits.

    Of nibbles, taken from 16 bits at a time: the low ones at even places, and at odd, then likewise
    the high ones. They stay 8 more than their codes.
    """
    if not is_int4:
        return [builder.sext(_load(builder, start, byte, _BYTE), _HALF)]
    even = _load(builder, start, byte, _HALF)
    four, eight, nibble = (_HALF([value] * _HALVES) for value in (4, 8, 15))
    odd = builder.lshr(even, eight)
    high, last = (builder.lshr(each, four) for each in (even, odd))
    return [*(builder.and_(each, nibble) for each in (even, odd, high)), last]


def _add_pairs(builder, a, b, place):
    """Add ``a * b``, two neighbours to a lane, to what lies in a place: one instruction on x86."""
    a, b = (builder.sext(each, ir.VectorType(WHOLE, _HALVES)) for each in (a, b))
    product = builder.mul(a, b)
    even, odd = (
        builder.shuffle_vector(product, product, vector(WHOLE)(list(range(first, _HALVES, 2))))
        for first in (0, 1)
    )
    total = builder.add(builder.add(even, odd), builder.load(place))
    builder.store(total, place)


def _dots(count: int) -> Callable[..., Any]:
    def dots(_typing, codes, scales, factors, row, numbers, starts, first, sums):
        """Set ``sums[n, r] = numbers[first + n] @ weight[row + r]`` for `ROWS` rows of codes.

        ``numbers [n, k]`` are as `whole_numbers` leaves them, ``factors [count, ROWS, groups]`` say
        what a product is worth, and ``sums [count, ROWS]`` are contiguous. The last row of codes
        stands in for those that are missing.
        """
        signature = types.void(
            codes, scales, factors, types.intp, numbers, starts, types.intp, sums
        )

        def code(context, builder, signature, arguments):
            codes, scales, factors, numbers, starts, sums = (
                context.make_array(signature.args[i])(context, builder, arguments[i])
                for i in (0, 1, 2, 4, 5, 7)
            )
            is_int4 = signature.args[0].dtype == types.uint8
            taken = BYTES["int4" if is_int4 else "int8"]
            num_rows, width = cgutils.unpack_tuple(builder, codes.shape)
            groups = builder.extract_value(factors.shape, 2)
            size = builder.sdiv(width, groups)  # bytes of a group

            def index(value):
                return ir.Constant(width.type, value)

            def begins(array, first, count, stride, last=None):
                """Return where some rows of an array begin that lie one after the other."""
                rows = [builder.add(first, index(i)) for i in range(count)]
                rows = rows if last is None else [at_most(builder, each, last) for each in rows]
                return [builder.gep(array.data, [builder.mul(each, stride)]) for each in rows]

            last = builder.sub(num_rows, index(1))
            rows = begins(codes, arguments[3], ROWS, width, last)
            inputs = begins(numbers, arguments[6], count, builder.extract_value(numbers.shape, 1))
            starts = begins(starts, arguments[6], count, groups)
            factors = begins(factors, index(0), count * ROWS, groups)
            zeros = vector(NUMBER)([0.0] * LANES)
            totals = [cgutils.alloca_once_value(builder, zeros) for _ in factors]
            nothing = vector(WHOLE)([0] * LANES)
            parts = [cgutils.alloca_once(builder, nothing.type) for _ in factors]
            ahead = builder.add(builder.mul(arguments[3], width), index(AHEAD * LINE))
            scales_ahead = builder.mul(builder.add(arguments[3], index(4 * ROWS)), groups)
            with cgutils.for_range(builder, groups) as loop:
                to_come = builder.add(scales_ahead, builder.mul(loop.index, index(ROWS)))
                begin_to_read(builder, scales, builder.mul(to_come, index(2)))
                for i, part in enumerate(parts):
                    begin = nothing
                    if is_int4:
                        start = builder.load(builder.gep(starts[i // ROWS], [loop.index]))
                        begin = builder.insert_element(nothing, start, WHOLE(0))
                    builder.store(begin, part)
                before = builder.mul(loop.index, size)
                vectors = builder.sdiv(size, index(taken))
                with cgutils.for_range(builder, vectors) as inner:
                    byte = builder.add(before, builder.mul(inner.index, index(taken)))
                    # Of the rows to come, which lie one after the other, as much as is used here.
                    to_come = builder.add(ahead, builder.mul(byte, index(ROWS)))
                    for line in range(0, taken * ROWS, LINE):
                        begin_to_read(builder, codes, builder.add(to_come, index(line)))
                    columns = [byte]
                    if is_int4:  # the other half of a group lies as many numbers on as it has bytes
                        low = builder.add(byte, before)
                        halves = low, builder.add(low, size)
                        columns = [builder.add(i, index(j)) for i in halves for j in (0, _HALVES)]
                    xs = [[_load(builder, x, i, _HALF) for i in columns] for x in inputs]
                    for r, held in enumerate(rows):
                        for c, each in enumerate(_codes(builder, held, byte, is_int4)):
                            for n, x in enumerate(xs):
                                _add_pairs(builder, each, x[c], parts[n * ROWS + r])
                for factor, part, total in zip(factors, parts, totals, strict=True):
                    factor = builder.load(builder.gep(factor, [loop.index]))
                    part = builder.sitofp(builder.load(part), vector(NUMBER))
                    add_product(builder, in_all_lanes(builder, factor), part, total)
            for i, total in enumerate(totals):
                total = sum_of_lanes(builder, NUMBER(0.0), builder.load(total))
                builder.store(total, builder.gep(sums.data, [index(i)]))
            return context.get_dummy_value()

        return signature, code

    return dots


_one, _two, _four = (in_llvm(_dots(count)) for count in (1, 2, 4))


@no_type_check
@compiled
def whole_numbers(x, size, is_for_int4, numbers, steps, starts):
    """Make whole numbers of inputs ``x [m, k]``; tell whether there are.

    All x have to be finite, and each group's largest zero or between `SMALLEST` and `LARGEST`.

    ``numbers [n, k]`` have a row for each input, of 16 bits, or two, of which the second holds 15
    further bits; the product with an input is the sum of those with its rows. Groups of `size` have
    steps of their own, ``steps [n, groups]``. For int4, numbers lie as `_codes` takes nibbles, and
    ``starts [n, groups]`` are what sums begin with, because nibbles are 8 more than their codes.
    """
    wide()
    m, k = x.shape
    parts, bits = len(numbers) // m, x.view(np.int32)
    most = 2.0**15 - 1 if parts == 1 else 2.0**30 - 1
    whole = np.empty(size, np.int32)
    placed = np.empty(size, np.int32) if is_for_int4 else whole
    for t in range(m):
        for g in range(k // size):
            begin, end, largest = g * size, (g + 1) * size, 0
            for i in range(begin, end):
                largest = max(largest, bits[t, i] & 0x7FFFFFFF)  # without its sign
            if largest >= 0x7F800000:  # infinite, or no number
                return False
            top = np.float64(np.int32(largest).view(np.float32))
            if top > LARGEST or 0 < top < SMALLEST:
                return False
            each = most / top if top > 0 else 0.0
            for i in range(size):
                whole[i] = np.int32(np.rint(x[t, begin + i] * each))
            if is_for_int4:
                for first in range(0, size, 2 * _HALVES):
                    for i in range(_HALVES):
                        placed[first + i] = whole[first + 2 * i]
                        placed[first + _HALVES + i] = whole[first + 2 * i + 1]
            for part in range(parts):
                row, below = t * parts + part, 15 * (parts - 1 - part)
                kept, total = -1 if part == 0 else 0x7FFF, 0
                for i in range(size):
                    number = np.int32(placed[i] >> below & kept)
                    numbers[row, begin + i] = number
                    total += number
                steps[row, g] = top / most * 2.0**below
                starts[row, g] = -8 * total if is_for_int4 else 0
    return True


@no_type_check
@compiled
def product(numbers, steps, starts, codes, scales, out, begin, end):
    """Set ``out [m, o]`` at the outputs from begin to end to the product with the weight."""
    wide()
    parts, groups = len(numbers) // len(out), scales.shape[1]
    sums, factors = np.empty((4, ROWS), np.float32), np.empty((4, ROWS, groups), np.float32)
    out[:, begin:end] = 0
    for first in range(0, len(numbers), _AT_ONCE):
        for row in range(begin, end, ROWS):
            i, last = first, min(first + _AT_ONCE, len(numbers))
            while i < last:
                count = min(_MOST, last - i)
                count -= count == 3
                for n in range(count):
                    for r in range(ROWS):
                        for g in range(groups):
                            scale = lift(scales[min(row + r, end - 1), g])
                            factors[n, r, g] = scale * steps[i + n, g]
                if count == 4:
                    _four(codes, scales, factors, row, numbers, starts, i, sums)
                elif count == 2:
                    _two(codes, scales, factors, row, numbers, starts, i, sums)
                else:
                    _one(codes, scales, factors, row, numbers, starts, i, sums)
                for n in range(count):
                    for r in range(min(ROWS, end - row)):
                        out[(i + n) // parts, row + r] += sums[n, r]
                i += count


@no_type_check
@partial(compiled, forceinline=True)
def rounded(number):
    """Return the 16 bits of the nearest bfloat16."""
    bits = np.float32(number).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> 16) & 1)
    return np.uint16(np.uint32(np.uint32(bits + odd) + 0x7FFF) >> 16)


def lower(number, array):
    """Return a float32 as an array holds it."""
    raise NotImplementedError("only compiled code calls it")


@overload(lower, inline="always")
def _lower(number, array):
    if array.dtype == numba.uint16:
        return lambda number, array: rounded(number)
    return lambda number, array: number


@no_type_check
@compiled
def unpack(codes, scales, out):
    """Fill ``out [o, k]`` with the weight, in float32 or as the 16 bits of bfloat16."""
    wide()
    groups = scales.shape[1]
    size = codes.shape[1] // groups
    for row in range(len(out)):
        for g in range(groups):
            held, scale = codes[row, g * size : (g + 1) * size], lift(scales[row, g])
            if out.shape[1] > codes.shape[1]:
                to = out[row, 2 * g * size : 2 * (g + 1) * size]
                low, high, eight = to[:size], to[size:], np.float32(8)
                for i in range(size):
                    low[i] = lower(scale * (np.float32(np.uint8(held[i] & 15)) - eight), out)
                    high[i] = lower(scale * (np.float32(np.uint8(held[i] >> 4)) - eight), out)
            else:
                to = out[row, g * size : (g + 1) * size]
                for i in range(size):
                    to[i] = lower(scale * np.float32(held[i]), out)
