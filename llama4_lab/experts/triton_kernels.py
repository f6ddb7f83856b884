"""The Triton kernels behind `llama4_lab.experts.triton`, which says how they fit together.

Letters as everywhere: N tokens, K inputs of a product, E experts, D the model's width, WIDTH an
expert's. `codes` and `scales` are a weight's rows as `llama4_lab.packed` has them; KIND is
``plain`` for rows of numbers, and GROUP then only how many are read at a time. Products are summed
in float32. What lies behind the last row or token is read from the last one, and never stored.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingImports=false
# (triton is not in every environment, and its decorators hide what they return)

from typing import no_type_check  # annotations here tell Triton what to compile in

import triton
import triton.language as tl
from triton.language.extra import cuda

# ---- parts


@triton.jit
@no_type_check
def product(
    x, token, codes, scales, row, K, KIND: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Return w[row] @ x[token].T; EVEN says that K is a multiple of SPLIT groups.

    Weights come first, because tensor cores take theirs from registers, where codes are unpacked,
    and can do with few tokens beside them. SPLIT groups are multiplied at a time, each by a warp of
    its own: a program of few rows then has enough warps to hide what each waits for.
    """
    acc = tl.zeros([SPLIT, row.shape[0], token.shape[0]], tl.float32)
    count = tl.cdiv(K, GROUP)
    x += token[None, :, None] * K
    row = row[None, :, None]
    for first in range(0, count, SPLIT):
        group = (first + tl.arange(0, SPLIT))[:, None, None]
        ok = group < count
        if KIND == "int4":
            HALF: tl.constexpr = GROUP // 2
            width = tl.multiple_of(K // 2, 16) if EVEN else K // 2  # so that loads are wide
            j = tl.arange(0, HALF)[None, None, :]
            low, at = x + group * GROUP + j, codes + row * width + group * HALF + j
            if EVEN:
                x_low, x_high, byte = tl.load(low), tl.load(low + HALF), tl.load(at)
            else:
                x_low = tl.load(low, mask=ok, other=0.0)
                x_high = tl.load(low + HALF, mask=ok, other=0.0)
                byte = tl.load(at, mask=ok, other=0)
            w_low, w_high = nibbles(byte, x_low.dtype)
            part = add_dot(w_high, x_high, add_dot(w_low, x_low, tl.zeros_like(acc)))
        else:
            k = group * GROUP + tl.arange(0, GROUP)[None, None, :]
            if EVEN:
                value, w = tl.load(x + k), tl.load(codes + row * K + k)
            else:
                value = tl.load(x + k, mask=k < K, other=0.0)
                w = tl.load(codes + row * K + k, mask=k < K, other=0.0)
            part = add_dot(w.to(value.dtype), value, tl.zeros_like(acc))
        if KIND == "int4" or KIND == "int8":
            at = row * count + group
            part *= tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
        acc += part
    y = tl.sum(acc, 0)
    if KIND == "fp8":
        y *= tl.load(scales + tl.reshape(row, [row.shape[1]]))[:, None]
    return y


@triton.jit
@no_type_check
def add_dot(w, x, acc):
    """Return acc + w @ x.T for each of some pairs of tiles."""
    if w.shape[0] == 1:  # warps share the pair, and 64 rows are multiplied by units of their own
        one = tl.dot(
            tl.reshape(w, [w.shape[1], w.shape[2]]),
            tl.trans(tl.reshape(x, [x.shape[1], x.shape[2]])),
            tl.reshape(acc, [w.shape[1], x.shape[1]]),
            input_precision="ieee",
        )
        done = tl.reshape(one, [1, w.shape[1], x.shape[1]])
    else:
        done = tl.dot(w, tl.permute(x, 0, 2, 1), acc, input_precision="ieee")
    return done


@triton.jit
@no_type_check
def nibbles(byte, DTYPE: tl.constexpr):
    """Return the codes in the bytes' low and high halves.

    To bfloat16 four bytes are turned at a time: the last bits of 128.0 count ones, and with a
    nibble there it is 136 + code. Converting each nibble takes more instructions than a GPU has
    time for while it reads the next.
    """
    if tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, one, off;
            mov.b32 one, 0x3F803F80;                      // 1.0, twice
            mov.b32 off, 0xC308C308;                      // -136.0
            prmt.b32 a, $4, 0, 0x4140;                    // bytes 0 and 1, each in a half word
            prmt.b32 b, $4, 0, 0x4342;                    // bytes 2 and 3
            shr.b32 c, a, 4;
            shr.b32 d, b, 4;
            lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;  // (a & nibbles) | 128.0
            lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, a, one, off;
            fma.rn.bf16x2 $1, b, one, off;
            fma.rn.bf16x2 $2, c, one, off;
            fma.rn.bf16x2 $3, d, one, off;
            }
            """,
            "=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = ((byte & 15).to(tl.int8) - 8).to(DTYPE), ((byte >> 4).to(tl.int8) - 8).to(DTYPE)
    return low, high


@triton.jit
@no_type_check
def gated(y, factor):
    """Return silu(gate · factor) · (up · factor), of a product with gate's rows before up's."""
    both = tl.permute(tl.reshape(y, [2, y.shape[0] // 2, y.shape[1]]), 1, 2, 0)
    gate, up = tl.split(both)
    gate *= factor
    return gate / (1.0 + tl.exp(-gate)) * (up * factor)


@triton.jit
@no_type_check
def gate_and_up(expert, first, WIDTH, ROWS: tl.constexpr):
    """Return the rows that `gated` takes: half of them gate's, from `first`, then as many up's."""
    i = tl.arange(0, ROWS)
    row = tl.minimum(first + i % (ROWS // 2), WIDTH - 1)
    return expert * 2 * WIDTH + row + tl.where(i < ROWS // 2, 0, WIDTH)


@triton.jit
@no_type_check
def inverse_rms(squares, token, K, PARTS, eps, BLOCK: tl.constexpr):
    """Return 1 / √(mean of squares + eps) of each token, from sums over parts of its row."""
    part = tl.arange(0, BLOCK)[None, :]
    sums = tl.load(squares + token[:, None] * PARTS + part, mask=part < PARTS, other=0.0)
    return tl.rsqrt(tl.sum(sums, 1) / K + eps)


@triton.jit
@no_type_check
def choose(logits, own, choice, token, E, TOPK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the expert that token `own` chose, and for each token its choice of it and the score.

    The choice is TOPK and more where a token did not choose the expert. Choice TOPK of `own` is the
    shared expert, number E, which is the choice TOPK of all tokens, with score one.
    """
    idx = tl.arange(0, BLOCK_E)
    left = tl.load(logits + own * E + idx, mask=idx < E, other=float("-inf")).to(tl.float32)
    expert = tl.full([], E, tl.int32)
    for i in tl.static_range(TOPK):
        best = tl.argmax(left, 0)
        expert = tl.where(choice == i, best, expert)
        left = tl.where(idx == best, float("-inf"), left)
    all_of = tl.load(logits + token[:, None] * E + idx, mask=idx < E, other=float("-inf"))
    value = tl.sum(tl.where(idx == expert, all_of.to(tl.float32), 0.0), 1)
    before = (all_of > value[:, None]) | ((all_of == value[:, None]) & (idx < expert))
    rank = tl.sum(before.to(tl.int32), 1)
    score = (1.0 / (1.0 + tl.exp(-value))).to(all_of.dtype).to(tl.float32)
    is_shared = expert == E
    chosen = tl.where(is_shared, True, rank < TOPK)
    rank, score = tl.where(is_shared, TOPK, rank), tl.where(is_shared, 1.0, score)
    return expert.to(tl.int64), chosen, rank, score


@triton.jit
@no_type_check
def visit(logits, N, E, TOPK: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return whether this program works, for which expert, and all tokens' part in it.

    Programs count choices, token after token. Of those that chose the same expert the first works,
    for all. Tokens behind the last one stand for it, and have chosen nothing.
    """
    own, choice = tl.program_id(0) // (TOPK + 1), tl.program_id(0) % (TOPK + 1)
    token = tl.arange(0, TILE)
    here = tl.minimum(token, N - 1)
    expert, chosen, rank, score = choose(logits, own, choice, here, E, TOPK, BLOCK_E)
    chosen &= token < N
    leads = tl.min(tl.where(chosen, token, TILE), 0) == own
    return leads, expert, here, chosen, rank, score


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
def put(
    y, row, token, residual, gain, out, normed, squares, N, OUT, HAS_RESIDUAL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Store y [rows, tokens], and what a norm that follows needs: y · gain, and sums of squares."""
    at = token[None, :] * OUT + row[:, None]
    ok = (token < N)[None, :] & (row < OUT)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + at, y, mask=ok)
    if HAS_GAIN:
        y = tl.where(ok, y.to(tl.float32), 0.0)
        scaled = y * tl.load(gain + row, mask=row < OUT, other=0.0).to(tl.float32)[:, None]
        tl.store(normed + at, scaled, mask=ok)
        part = token * tl.num_programs(0) + tl.program_id(0)
        tl.store(squares + part, tl.sum(y * y, 0), mask=token < N)


@triton.jit
@no_type_check
def turn(OVERLAPS: tl.constexpr):
    """Let the next kernel begin, and wait until what the one before has written is there."""
    if OVERLAPS:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


# ---- few tokens


@triton.jit
@no_type_check
def half_norm(
    x, residual, gain, out, normed, squares, D, SLOTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Sum a token's slots and its residual, and begin a norm of it as `put` does."""
    turn(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        k = first + tl.arange(0, BLOCK)
        y = tl.zeros([BLOCK], tl.float32)
        for slot in tl.static_range(SLOTS):
            y += tl.load(x + (token * SLOTS + slot) * D + k, mask=k < D, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            y += tl.load(residual + token * D + k, mask=k < D, other=0.0).to(tl.float32)
        y = y.to(out.dtype.element_ty)
        tl.store(out + token * D + k, y, mask=k < D)
        y = y.to(tl.float32)
        scaled = y * tl.load(gain + k, mask=k < D, other=0.0).to(tl.float32)
        tl.store(normed + token * D + k, scaled, mask=k < D)
        total += y * y
    tl.store(squares + token, tl.sum(total, 0))


@triton.jit
@no_type_check
def narrow(
    x, squares, weight, out, K, PARTS, eps, IS_NORMED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One output of one token: for weights of few rows, as routers have them."""
    turn(OVERLAPS)
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        acc += value * tl.load(weight + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    y = tl.sum(acc, 0)
    if IS_NORMED:
        one = token + tl.arange(0, 1)
        y *= tl.sum(inverse_rms(squares, one, K, PARTS, eps, BLOCK_P), 0)
    tl.store(out + token * tl.num_programs(1) + row, y)


@triton.jit
@no_type_check
def linear(
    x, x_squares, codes, scales, residual, gain, out, normed, squares, N, K, OUT, PARTS, eps,
    IS_NORMED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here, w_row = tl.minimum(token, N - 1), tl.minimum(row, OUT - 1)
    turn(OVERLAPS)
    y = product(x, here, codes, scales, w_row, K, KIND, GROUP, SPLIT, EVEN)
    if IS_NORMED:
        y *= inverse_rms(x_squares, here, K, PARTS, eps, BLOCK_P)[None, :]
    put(y, row, token, residual, gain, out, normed, squares, N, OUT, HAS_RESIDUAL, HAS_GAIN)


@triton.jit
@no_type_check
def gate_up(
    x, squares, logits, codes, scales, hidden, N, K, WIDTH, E, PARTS, eps, IS_NORMED: tl.constexpr,
    TOPK: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A program for each choice and block of neurons; `visit` says which of them work."""
    first = tl.program_id(1) * (ROWS // 2)
    turn(OVERLAPS)
    leads, expert, here, chosen, rank, score = visit(logits, N, E, TOPK, TILE, BLOCK_E)
    if leads:
        row = gate_and_up(expert, first, WIDTH, ROWS)
        y = product(x, here.to(tl.int64), codes, scales, row, K, KIND, GROUP, SPLIT, EVEN)
        if IS_NORMED:
            score *= inverse_rms(squares, here, K, PARTS, eps, BLOCK_P)
        y = gated(y, score[None, :])
        at = first + tl.arange(0, ROWS // 2)
        slot = (here * (TOPK + 1) + rank).to(tl.int64)
        ok = chosen[None, :] & (at < WIDTH)[:, None]
        tl.store(hidden + slot[None, :] * WIDTH + at[:, None], y, mask=ok)


@triton.jit
@no_type_check
def down(
    hidden, logits, codes, scales, out, N, WIDTH, D, E, TOPK: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """As `gate_up`; the outputs of a token's choices lie side by side."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    turn(OVERLAPS)
    leads, expert, here, chosen, rank, _ = visit(logits, N, E, TOPK, TILE, BLOCK_E)
    if leads:
        slot = (here * (TOPK + 1) + tl.minimum(rank, TOPK)).to(tl.int64)
        w_row = expert * D + tl.minimum(row, D - 1)
        y = product(hidden, slot, codes, scales, w_row, WIDTH, KIND, GROUP, SPLIT, EVEN)
        ok = chosen[None, :] & (row < D)[:, None]
        tl.store(out + slot[None, :] * D + row[:, None], y, mask=ok)


# ---- sorted tiles


@triton.jit
@no_type_check
def gate_up_tiles(
    x, order, offsets, score, codes, scales, hidden, K, WIDTH, E, per_token,
    KIND: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, block = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8
    )
    expert, first, end = find_tile(offsets, tile, E, TILE, BLOCK_E)
    if expert < E:
        place = first.to(tl.int64) + tl.arange(0, TILE)
        slot = tl.load(order + tl.minimum(place, end - 1)).to(tl.int64)
        row = gate_and_up(expert.to(tl.int64), block * (ROWS // 2), WIDTH, ROWS)
        y = product(x, slot // per_token, codes, scales, row, K, KIND, GROUP, SPLIT, EVEN)
        y = gated(y, tl.load(score + slot).to(tl.float32)[None, :])
        at = block * (ROWS // 2) + tl.arange(0, ROWS // 2)
        ok = (place < end)[None, :] & (at < WIDTH)[:, None]
        tl.store(hidden + place[None, :] * WIDTH + at[:, None], y, mask=ok)


@triton.jit
@no_type_check
def down_tiles(
    hidden, order, offsets, codes, scales, out, WIDTH, D, E, KIND: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, block = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8
    )
    expert, first, end = find_tile(offsets, tile, E, TILE, BLOCK_E)
    if expert < E:
        place = first.to(tl.int64) + tl.arange(0, TILE)
        here = tl.minimum(place, end - 1)
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        w_row = expert.to(tl.int64) * D + tl.minimum(row, D - 1)
        y = product(hidden, here, codes, scales, w_row, WIDTH, KIND, GROUP, SPLIT, EVEN)
        slot = tl.load(order + here).to(tl.int64)
        ok = (place < end)[None, :] & (row < D)[:, None]
        tl.store(out + slot[None, :] * D + row[:, None], y, mask=ok)


@triton.jit
@no_type_check
def sort_logits(
    logits, squares, order, offsets, score, M, K, E, PARTS, eps, IS_NORMED: tl.constexpr,
    TOPK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Counting sort of all slots in one program: histogram, scan, scatter; experts 0 … e.

    Scores are multiplied by what is still to be done of the tokens' norm.
    """
    turn(OVERLAPS)
    slot = tl.arange(0, BLOCK_M)
    idx = tl.arange(0, BLOCK_E)
    ok = slot < M
    token, choice = slot // (TOPK + 1), slot % (TOPK + 1)
    at = token[:, None] * E + idx[None, :]
    stored = tl.load(logits + at, mask=ok[:, None] & (idx < E)[None, :], other=float("-inf"))
    left = stored.to(tl.float32)
    expert = tl.full([BLOCK_M], E, tl.int32)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    for i in tl.static_range(TOPK):
        best = tl.argmax(left, 1)
        top = (1.0 / (1.0 + tl.exp(-tl.max(left, 1)))).to(stored.dtype).to(tl.float32)
        expert = tl.where(choice == i, best, expert)
        factor = tl.where(choice == i, top, factor)
        left = tl.where(idx[None, :] == best[:, None], float("-inf"), left)
    if IS_NORMED:
        last = M // (TOPK + 1) - 1
        factor *= inverse_rms(squares, tl.minimum(token, last), K, PARTS, eps, BLOCK_P)
    tl.store(score + slot, factor, mask=ok)
    hit = ((expert[:, None] == idx[None, :]) & ok[:, None]).to(tl.int32)
    load = tl.sum(hit, 0)
    begin = tl.cumsum(load, 0) - load
    rank = tl.cumsum(hit, 0) - hit
    place = tl.sum(hit * (begin[None, :] + rank), 1)
    tl.store(order + place, slot, mask=ok)
    tl.store(offsets + idx, begin, mask=idx <= E)
    tl.store(offsets + E + 1, M)
