"""Products of many tokens at once: sums stay in vector registers, with a token in each lane.

Numba's loops become vectors along one row, whose sum then has to be put together lane by lane: with
rows of a few hundred numbers that takes as long as the products. So this kernel is written in
LLVM's terms: some rows of weights meet two vectors of tokens, column by column, which is how BLAS
libraries do it (Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication").
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from llama4_lab.compiled import (
    LANES,
    NUMBER,
    add_product,
    at_most,
    begin_to_read,
    compiled,
    in_all_lanes,
    in_llvm,
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

    ``x [p, k, PANEL]`` and ``out [p, n, PANEL]`` are contiguous, and each row of ``weights [n, k]``
    is; weights may be bfloat16 as its 16 bits. The last row stands in for those that are missing.
    """
    signature = types.void(weights, types.intp, x, types.intp, out)

    def code(context, builder, signature, arguments):
        w, x, out = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2, 4)
        )
        row, panel = arguments[1], arguments[3]
        n, k = cgutils.unpack_tuple(builder, w.shape)
        apart = builder.sdiv(cgutils.unpack_tuple(builder, w.strides)[0], w.itemsize)

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
        starts = [builder.gep(w.data, [builder.mul(i, apart)]) for i in at]
        x_begin, out_begin = builder.mul(panel, k), builder.mul(panel, n)
        zeros = ir.Constant(vector(NUMBER), [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(2)] for _ in at]
        ahead = builder.mul(builder.mul(builder.add(row, index(2 * ROWS)), apart), w.itemsize)
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


tile: Any = in_llvm(_tile)


@compiled
def panels(weights, x, out):
    """Set ``out[p] = weights @ x[p]`` for each panel p; what is contiguous, `tile` says."""
    for row in range(0, len(weights), ROWS):
        for p in range(len(x)):
            tile(weights, row, x, p, out)
