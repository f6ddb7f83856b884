"""Compiled CPU kernels for int8 and int4 codes; `llama4_lab.packed` chooses between them.

A code is one byte to read where a float32 is four, so few tokens' products are made of the codes
as they are: a vector of them becomes numbers in registers and meets the tokens there, and what a
group's products add up to is scaled once. Scales come as the 16 bits of a bfloat16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

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
    vector,
    vector_at,
    wide,
    widened,
)

ROWS = 4
"""Rows of codes whose products are made at a time."""
_BYTE = ir.IntType(8)


class _Codes:
    """Codes ``[rows, bytes]`` with scales ``[rows, groups]``, as LLVM's code reads them."""

    def __init__(self, builder, codes, scales, is_int4: bool):
        self.builder, self.codes, self.scales, self.is_int4 = builder, codes, scales, is_int4
        self.num_rows, self.bytes = cgutils.unpack_tuple(builder, codes.shape)
        self.groups = builder.extract_value(scales.shape, 1)
        self.size = builder.sdiv(self.bytes, self.groups)  # bytes of a group
        self.vectors_of_group = builder.sdiv(self.size, self.index(LANES))
        self.whole = builder.mul(self.vectors_of_group, self.index(LANES))

    def index(self, value: int) -> ir.Constant:
        return ir.Constant(self.bytes.type, value)

    def row(self, i) -> tuple:
        """Return where a row of codes and its scales begin."""
        codes = self.builder.gep(self.codes.data, [self.builder.mul(i, self.bytes)])
        return codes, self.builder.gep(self.scales.data, [self.builder.mul(i, self.groups)])

    def scale(self, row, group):
        return widened(self.builder, self.builder.load(self.builder.gep(row[1], [group])))

    def columns(self, group, byte) -> list:
        """Return where the numbers of a group's byte stand: in int4 the second half is above."""
        before = self.builder.mul(group, self.size)
        first = self.builder.add(before, byte)
        if not self.is_int4:
            return [first]
        first = self.builder.add(first, before)
        return [first, self.builder.add(first, self.size)]

    def vectors(self, row, group, byte) -> list:
        """Return the numbers of `LANES` bytes, unscaled: a vector for each of their `columns`."""
        at = self.builder.add(self.builder.mul(group, self.size), byte)
        held = self.builder.load(vector_at(self.builder, row[0], at, _BYTE))
        held.align = 1
        return self._numbers(held, vector(WHOLE), vector(NUMBER), lambda value: [value] * LANES)

    def numbers(self, row, group, byte) -> list:
        """Return the numbers of one byte, unscaled."""
        at = self.builder.add(self.builder.mul(group, self.size), byte)
        held = self.builder.load(self.builder.gep(row[0], [at]))
        return self._numbers(held, WHOLE, NUMBER, lambda value: value)

    def _numbers(self, held, whole, number, lanes) -> list:
        if not self.is_int4:
            return [self.builder.sitofp(self.builder.sext(held, whole), number)]
        held, zero = self.builder.zext(held, whole), whole(lanes(8))
        low = self.builder.and_(held, whole(lanes(15)))
        high = self.builder.lshr(held, whole(lanes(4)))
        return [self.builder.sitofp(self.builder.sub(each, zero), number) for each in (low, high)]


def _dots(tokens: int) -> Callable[..., Any]:
    def dots(_typing, codes, scales, row, x, first, sums):
        """Set ``sums[t, r] = x[first + t] @ weight[row + r]`` for `ROWS` rows and some tokens.

        ``x [m, k]`` and ``sums [tokens, ROWS]`` are contiguous. The last row stands in for those
        that are missing, and so does the last token.
        """
        signature = types.void(codes, scales, types.intp, x, types.intp, sums)

        def code(context, builder, signature, arguments):
            w, scales, x, sums = (
                context.make_array(signature.args[i])(context, builder, arguments[i])
                for i in (0, 1, 3, 5)
            )
            held = _Codes(builder, w, scales, signature.args[0].dtype == types.uint8)
            m, k = cgutils.unpack_tuple(builder, x.shape)

            def following(start, count, last):
                last = builder.sub(last, held.index(1))
                return [
                    at_most(builder, builder.add(start, held.index(i)), last) for i in range(count)
                ]

            def places():
                return [[cgutils.alloca_once_value(builder, zeros) for _ in at] for _ in rows]

            rows = [held.row(i) for i in following(arguments[2], ROWS, held.num_rows)]
            at = [
                builder.gep(x.data, [builder.mul(i, k)]) for i in following(arguments[4], tokens, m)
            ]
            zeros = ir.Constant(vector(NUMBER), [0.0] * LANES)
            totals, parts = places(), places()
            # What no vector holds is added up here, in memory: registers are for the vectors.
            rests = [
                [builder.gep(sums.data, [held.index(t * ROWS + i)]) for t in range(tokens)]
                for i in range(ROWS)
            ]
            for rest in (rest for own in rests for rest in own):
                builder.store(NUMBER(0.0), rest)
            ahead = builder.add(builder.mul(arguments[2], held.bytes), held.index(AHEAD * LINE))
            with cgutils.for_range(builder, held.groups) as loop:
                group = loop.index
                for part in (part for own in parts for part in own):
                    builder.store(zeros, part)
                with cgutils.for_range(builder, held.vectors_of_group) as inner:
                    byte = builder.mul(inner.index, held.index(LANES))
                    # Of the rows to come, which lie one after the other, as much as is used here.
                    done = builder.add(builder.mul(group, held.size), byte)
                    begin_to_read(
                        builder, w, builder.add(ahead, builder.mul(done, held.index(ROWS)))
                    )
                    columns = held.columns(group, byte)
                    ys = [[vector_at(builder, y, i, NUMBER) for i in columns] for y in at]
                    ys = [[builder.load(y) for y in own] for own in ys]
                    for y in (y for own in ys for y in own):
                        y.align = 4
                    for row, own in zip(rows, parts, strict=True):
                        for half, number in enumerate(held.vectors(row, group, byte)):
                            for y, part in zip(ys, own, strict=True):
                                add_product(builder, number, y[half], part)
                left = held.whole, held.size, held.index(1)  # bytes of the group
                with cgutils.for_range_slice(builder, *left) as (byte, _):
                    columns = held.columns(group, byte)
                    for row, own in zip(rows, rests, strict=True):
                        scale = held.scale(row, group)
                        for i, number in zip(columns, held.numbers(row, group, byte), strict=True):
                            number = builder.fmul(number, scale)
                            for y, rest in zip(at, own, strict=True):
                                y = builder.load(builder.gep(y, [i]))
                                add_product(builder, number, y, rest)
                for row, *grids in zip(rows, parts, totals, strict=True):
                    scale = in_all_lanes(builder, held.scale(row, group))
                    for part, total in zip(*grids, strict=True):
                        add_product(builder, scale, builder.load(part), total)
            reduce = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(NUMBER, [NUMBER, vector(NUMBER)]),
                f"llvm.vector.reduce.fadd.v{LANES}f32",
            )
            for grids in zip(totals, rests, strict=True):
                for total, rest in zip(*grids, strict=True):
                    given = [builder.load(rest), builder.load(total)]
                    builder.store(builder.call(reduce, given, fastmath=["reassoc"]), rest)
            return context.get_dummy_value()

        return signature, code

    return dots


def _unpack(_typing, codes, scales, row, out):
    """Set ``out[row]`` to the weight's row, in float32."""
    signature = types.void(codes, scales, types.intp, out)

    def code(context, builder, signature, arguments):
        w, scales, out = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 3)
        )
        held = _Codes(builder, w, scales, signature.args[0].dtype == types.uint8)
        row = held.row(arguments[2])
        begin = builder.mul(arguments[2], builder.extract_value(out.shape, 1))
        with cgutils.for_range(builder, held.groups) as loop:
            scale = held.scale(row, loop.index)
            spread = in_all_lanes(builder, scale)

            def put(start, end, step, read, factor, place):
                with cgutils.for_range_slice(builder, start, end, held.index(step)) as (byte, _):
                    numbers = read(row, loop.index, byte)
                    for i, number in zip(held.columns(loop.index, byte), numbers, strict=True):
                        to = place(builder.add(begin, i))
                        builder.store(builder.fmul(number, factor), to).align = 4

            def vector_place(i):
                return vector_at(builder, out.data, i, NUMBER)

            def place(i):
                return builder.gep(out.data, [i])

            put(held.index(0), held.whole, LANES, held.vectors, spread, vector_place)
            put(held.whole, held.size, 1, held.numbers, scale, place)
        return context.get_dummy_value()

    return signature, code


_one, _two, _four = (in_llvm(_dots(tokens)) for tokens in (1, 2, 4))
_MOST = 4 if LANES == 16 else 2  # tokens whose sums with all rows fit into the registers
_unpack_row: Any = in_llvm(_unpack)


# Freed to reorder, LLVM adds up a byte's two halves first, and takes two instructions for one.
@no_type_check
@partial(compiled, fastmath=False)
def product(x, codes, scales, out, begin, end):
    """Set ``out [m, o]`` at the outputs from begin to end to ``x [m, k]`` times the weight."""
    wide()
    m, sums = len(x), np.empty((4, ROWS), np.float32)
    for row in range(begin, end, ROWS):
        i = 0
        while i < m:
            tokens = min(_MOST, m - i)
            if tokens > 2:
                _four(codes, scales, row, x, i, sums)
            elif tokens == 2:
                _two(codes, scales, row, x, i, sums)
            else:
                _one(codes, scales, row, x, i, sums)
            for t in range(tokens):
                for r in range(min(ROWS, end - row)):
                    out[i + t, row + r] = sums[t, r]
            i += tokens


@no_type_check
@compiled
def unpack(codes, scales, out):
    """Fill ``out [o, k]`` with the weight in float32."""
    wide()
    for row in range(len(out)):
        _unpack_row(codes, scales, row, out)
