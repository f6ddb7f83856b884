"""The compiled half of `attention`: many queries on the CPU, scores never leaving the cache.

Queries are taken in panels, one in each lane of the vectors, and keys in blocks. What a panel
gathers of a block is added to what it gathered of those before, whose sums are scaled down whenever
a larger score turns up (Dao et al. 2022, "FlashAttention", algorithm 1).
"""

from functools import partial

import numpy as np

from llama4_lab.compiled import compiled, floats, wide
from llama4_lab.tile import PANEL, panels

f32 = np.float32
BLOCK = 256  # keys whose scores with a panel fit into the first cache; a multiple of four
SIZE = 4  # bytes
LOG2_E = f32(np.log2(np.e))


@partial(compiled, forceinline=True)
def power_of_2(x):
    """Return 2^x of an x up to 0, to one part in 10⁷; NaN stays NaN, and −∞ makes 2^−126.

    The experts' `exp` takes any x, for more instructions. The polynomial of x's fraction was fitted
    for a small largest error, and is 1 at 0.
    """
    x = f32(-126) if x < f32(-126) else x
    n = np.floor(x)
    r = x - n
    p = f32(2.17022418e-4) * r + f32(1.24396919e-3)
    p = (p * r + f32(9.67884064e-3)) * r + f32(5.54833412e-2)
    p = (p * r + f32(2.40229830e-1)) * r + f32(6.93147004e-1)
    p = p * r + f32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def attend(places, strides, sizes, before, row, head, begin, end):
    """Set out to what some queries gather, in all heads that share a key/value head.

    Args:
        places: addresses of q and out ``[b, h, t, dh]`` and of k and v ``[b, kv, s, dh]``, in the
            order q, k, v, out; numbers of the last axis lie beside each other.
        strides: of each, the numbers between neighbours along the three other axes.
        sizes: h / kv, s and dh.
        before: keys that precede that of the first query: query i sees those up to before + i.
        row, head: of b and kv.
        begin, end: of the t queries.
    """
    wide()
    group, s, dh = sizes
    seen = min(before + end, s)
    keys, values = np.empty((seen, dh), f32), np.empty((dh, seen), f32)
    for at in range(seen):
        key = vector(places[1], strides[1], row, head, at, dh)
        value = vector(places[2], strides[2], row, head, at, dh)
        for i in range(dh):
            keys[at, i] = key[i]
            values[i, at] = value[i]
    for own in range(head * group, (head + 1) * group):
        for start in range(begin, end, PANEL):
            gather(
                places, strides, row, own, start, min(PANEL, end - start), before + start,
                keys, values,
            )  # fmt: skip


@partial(compiled, forceinline=True)
def vector(place, strides, row, head, at, dh):
    number = row * strides[0] + head * strides[1] + at * strides[2]
    return floats(place + number * SIZE, (dh,))


@compiled
def gather(places, strides, row, head, start, count, before, keys, values):
    """Set out to what `count` queries of a head gather; the first sees keys up to `before`."""
    wide()
    s, dh = keys.shape
    q, part = np.zeros((1, dh, PANEL), f32), np.empty((1, dh, PANEL), f32)
    z, room = np.zeros((dh, PANEL), f32), np.empty(BLOCK * PANEL, f32)
    top, total, factor = np.full(PANEL, f32(-np.inf)), np.zeros(PANEL, f32), np.empty(PANEL, f32)
    scale = LOG2_E / np.sqrt(f32(dh))  # of scores, for powers of two
    for lane in range(count):
        query = vector(places[0], strides[0], row, head, start + lane, dh)
        for i in range(dh):
            q[0, i, lane] = query[i]
    end = min(before + count, s)
    for begin in range(0, end, BLOCK):
        n = min(end - begin, BLOCK)
        scores = room[: n * PANEL].reshape(1, n, PANEL)
        panels(keys[begin : begin + n], q, scores)
        later(scores[0], before - begin, f32(-np.inf))
        room[n * PANEL : -(-n // 4) * 4 * PANEL] = -np.inf
        weigh(room[: -(-n // 4) * 4 * PANEL], scale, top, total, factor)
        later(scores[0], before - begin, f32(0))
        panels(values[:, begin : begin + n], scores, part)
        for i in range(dh):
            for lane in range(PANEL):
                z[i, lane] = z[i, lane] * factor[lane] + part[0, i, lane]
    for lane in range(PANEL):
        total[lane] = f32(1) / total[lane]
    for lane in range(count):
        out = vector(places[3], strides[3], row, head, start + lane, dh)
        for i in range(dh):
            out[i] = z[i, lane] * total[lane]


@compiled
def later(scores, before, value):
    """Set the scores of keys that a lane does not see: lane i sees those up to before + i."""
    for key in range(max(before + 1, 0), len(scores)):
        for lane in range(min(key - before, PANEL)):
            scores[key, lane] = value


@compiled
def weigh(scores, scale, top, total, factor):
    """Turn scores into weights ``2^(scale · (score − top))``; `factor` scales those before.

    Args:
        scores: flat ``[keys, PANEL]``; the number of keys is a multiple of four.
        top, total: of each lane, the largest score so far, and the sum of weights beside it.
    """
    wide()
    # Four keys at a time, so that no sum waits for the one before.
    fours, found = scores.reshape(-1, 4 * PANEL), np.full(4 * PANEL, f32(-np.inf))
    for key in range(len(fours)):
        for lane in range(4 * PANEL):
            found[lane] = max(found[lane], fours[key, lane])
    for lane in range(PANEL):
        new = top[lane]
        for i in range(lane, 4 * PANEL, PANEL):
            new = max(new, found[i])
        factor[lane] = power_of_2(scale * (top[lane] - new))
        top[lane] = new
    ones = scores.reshape(-1, PANEL)
    for key in range(len(ones)):
        for lane in range(PANEL):
            ones[key, lane] = power_of_2(scale * (ones[key, lane] - top[lane]))
    found[:] = 0
    for key in range(len(fours)):
        for lane in range(4 * PANEL):
            found[lane] += fours[key, lane]
    for lane in range(PANEL):
        total[lane] *= factor[lane]
        for i in range(lane, 4 * PANEL, PANEL):
            total[lane] += found[i]
