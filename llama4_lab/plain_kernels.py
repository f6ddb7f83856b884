"""Compiled CPU kernels for plain weights, float32 or bfloat16, and few tokens.

Some rows of weights meet one or two tokens along their columns. That takes as long as weights come
from memory, and it matters where in memory the rows lie and what is asked for meanwhile, which
loops of numba's cannot do steadily: `meet` is written in LLVM's terms.
"""

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from llama4_lab.compiled import (
    AHEAD,
    LANES,
    LINE,
    NUMBER,
    add_product,
    begin_to_read,
    compiled,
    in_llvm,
    sum_of_lanes,
    vector,
    vector_at,
    wide,
    widened,
)

SET, ADD, TIMES = 0, 1, 2
"""What a product does to its output."""
ONE = np.zeros(1, np.int64)
"""The rows of a single token."""
PRODUCTS_A_READ = 8
"""Products that are made while a weight comes from memory."""


def _meet(_typing, weights, rows, x, tokens, line, lines):
    """Return ``weights[rows] @ x[tokens]``, the sums of the first token first.

    ``weights [n, k]``, which may be bfloat16, and ``x [m, k]`` are contiguous; rows and tokens are
    tuples. With each `LANES` columns, `lines` of the cache are asked for, from number `line` of
    ``weights[rows[0]:]`` on; rows may be missing there.
    """
    pairs = len(tokens) * len(rows)
    signature = types.UniTuple(types.float32, pairs)(weights, rows, x, tokens, line, lines)

    def code(context, builder, signature, arguments):
        w, x = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2)
        )
        is_half = signature.args[0].dtype == types.uint16
        kind, size = (ir.IntType(16), 2) if is_half else (NUMBER, 4)
        k = builder.extract_value(w.shape, 1)

        def index(value):
            return ir.Constant(k.type, value)

        def begins(array, tuple_of_rows):
            rows = cgutils.unpack_tuple(builder, tuple_of_rows)
            return [builder.gep(array.data, [builder.mul(row, k)]) for row in rows]

        def numbers(array_data, i, of, align, is_vector):
            place = (
                vector_at(builder, array_data, i, of) if is_vector else builder.gep(array_data, [i])
            )
            value = builder.load(place)
            value.align = align
            return widened(builder, value) if of != NUMBER else value

        def add_products(i, sums, is_vector):
            tokens = [numbers(each, i, NUMBER, 4, is_vector) for each in x_begin]
            for j, each in enumerate(w_begin):
                factor = numbers(each, i, kind, size, is_vector)
                for t, token in enumerate(tokens):
                    add_product(builder, factor, token, sums[t * len(w_begin) + j])

        w_begin, x_begin = begins(w, arguments[1]), begins(x, arguments[3])
        zeros = vector(NUMBER)([0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(pairs)]
        rest = [cgutils.alloca_once_value(builder, NUMBER(0.0)) for _ in range(pairs)]
        first = builder.mul(cgutils.unpack_tuple(builder, arguments[1])[0], k)
        first = builder.add(builder.mul(first, w.itemsize), builder.mul(arguments[4], index(LINE)))
        byte = cgutils.alloca_once_value(builder, first)
        whole = builder.mul(builder.sdiv(k, index(LANES)), index(LANES))
        with cgutils.for_range_slice(builder, index(0), whole, index(LANES)) as (s, _):
            with cgutils.for_range(builder, arguments[5]):
                begin_to_read(builder, w, builder.load(byte))
                builder.store(builder.add(builder.load(byte), index(LINE)), byte)
            add_products(s, sums, is_vector=True)
        with cgutils.for_range_slice(builder, whole, k, index(1)) as (s, _):
            add_products(s, rest, is_vector=False)
        totals = [
            sum_of_lanes(builder, builder.load(last), builder.load(total))
            for last, total in zip(rest, sums, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, totals)

    return signature, code


meet: Any = in_llvm(_meet)


@partial(compiled, forceinline=True)
def store(out, i, j, sums, how):
    """Put sums into a row's places j; where places coincide, so do sums, and all are read first."""
    a, b, c, d = sums
    if how == ADD:
        a, b, c, d = a + out[i, j[0]], b + out[i, j[1]], c + out[i, j[2]], d + out[i, j[3]]
    elif how == TIMES:
        a, b, c, d = a * out[i, j[0]], b * out[i, j[1]], c * out[i, j[2]], d * out[i, j[3]]
    out[i, j[0]], out[i, j[1]], out[i, j[2]], out[i, j[3]] = a, b, c, d


@compiled
def product(weights, x, read, out, write, how):
    """Set, add to or multiply ``out[write[i]]`` by ``weights @ x[read[i]]``.

    Four rows of weights meet two tokens at a time. Of one or two tokens in all, the time is that of
    reading weights, and memory is faster at four places at a time, each of which the processor
    foresees. Of more, rows lie beside each other, are read once for all tokens, and asked for long
    before, steadily: few lines can be on their way at a time. Rows are indexed, not sliced, because
    views are counted, in atomic operations.
    """
    wide()
    n, k = weights.shape
    m, groups = len(read), (n + 3) // 4
    is_apart = m <= 2
    step = groups if is_apart else 1
    all_lines = 0 if is_apart else 4 * LANES * weights.itemsize // LINE  # of LANES columns
    lines = -(-all_lines // ((m + 1) // 2))
    for group in range(groups):
        a = group if is_apart else 4 * group
        # The first row stands in for those that are missing.
        b, c, d = a + step, a + 2 * step, a + 3 * step
        b, c, d = b if b < n else a, c if c < n else a, d if d < n else a
        asked = 0
        for i in range(0, m - 1, 2):
            line, now = AHEAD + asked * k // LANES, min(lines, all_lines - asked)
            sums = meet(weights, (a, b, c, d), x, (read[i], read[i + 1]), line, now)
            store(out, write[i], (a, b, c, d), sums[:4], how)
            store(out, write[i + 1], (a, b, c, d), sums[4:], how)
            asked += now
        if m % 2:
            line, now = AHEAD + asked * k // LANES, all_lines - asked
            sums = meet(weights, (a, b, c, d), x, (read[m - 1],), line, now)
            store(out, write[m - 1], (a, b, c, d), sums, how)


@compiled
def rows(weights, x, out):
    """Set ``out = weights @ x``."""
    product(weights, x.reshape(1, -1), ONE, out.reshape(1, -1), ONE, SET)
