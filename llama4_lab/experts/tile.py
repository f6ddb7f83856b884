"""Products of many tokens at once, and of one.

Of many, sums stay in vector registers, with a token in each lane.
Numba's loops become vectors along one row, whose sum then has to be put together lane by lane: with
rows of a few hundred numbers that takes as long as the products. So these kernels are written in
LLVM's terms: some rows of weights meet two vectors of tokens, column by column, which is how BLAS
libraries do it (Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication").

Of few tokens, some rows of weights meet one or two along their columns (`meet`). That takes as long
as weights come from memory, and a caller says where in memory the rows lie and what is asked for
meanwhile, which loops of numba's cannot do steadily.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from llama4_lab.compiled import (
    LANES,
    LINE,
    NUMBER,
    add_product,
    at_most,
    begin_to_read,
    in_all_lanes,
    in_llvm,
    sum_of_lanes,
    vector,
    vector_at,
    widened,
)

ROWS = 8 if LANES == 16 else 6
"""Rows of weights whose sums with a panel's tokens fit into the registers."""
PANEL = 2 * LANES
"""Tokens that lie beside each other: a column of them is read from few lines of the cache."""


def _tile(_typing, weights, row, x, panel, out):
    """Set ``out[panel, row:row + ROWS] = weights[row:row + ROWS] @ x[panel]``.

    ``weights [n, k]``, ``x [p, k, PANEL]`` and ``out [p, n, PANEL]`` are contiguous; weights may be
    bfloat16 as its 16 bits. The last row of weights stands in for those that are missing.
    """
    signature = types.void(weights, types.intp, x, types.intp, out)

    def code(context, builder, signature, arguments):
        w, x, out = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2, 4)
        )
        row, panel = arguments[1], arguments[3]
        n, k = cgutils.unpack_tuple(builder, w.shape)

        def index(value):
            return ir.Constant(n.type, value)

        def place(array, begin, i, v):  # where the vector v of row i begins
            offset = builder.mul(builder.add(begin, i), index(PANEL))
            return vector_at(builder, array.data, builder.add(offset, index(v * LANES)), NUMBER)

        def weight(start, s):  # in all lanes
            value = builder.load(builder.gep(start, [s]))
            is_half = signature.args[0].dtype == types.uint16
            return in_all_lanes(builder, widened(builder, value) if is_half else value)

        last = builder.sub(n, index(1))
        at = [at_most(builder, builder.add(row, index(i)), last) for i in range(ROWS)]
        starts = [builder.gep(w.data, [builder.mul(i, k)]) for i in at]
        x_begin, out_begin = builder.mul(panel, k), builder.mul(panel, n)
        zeros = ir.Constant(vector(NUMBER), [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(2)] for _ in at]
        ahead = builder.mul(builder.mul(builder.add(row, index(2 * ROWS)), k), w.itemsize)
        with cgutils.for_range(builder, k) as loop:
            # Rows of the next tile, which lie one after the other, a little with each column.
            byte = builder.mul(loop.index, builder.mul(w.itemsize, index(ROWS)))
            begin_to_read(builder, w, builder.add(ahead, byte))
            tokens = [builder.load(place(x, x_begin, loop.index, v)) for v in range(2)]
            for each in tokens:
                each.align = 4
            for start, own in zip(starts, sums, strict=True):
                factor = weight(start, loop.index)
                for total, token in zip(own, tokens, strict=True):
                    add_product(builder, factor, token, total)
        for i, own in zip(at, sums, strict=True):
            for v, total in enumerate(own):
                builder.store(builder.load(total), place(out, out_begin, i, v)).align = 4
        return context.get_dummy_value()

    return signature, code


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


tile: Any = in_llvm(_tile)
meet: Any = in_llvm(_meet)
