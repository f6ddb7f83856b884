"""Products of many tokens at once: sums stay in vector registers, with a token in each lane.

Numba's loops become vectors along one row, whose sum then has to be put together lane by lane: with
rows of a few hundred numbers that takes as long as the products. So this kernel is written in
LLVM's terms: some rows of weights meet two vectors of tokens, column by column, which is how BLAS
libraries do it (Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication").
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_IS_WIDE = get_host_cpu_features().get("avx512f", False)
LANES, ROWS = (16, 8) if _IS_WIDE else (8, 6)
"""Tokens of a vector, and rows of weights whose sums with a panel's fit into the registers."""
LINE, AHEAD = 64, 256
"""Bytes of a line of the cache, and how many lines before it is needed one is asked for."""
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
        number, vector = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
        splat = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        nothing = ir.Constant(vector, ir.Undefined)

        def index(value):
            return ir.Constant(n.type, value)

        def place(array, begin, i, v):  # where the vector v of row i begins
            offset = builder.mul(builder.add(begin, i), index(PANEL))
            offset = builder.add(offset, index(v * LANES))
            return builder.bitcast(builder.gep(array.data, [offset]), vector.as_pointer())

        def weight(start, s):  # in all lanes
            value = builder.load(builder.gep(start, [s]))
            if signature.args[0].dtype == types.uint16:  # the upper half of a float32
                wide = builder.zext(value, ir.IntType(32))
                value = builder.bitcast(builder.shl(wide, ir.Constant(wide.type, 16)), number)
            first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, nothing, splat)

        last = builder.sub(n, index(1))
        at = []
        for i in range(ROWS):
            here = builder.add(row, index(i))
            at.append(builder.select(builder.icmp_signed("<", here, last), here, last))
        starts = [builder.gep(w.data, [builder.mul(i, k)]) for i in at]
        x_begin, out_begin = builder.mul(panel, k), builder.mul(panel, n)
        zeros = ir.Constant(vector, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(2)] for _ in at]
        ahead = builder.mul(builder.mul(builder.add(row, index(2 * ROWS)), k), w.itemsize)
        with cgutils.for_range(builder, k) as loop:
            # Rows of the next tile, which lie one after the other, a little with each column.
            byte = builder.mul(loop.index, builder.mul(w.itemsize, index(ROWS)))
            _begin_to_read(builder, w, builder.add(ahead, byte))
            tokens = [builder.load(place(x, x_begin, loop.index, v)) for v in range(2)]
            for each in tokens:
                each.align = 4
            for start, own in zip(starts, sums, strict=True):
                factor = weight(start, loop.index)
                for total, token in zip(own, tokens, strict=True):
                    made = builder.fmul(factor, token, flags=["contract"])
                    builder.store(
                        builder.fadd(made, builder.load(total), flags=["contract"]), total
                    )
        for i, own in zip(at, sums, strict=True):
            for v, total in enumerate(own):
                builder.store(builder.load(total), place(out, out_begin, i, v)).align = 4
        return context.get_dummy_value()

    return signature, code


def _begin_to_read(builder, array, byte):
    """Ask for the line of the cache that a byte of an array lies in."""
    pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    place = builder.gep(builder.bitcast(array.data, pointer), [byte])
    # Of data, to read, into the second cache: few lines can be on their way into the first, and a
    # core that has asked for as many waits.
    builder.call(fetch, [place, flag(0), flag(2), flag(1)])


def _fetch(_typing, weights, row, line, lines):
    """Begin to read so many lines of the cache, from number `line` of ``weights[row:]`` on.

    Processors foresee what is read next within a page of memory, and few rows fill one. Some dozens
    of lines can be on their way at a time, so a few are asked for between products. Rows may be
    missing.
    """

    def code(context, builder, signature, arguments):
        array, size = signature.args[0], arguments[1].type
        w = context.make_array(array)(context, builder, arguments[0])
        bytes_of_row = builder.mul(builder.extract_value(w.shape, 1), w.itemsize)
        start = builder.mul(arguments[1], bytes_of_row)
        with cgutils.for_range(builder, arguments[3]) as loop:
            line = builder.mul(builder.add(arguments[2], loop.index), ir.Constant(size, LINE))
            _begin_to_read(builder, w, builder.add(start, line))
        return context.get_dummy_value()

    return types.void(weights, types.intp, types.intp, types.intp), code


tile: Any = intrinsic(_tile)
fetch: Any = intrinsic(_fetch)
