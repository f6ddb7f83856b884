"""Attention of one new token a row over a static buffer, in two Triton kernels.

Each program takes one row's key/value head and a part of the live keys, so that a long past keeps
the whole GPU busy (Dao et al. 2023, "Flash-Decoding"). The first kernel also rotates and norms the
new query and key, and stores the new key and value; the second joins the parts.
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingImports=false
# (triton is not in every environment, and its decorators hide what they return)

from typing import no_type_check  # annotations in kernels tell Triton what to compile in

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.experts.triton import launch
from llama4_lab.experts.triton_kernels import turn

_KEYS, _WARPS = 64, 4  # keys an iteration, and warps of a program
_PROGRAMS, _MOST_PARTS = 256, 64  # about two programs for each of a Hopper's 132 multiprocessors


@triton.jit
@no_type_check
def _turn(x, cos, sin, factor, eps, ROTATES: tl.constexpr, NORMS: tl.constexpr, DH: tl.constexpr):
    """Rotate and norm heads, or scale them; x points at their first numbers."""
    pair = tl.arange(0, DH // 2)[None, :]
    a = tl.load(x + 2 * pair).to(tl.float32)
    b = tl.load(x + 2 * pair + 1).to(tl.float32)
    if ROTATES:
        c, s = tl.load(cos + pair), tl.load(sin + pair)
        a, b = a * c - b * s, a * s + b * c
        if NORMS:
            size = tl.rsqrt(tl.sum(a * a + b * b, 1) / DH + eps)[:, None]
            a, b = a * size, b * size
    return tl.interleave(a * factor, b * factor)


@triton.jit
@no_type_check
def _attend_part(
    qkv, cos, sin, temperature, place, keys, values, part, peak, total, SIZE, eps,
    ROTATES: tl.constexpr, NORMS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    turn(OVERLAPS)
    row, head, part_idx = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    at = row.to(tl.int64) * HEADS + head
    live = tl.load(place + row)
    new = qkv + row * (GROUP + 2) * HEADS * DH
    x = tl.arange(0, DH)
    # A block holds more query heads than a group: the rest repeats its last one and is not stored.
    g = tl.minimum(tl.arange(0, BLOCK), GROUP - 1)
    factor = 1.0 if ROTATES else tl.load(temperature)
    q = _turn(new + ((head * GROUP + g) * DH)[:, None], cos, sin, factor, eps, ROTATES, NORMS, DH)
    dtype = keys.dtype.element_ty
    q = q.to(dtype)
    scale = 1.0 / tl.sqrt(DH * 1.0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    z = tl.zeros([BLOCK, DH], tl.float32)
    keys += at * SIZE * DH
    values += at * SIZE * DH
    if part_idx == 0:  # the new token itself
        one = tl.arange(0, 1)[:, None]
        k = new + (GROUP * HEADS + head) * DH + one
        k = _turn(k, cos, sin, 1.0, eps, ROTATES, NORMS, DH).to(dtype)
        v = tl.load(new + ((GROUP + 1) * HEADS + head) * DH + x)
        tl.store(keys + live * DH + x[None, :], k)
        tl.store(values + live * DH + x, v)
        top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        weight += 1.0
        z += v.to(tl.float32)[None, :]
    count = tl.cdiv(tl.cdiv(live, PARTS), KEYS) * KEYS
    end = tl.minimum(part_idx * count + count, live)
    for first in range(part_idx * count, end, KEYS):
        s = first + tl.arange(0, KEYS)
        ok = (s < end)[:, None]
        k = tl.load(keys + s[:, None] * DH + x[None, :], mask=ok, other=0.0)
        v = tl.load(values + s[:, None] * DH + x[None, :], mask=ok, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((s < end)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        pattern = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        weight = weight * shrink + tl.sum(pattern, 1)
        z = z * shrink[:, None] + tl.dot(pattern.to(dtype), v, input_precision="ieee")
        top = higher
    idx = tl.arange(0, BLOCK)
    out = (at * PARTS + part_idx) * GROUP + idx
    tl.store(peak + out, top, mask=idx < GROUP)
    tl.store(total + out, weight, mask=idx < GROUP)
    tl.store(part + out[:, None] * DH + x[None, :], z, mask=(idx < GROUP)[:, None])


@triton.jit
@no_type_check
def _join_parts(
    part, peak, total, z, GROUP: tl.constexpr, DH: tl.constexpr, PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    turn(OVERLAPS)
    head = tl.program_id(0).to(tl.int64)
    at = (head // GROUP * PARTS + tl.arange(0, PARTS)) * GROUP + head % GROUP
    x = tl.arange(0, DH)
    top = tl.load(peak + at)
    share = tl.exp(top - tl.max(top, 0))
    whole = tl.sum(share * tl.load(total + at), 0)
    sums = tl.load(part + at[:, None] * DH + x[None, :])
    tl.store(z + head * DH + x, tl.sum(sums * share[:, None], 0) / whole)


def attend(
    qkv: Float[Tensor, "b qkv"],
    cos: Float[Tensor, " half"],
    sin: Float[Tensor, " half"],
    temperature: Float[Tensor, ""],
    place: Int[Tensor, " b"],
    buffer: Float[Tensor, "2 b k s dh"],
    *,
    heads: int,
    rotates: bool,
    norms: bool,
    eps: float,
) -> Float[Tensor, "b z"]:
    """Return what each head gathers; the new keys and values go to `place` in the buffer.

    Args:
        qkv: the projections of one token a row: `heads` queries, then keys, then values.
        cos, sin: of the token's RoPE angles, for layers that rotate.
        temperature: the queries' factor, for those that do not.
        place: the live keys of a row are the buffer's first so many.
    """
    _, b, kv_heads, size, dh = buffer.shape
    group = heads // kv_heads
    most = min(_MOST_PARTS, max(1, _PROGRAMS // (b * kv_heads)), triton.cdiv(size, _KEYS))
    parts = 1 << most.bit_length() - 1
    total = qkv.new_empty(2, b * kv_heads * parts * group, dtype=torch.float32)
    part = total.new_empty(total.shape[1], dh)
    z = qkv.new_empty(b, heads * dh)
    block = max(16, triton.next_power_of_2(group))  # tensor cores take 16 rows
    _attend_part[b * kv_heads, parts](
        qkv, cos, sin, temperature, place, buffer[0], buffer[1], part, total[0], total[1], size,
        eps, rotates, norms, kv_heads, group, block, dh, parts, _KEYS, **launch(qkv, _WARPS),
    )  # fmt: skip
    _join_parts[b * heads,](part, total[0], total[1], z, group, dh, parts, **launch(qkv, _WARPS))
    return z
