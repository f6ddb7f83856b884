"""The Triton kernels behind `llama4_lab.experts.triton`, which says how they fit together.

Letters as everywhere: K inputs of a product, E experts, D the model's width, WIDTH an expert's.
`codes` and `scales` are a weight's rows as `llama4_lab.packed` has them; KIND is ``plain`` for
rows of numbers, and GROUP then only how many are read at a time. Products are summed in float32.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingImports=false
# (triton is not in every environment, and its decorators hide what they return)

from typing import no_type_check  # annotations here tell Triton what to compile in

import triton
import triton.language as tl

# ---- parts


@triton.jit
@no_type_check
def row_dot(
    x, gain, codes, scales, row, row_ok, K, HAS_GAIN: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return Σ x[k]·gain[k]·w[row, k] for a block of rows, and Σ x[k]² (for a norm)."""
    acc = tl.zeros(row.shape, tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    count = tl.cdiv(K, GROUP)
    for first in range(0, count, GROUPS):
        group = first + tl.arange(0, GROUPS)
        if KIND == "int4":
            HALF: tl.constexpr = GROUP // 2
            j = tl.arange(0, HALF)[None, :]
            ok = (group < count)[:, None] & (j < HALF)
            low = group[:, None] * GROUP + j
            x_low, s_low = gained(x, gain, low, ok, HAS_GAIN)
            x_high, s_high = gained(x, gain, low + HALF, ok, HAS_GAIN)
            at = row[:, None, None] * (K // 2) + (group[:, None] * HALF + j)[None]
            byte = tl.load(codes + at, mask=row_ok[:, None, None] & ok[None], other=0)
            both = (byte & 15).to(tl.float32) * x_low[None] + (byte >> 4).to(tl.float32) * x_high[
                None
            ]
            part = tl.sum(both, 2) - 8.0 * tl.sum(x_low + x_high, 1)[None]  # nibbles are code + 8
            squares += s_low + s_high
        else:
            k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            values, square = gained(x, gain, k, k < K, HAS_GAIN)
            at = row[:, None, None] * K + k[None]
            w = tl.load(codes + at, mask=row_ok[:, None, None] & (k < K)[None], other=0.0)
            part = tl.sum(w.to(tl.float32) * values[None], 2)
            squares += square
        if KIND == "int4" or KIND == "int8":
            at = row[:, None] * count + group[None]
            ok = row_ok[:, None] & (group < count)[None]
            part *= tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
        acc += tl.sum(part, 1)
    if KIND == "fp8":
        acc *= tl.load(scales + row, mask=row_ok, other=0.0)
    return acc, tl.sum(squares, 0)


@triton.jit
@no_type_check
def gained(x, gain, k, ok, HAS_GAIN: tl.constexpr):
    value = tl.load(x + k, mask=ok, other=0.0).to(tl.float32)
    square = tl.sum(value * value, 1)
    if HAS_GAIN:
        value *= tl.load(gain + k, mask=ok, other=0.0).to(tl.float32)
    return value, square


@triton.jit
@no_type_check
def tile_dot(
    x, at, at_ok, codes, scales, row, row_ok, K, KIND: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Return x[at] @ w[row].T, where `at` is a tile of rows of x and `row` one of w's."""
    acc = tl.zeros([at.shape[0], row.shape[0]], tl.float32)
    count = tl.cdiv(K, GROUP)
    for group in range(0, count):
        if KIND == "int4":
            HALF: tl.constexpr = GROUP // 2
            j = tl.arange(0, HALF)[None, :]
            low = at[:, None] * K + group * GROUP + j
            x_low = tl.load(x + low, mask=at_ok[:, None], other=0.0)
            x_high = tl.load(x + low + HALF, mask=at_ok[:, None], other=0.0)
            where = row[:, None] * (K // 2) + group * HALF + j
            byte = tl.load(codes + where, mask=row_ok[:, None], other=0)
            if x_low.dtype == tl.bfloat16:
                w_low, w_high = nibbles(byte)
            else:
                w_low = ((byte & 15).to(tl.int8) - 8).to(x_low.dtype)
                w_high = ((byte >> 4).to(tl.int8) - 8).to(x_low.dtype)
            part = tl.dot(x_low, tl.trans(w_low), input_precision="ieee")
            part = tl.dot(x_high, tl.trans(w_high), part, input_precision="ieee")
        else:
            k = group * GROUP + tl.arange(0, GROUP)[None, :]
            value = tl.load(x + at[:, None] * K + k, mask=at_ok[:, None] & (k < K), other=0.0)
            w = tl.load(codes + row[:, None] * K + k, mask=row_ok[:, None] & (k < K), other=0.0)
            part = tl.dot(value, tl.trans(w.to(value.dtype)), input_precision="ieee")
        if KIND == "int4" or KIND == "int8":
            scale = tl.load(scales + row * count + group, mask=row_ok, other=0.0)
            part *= scale.to(tl.float32)[None, :]
        acc += part
    if KIND == "fp8":
        acc *= tl.load(scales + row, mask=row_ok, other=0.0)[None, :]
    return acc


@triton.jit
@no_type_check
def nibbles(byte):
    """Return the codes in the bytes' low and high halves in bfloat16, four bytes at a time.

    The last bits of 128.0 in bfloat16 count ones: with a nibble there it is 136 + code. Converting
    each nibble takes more instructions than a GPU has time for while it reads the next.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, off;
        mov.b32 off, 0xC308C308;                      // -136, twice
        prmt.b32 a, $4, 0, 0x4140;                    // bytes 0 and 1, each in a half word
        prmt.b32 b, $4, 0, 0x4342;                    // bytes 2 and 3
        shr.b32 c, a, 4;
        shr.b32 d, b, 4;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;  // (a & nibbles) | 128.0
        lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        add.rn.bf16x2 $0, a, off;
        add.rn.bf16x2 $1, b, off;
        add.rn.bf16x2 $2, c, off;
        add.rn.bf16x2 $3, d, off;
        }
        """,
        "=r,=r,=r,=r,r",
        [byte],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
@no_type_check
def choose(logits, choice, E, TOPK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the expert and score of a token's choice; choice TOPK is the shared expert, e."""
    idx = tl.arange(0, BLOCK_E)
    stored = tl.load(logits + idx, mask=idx < E, other=float("-inf"))
    left = stored.to(tl.float32)
    expert, score = E, 1.0
    for i in tl.static_range(TOPK):
        best = tl.argmax(left, 0)
        top = 1.0 / (1.0 + tl.exp(-tl.max(left, 0)))
        expert = tl.where(choice == i, best, expert)
        score = tl.where(choice == i, top.to(stored.dtype).to(tl.float32), score)
        left = tl.where(idx == best, float("-inf"), left)
    return expert.to(tl.int64), score


@triton.jit
@no_type_check
def find_tile(offsets, tile, E, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the expert of a tile of sorted slots, the tile's first slot, and the expert's end.

    An expert owns as many tiles as cover its slots; a tile past the last one gets expert E.
    """
    idx = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets + idx, mask=idx < E, other=0)
    end = tl.load(offsets + idx + 1, mask=idx < E, other=0)
    tiles = (end - begin + TILE - 1) // TILE
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum(((ends <= tile) & (idx < E)).to(tl.int32), 0)
    own = idx == expert
    inside = tile - tl.sum(tl.where(own, ends - tiles, 0), 0)
    first = tl.sum(tl.where(own, begin, 0), 0) + inside * TILE
    return expert, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
@no_type_check
def silu(x):
    return x / (1.0 + tl.exp(-x))


# ---- rows


@triton.jit
@no_type_check
def linear_rows(
    x, gain, codes, scales, residual, out, K, OUT, eps, HAS_GAIN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < OUT
    y, squares = row_dot(
        x + token * K, gain, codes, scales, row, ok, K, HAS_GAIN, KIND, GROUP, GROUPS
    )
    if HAS_GAIN:
        y *= tl.rsqrt(squares / K + eps)
    if HAS_RESIDUAL:
        y += tl.load(residual + token * OUT + row, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * OUT + row, y, mask=ok)


@triton.jit
@no_type_check
def gate_up_rows(
    x, gain, logits, codes, scales, hidden, K, WIDTH, E, eps, HAS_GAIN: tl.constexpr,
    TOPK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    token = slot // (TOPK + 1)
    expert, score = choose(logits + token * E, slot % (TOPK + 1), E, TOPK, BLOCK_E)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < WIDTH
    gate_row = expert * 2 * WIDTH + row
    up_row = gate_row + WIDTH
    x += token * K
    gate, squares = row_dot(x, gain, codes, scales, gate_row, ok, K, HAS_GAIN, KIND, GROUP, GROUPS)
    up, _ = row_dot(x, gain, codes, scales, up_row, ok, K, HAS_GAIN, KIND, GROUP, GROUPS)
    if HAS_GAIN:
        score *= tl.rsqrt(squares / K + eps)
    y = silu(gate * score) * (up * score)
    tl.store(hidden + slot * WIDTH + row, y, mask=ok)


@triton.jit
@no_type_check
def down_rows(
    hidden, logits, codes, scales, residual, out, WIDTH, D, E, HAS_RESIDUAL: tl.constexpr,
    TOPK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < D
    y = tl.zeros([ROWS], tl.float32)
    for choice in range(TOPK + 1):
        expert, _ = choose(logits + token * E, choice, E, TOPK, BLOCK_E)
        x = hidden + (token * (TOPK + 1) + choice) * WIDTH
        part, _ = row_dot(
            x, x, codes, scales, expert * D + row, ok, WIDTH, False, KIND, GROUP, GROUPS
        )
        y += part
    if HAS_RESIDUAL:
        y += tl.load(residual + token * D + row, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * D + row, y, mask=ok)


# ---- tiles


@triton.jit
@no_type_check
def linear_tiles(
    x, codes, scales, residual, out, N, K, OUT, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    y = tile_dot(x, token, token < N, codes, scales, row, row < OUT, K, KIND, GROUP)
    at = token[:, None] * OUT + row[None, :]
    ok = (token < N)[:, None] & (row < OUT)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=ok)


@triton.jit
@no_type_check
def gate_up_tiles(
    x, order, offsets, score, codes, scales, hidden, K, WIDTH, E, per_token,
    KIND: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, column = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8
    )
    expert, first, end = find_tile(offsets, tile, E, TILE, BLOCK_E)
    if expert < E:
        place = first.to(tl.int64) + tl.arange(0, TILE)
        ok = place < end
        slot = tl.load(order + place, mask=ok, other=0).to(tl.int64)
        row = column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        row_ok = row < WIDTH
        gate_row = expert.to(tl.int64) * 2 * WIDTH + row
        up_row = gate_row + WIDTH
        token = slot // per_token
        gate = tile_dot(x, token, ok, codes, scales, gate_row, row_ok, K, KIND, GROUP)
        up = tile_dot(x, token, ok, codes, scales, up_row, row_ok, K, KIND, GROUP)
        factor = tl.load(score + slot, mask=ok, other=0.0).to(tl.float32)[:, None]
        y = silu(gate * factor) * (up * factor)
        at = place[:, None] * WIDTH + row[None, :]
        tl.store(hidden + at, y, mask=ok[:, None] & row_ok[None, :])


@triton.jit
@no_type_check
def down_tiles(
    hidden, order, offsets, codes, scales, out, WIDTH, D, E, KIND: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, column = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8
    )
    expert, first, end = find_tile(offsets, tile, E, TILE, BLOCK_E)
    if expert < E:
        place = first.to(tl.int64) + tl.arange(0, TILE)
        ok = place < end
        row = column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        w_row = expert.to(tl.int64) * D + row
        y = tile_dot(hidden, place, ok, codes, scales, w_row, row < D, WIDTH, KIND, GROUP)
        slot = tl.load(order + place, mask=ok, other=0).to(tl.int64)
        at = slot[:, None] * D + row[None, :]
        tl.store(out + at, y, mask=ok[:, None] & (row < D)[None, :])


@triton.jit
@no_type_check
def sort_logits(
    logits, order, offsets, score, M, E, TOPK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Counting sort of all slots in one program: histogram, scan, scatter; experts 0 … e."""
    slot = tl.arange(0, BLOCK_M)
    idx = tl.arange(0, BLOCK_E)
    ok = slot < M
    token, choice = slot // (TOPK + 1), slot % (TOPK + 1)
    at = token[:, None] * E + idx[None, :]
    stored = tl.load(logits + at, mask=ok[:, None] & (idx < E)[None, :], other=float("-inf"))
    left = stored.to(tl.float32)
    expert = tl.full([BLOCK_M], E, tl.int32)
    sigmoid = tl.full([BLOCK_M], 1.0, tl.float32)
    for i in tl.static_range(TOPK):
        best = tl.argmax(left, 1)
        top = 1.0 / (1.0 + tl.exp(-tl.max(left, 1)))
        expert = tl.where(choice == i, best, expert)
        sigmoid = tl.where(choice == i, top, sigmoid)
        left = tl.where(idx[None, :] == best[:, None], float("-inf"), left)
    tl.store(score + slot, sigmoid, mask=ok)
    hit = ((expert[:, None] == idx[None, :]) & ok[:, None]).to(tl.int32)
    load = tl.sum(hit, 0)
    begin = tl.cumsum(load, 0) - load
    rank = tl.cumsum(hit, 0) - hit
    place = tl.sum(hit * (begin[None, :] + rank), 1)
    tl.store(order + place, slot, mask=ok)
    tl.store(offsets + idx, begin, mask=idx <= E)
    tl.store(offsets + E + 1, M)
