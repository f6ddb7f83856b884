"""Backend of compiled kernels for the CPU: rows for few tokens an expert, tiles for more.

`moe` runs a whole MoE block in one call, up to as many tokens as `probe` found that to be fastest
for; `apply` is the backend for more. Kernels compile at their first call; the result is kept on
disk. They run on the caller's thread, and with more than a millisecond of work on as many as torch
uses, whose results are those of one thread, to the bit.

Inside compiled code, of contiguous float32 arrays with all outputs and scratch preallocated,
``token(x [d], router [e, d], gate_up [e, 2f, d], down [e, d, f], shared_gate [f, d],
shared_up [f, d], shared_down [d, f], hidden [2f], logits [e], scores [topk],
indices [topk] int64, out [d])`` is the whole MoE block of one token; ``hidden`` is scratch.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from llama4_lab import packed
from llama4_lab.compiled import array, beside, compiled, floats, threads, wide
from llama4_lab.experts import loop, probe
from llama4_lab.packed import Packed, is_for_kernels
from llama4_lab.plain_kernels import ADD, ONE, PRODUCTS_A_READ, SET, TIMES, product, rows
from llama4_lab.points import INSIDE, NO_TAP, Tap
from llama4_lab.tile import PANEL, panels

inlined = partial(compiled, forceinline=True)
f32 = numba.float32
FEW, MOST = 5 * PANEL // 8, 4 * PANEL  # tokens: that a panel is used for at least, and at a time
_CPU: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
_NOTHING = torch.empty(0, 0, **_CPU)


# ---- kernels


@inlined
def exp(x):
    """Return e^x to three parts in 10⁷, by Cephes' polynomial; unlike libm's, it vectorises."""
    x = min(max(x, f32(-87)), f32(88))
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
    p = (p * r + f32(8.3334519073e-3)) * r + f32(4.1665795894e-2)
    p = (p * r + f32(1.6666665459e-1)) * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@inlined
def sigmoid(x):
    return f32(1) / (f32(1) + exp(-x))


@compiled
def neurons_of(gate, up, x, tokens, score, hidden):
    """Set row i of hidden to ``silu(gate @ y) · (up @ y)`` with ``y = score[i] · x[tokens[i]]``.

    The score multiplies the products instead of their input, which is the same.
    """
    wide()
    own = np.arange(len(tokens))
    product(gate, x, tokens, hidden, own, SET)
    for i in range(len(tokens)):
        s, row = score[i], hidden[i]
        for j in range(len(row)):
            row[j] = s * (s * row[j]) * sigmoid(s * row[j])
    product(up, x, tokens, hidden, own, TIMES)


@compiled
def room(tokens, d, f):
    """Return the scratch of `expert` for up to so many tokens."""
    columns = min(-(-tokens // PANEL) * PANEL, MOST)
    return np.empty(max(columns * (d + 2 * f), FEW * f), np.float32)


@compiled
def expert(gate, up, down, x, tokens, score, scratch, out, write, how, kept):
    """Set, or add to, ``out[write[i]]`` what an expert makes of ``score[i] · x[tokens[i]]``.

    Tokens are taken in panels, `MOST` at a time, so that they stay in the cache; those that would
    leave much of a panel empty are taken row by row, where the score multiplies the products
    instead of their input, which is the same.

    Args:
        scratch: at least what `room` returns.
        kept: is given the neurons in its rows ``write``, if it has any.
    """
    wide()
    f, d = gate.shape
    few = len(tokens) % PANEL
    if few >= FEW:
        few = 0
    end = len(tokens) - few
    for start in range(0, end, MOST):
        m = min(end - start, MOST)
        count = -(-m // PANEL)
        y = scratch[: count * d * PANEL].reshape(count, d, PANEL)
        neurons = scratch[y.size : y.size + 2 * count * f * PANEL].reshape(2, count, f, PANEL)
        for i in range(count * PANEL):
            p, lane = divmod(i, PANEL)
            for s in range(d):
                y[p, s, lane] = score[start + i] * x[tokens[start + i], s] if i < m else f32(0)
        panels(gate, y, neurons[0])
        panels(up, y, neurons[1])
        a, b = neurons[0].ravel(), neurons[1].ravel()
        for i in range(len(a)):
            a[i] = a[i] * sigmoid(a[i]) * b[i]
        for i in range(m if len(kept) else 0):
            p, lane = divmod(i, PANEL)
            row = kept[write[start + i]]
            for s in range(f):
                row[s] = neurons[0, p, s, lane]
        panels(down, neurons[0], y)
        for i in range(m):
            p, lane = divmod(i, PANEL)
            row = out[write[start + i]]
            for s in range(d):
                row[s] = y[p, s, lane] + (row[s] if how == ADD else f32(0))
    if few:
        hidden, own = scratch[: few * f].reshape(few, f), write[end:]
        neurons_of(gate, up, x, tokens[end:], score[end:], hidden)
        for i in range(few if len(kept) else 0):
            kept[own[i]] = hidden[i]
        product(down, hidden, np.arange(few), out, own, how)


@compiled
def neurons(gate, up, x, score, hidden):
    """Set ``hidden [f] = silu(gate @ (score · x)) · (up @ (score · x))`` for one token."""
    neurons_of(gate, up, x.reshape(1, -1), ONE, np.full(1, score), hidden.reshape(1, -1))


@compiled
def choose(logits, indices):
    """Fill in the experts with the highest logits, strongest first; NaN counts as the highest.

    Of equal ones it is the first, where torch's topk promises no order.
    """
    for j in range(len(indices)):
        best = -1
        for e in range(len(logits)):
            is_taken = False
            for i in range(j):
                is_taken |= indices[i] == e
            if is_taken:
                continue
            if best < 0 or logits[e] > logits[best] or logits[e] != logits[e]:
                best = e
        indices[j] = best


@compiled
def ordered(slots, num_experts):
    """Sort by counting: the slots in order of their experts, and where each expert's begin."""
    offsets = np.zeros(num_experts + 1, np.int64)
    for e in slots:
        offsets[e + 1] += 1
    for e in range(num_experts):
        offsets[e + 1] += offsets[e]
    order, place = np.empty(len(slots), np.int64), offsets.copy()
    for slot, e in enumerate(slots):
        order[place[e]] = slot
        place[e] += 1
    return order, offsets


@compiled
def routed(
    begin, end, scratch, x, order, offsets, score, gate_up, down, most, kept, made, out
):  # fmt: skip
    """Add to out what the experts of up to `most` tokens make of them; score is flat.

    Neurons and outputs of each slot are also put into ``kept [m, f]`` and ``made [m, d]``, if
    those are not empty.

    Args:
        begin, end: of the slots, in the order of their experts, that are taken.
    """
    f, topk = down.shape[2], len(score) // len(x)
    for e in range(len(down)):
        slots = order[max(offsets[e], begin) : min(offsets[e + 1], end)]
        if not len(slots) or offsets[e + 1] - offsets[e] > most:
            continue
        gate, up, own, tokens = gate_up[e, :f], gate_up[e, f:], score[slots], slots // topk
        if not len(kept):
            expert(gate, up, down[e], x, tokens, own, scratch, out, tokens, ADD, kept)
            continue
        expert(gate, up, down[e], x, tokens, own, scratch, made, slots, SET, kept)
        for i in range(len(slots)):
            for s in range(out.shape[1]):
                out[tokens[i], s] += made[slots[i], s]


@compiled
def begun(
    x, router, shared_gate, shared_up, shared_down, scratch, logits, indices, scores, shared, out,
    known,
):  # fmt: skip
    """Choose n tokens' experts, and set shared and out to what the shared expert makes of them.

    Args:
        known: how many of logits, indices, scores and shared are given.
    """
    n, topk = indices.shape
    every = np.arange(n)
    if known < 1:
        product(router, x, every, logits, every, SET)
    if known < 2:
        for i in range(n):
            choose(logits[i], indices[i])
    if known < 3:
        for i in range(n):
            for j in range(topk):
                scores[i, j] = sigmoid(logits[i, indices[i, j]])
    if known < 4:
        alike, nothing = np.ones(n, np.float32), scratch[:0].reshape(0, 0)
        expert(
            shared_gate, shared_up, shared_down, x, every, alike, scratch, shared, every, SET,
            nothing,
        )  # fmt: skip
    out[:] = shared


@compiled
def block(given, within, filled, sizes, known):
    """Fill in what a MoE block makes of n tokens, from logits to out: `begun` and `routed`.

    Args:
        given: addresses of x, router, gate_up, down, and the shared expert's gate, up and down.
        within: those of `routed`'s kept and made, or zeros.
        filled: those of logits, indices, scores, shared and out.
        sizes: n, d, e, f and topk.
        known: how many of `filled` are given.
    """
    n, d, e, f, topk = sizes
    x, scratch = floats(given[0], (n, d)), room(n * topk, d, f)
    indices = floats(filled[1], (n, 2 * topk)).view(np.int64)
    scores, out = floats(filled[2], (n, topk)), floats(filled[4], (n, d))
    begun(
        x, floats(given[1], (e, d)),
        floats(given[4], (f, d)), floats(given[5], (f, d)), floats(given[6], (d, f)),
        scratch, floats(filled[0], (n, e)), indices, scores, floats(filled[3], (n, d)), out, known,
    )  # fmt: skip
    order, offsets = ordered(indices.ravel(), e)
    slots = len(order)
    watched = slots if within[0] else 0
    routed(
        0, slots, scratch, x, order, offsets, scores.ravel(),
        floats(given[2], (e, 2 * f, d)), floats(given[3], (e, d, f)), slots,
        floats(within[0], (watched, f)), floats(within[1], (watched, d)), out,
    )  # fmt: skip


@compiled
def token(
    x, router, gate_up, down, shared_gate, shared_up, shared_down,
    hidden, logits, scores, indices, out,
):  # fmt: skip
    """Set out to the chosen experts plus the shared expert, and record the routing."""
    f = len(shared_gate)
    rows(router, x, logits)
    choose(logits, indices)
    neurons(shared_gate, shared_up, x, f32(1), hidden[:f])
    rows(shared_down, hidden[:f], out)
    for j, e in enumerate(indices):
        scores[j] = sigmoid(logits[e])
        neurons(gate_up[e, :f], gate_up[e, f:], x, scores[j], hidden[:f])
        product(down[e], hidden[:f].reshape(1, f), ONE, out.reshape(1, -1), ONE, ADD)


# ---- from torch


def can_run(*tensors: "Tensor | Packed") -> bool:
    """Whether kernels take these: plain weights and tokens, all float32 or all bfloat16."""
    dtype = tensors[0].dtype if isinstance(tensors[0], Tensor) else None
    plain = [t for t in tensors if isinstance(t, Tensor) and t.dtype == dtype]
    return dtype in probe.DEFAULT and len(plain) == len(tensors) and is_for_kernels(*plain)


def prepare() -> None:
    """Compile the float32 kernels, or load what was compiled before."""
    packed.prepare()
    d, e, f = 16, 2, 16
    shapes = (1, d), (e, d), (e, 2 * f, d), (e, d, f)
    x, router, gate_up, down = (torch.zeros(shape, **_CPU) for shape in shapes)
    shared = (gate_up[0, :f], gate_up[0, f:], down[0])
    with torch.no_grad():
        moe(x, router, (gate_up, down), shared, 1)
        run(x, *sort(torch.zeros(1, 1, dtype=torch.long), e), x[:, :1], gate_up, down,
            probe.Best(1, "linear"))  # fmt: skip


def takes(x: Tensor, *weights: "Tensor | Packed") -> bool:
    """Whether `moe` is the fastest for these tokens and weights."""
    return x.dtype == torch.float32 and len(x) <= probe.best(x.dtype).rows and can_run(x, *weights)


def sort(
    expert: Int[Tensor, "n topk"], num_experts: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " ends"]]:
    """Equal `llama4_lab.experts.sort`, by counting.

    Raises:
        ValueError: an expert that does not exist.
    """
    wrong = expert[(expert < 0) | (expert >= num_experts)]
    if len(wrong):
        raise ValueError(
            f"expert {wrong[0]} is out of range: there are {num_experts} (0 to {num_experts - 1})"
        )
    order, offsets = ordered(array(expert.flatten()), num_experts)
    return torch.from_numpy(order), torch.from_numpy(offsets)


def apply(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: "Float[Tensor, 'e f2 d'] | Packed",
    down: "Float[Tensor, 'e d f'] | Packed",
) -> Float[Tensor, "n d"]:
    """Equal `loop.apply`, which runs what the kernels do not: see `can_run`."""
    x, score = x.contiguous(), score.contiguous()
    if not can_run(x, score, gate_up, down):
        return loop.apply(x, order, offsets, score, gate_up, down)
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return run(x, order, offsets, score, gate_up, down, probe.best(x.dtype))


def run(
    x: Float[Tensor, "n d"],
    order: Int[Tensor, " m"],
    offsets: Int[Tensor, " ends"],
    score: Float[Tensor, "n topk"],
    gate_up: Float[Tensor, "e f2 d"],
    down: Float[Tensor, "e d f"],
    best: probe.Best,
) -> Float[Tensor, "n d"]:
    """Run experts of up to ``best.rows`` tokens in one compiled call, and each other by itself."""
    multiply = probe.LIBRARY[best.library]
    out = torch.zeros(x.shape, **_CPU)
    ends, nothing = offsets.tolist(), np.empty((0, 0), np.float32)
    loads = [end - start for start, end in pairwise(ends)]
    if any(0 < load <= best.rows for load in loads):
        _routed(
            array(x.float()), array(order), array(offsets), array(score.float().flatten()),
            array(gate_up), array(down), best.rows, nothing, nothing, array(out),
        )  # fmt: skip
    token, score = order // score.shape[1], score.flatten()[order, None]
    for e, load in enumerate(loads):
        if load > best.rows:
            own = slice(ends[e], ends[e + 1])
            gate, up = multiply(x[token[own]].mul_(score[own]), gate_up[e]).chunk(2, dim=-1)
            hidden = F.silu(gate, inplace=True).mul_(up)
            out.index_add_(0, token[own], multiply(hidden, down[e]).float())
    return out.to(x.dtype)


def _routed(x, order, offsets, score, gate_up, down, *others: Any) -> None:
    """Call `routed` for all slots, on several threads if no two of them add to one token."""
    shares = _spread(len(order), down) if len(score) == len(x) else 1
    starts = [0]
    for i in range(1, shares):  # whole panels of an expert, so that nothing rounds differently
        slot = len(order) * i // shares
        first = int(offsets[np.searchsorted(offsets, slot, side="right") - 1])
        starts.append(first + (slot - first) // PANEL * PANEL)
    most = int(np.diff(offsets).max())
    beside(
        partial(
            routed, a, b, room(min(b - a, most), *down.shape[1:]),
            x, order, offsets, score, gate_up, down, *others,
        )
        for a, b in pairwise([*starts, len(order)])
    )  # fmt: skip


def moe_block(given: Tensor, value: Tensor, go_on: Callable[[], None]) -> Tensor:
    """Let kernels go on from another value; who watches torch's functions sees this read it."""
    if has_torch_function_unary(given):
        return handle_torch_function(moe_block, (given,), given, value, go_on)
    value.copy_(given)
    go_on()
    return value


def _spread(slots: int, down: Any) -> int:
    """Return over how many threads to spread the experts of so many slots."""
    e, d, f = down.shape
    return threads(3 * d * f * max(slots, PRODUCTS_A_READ * min(e, slots)))


def moe(
    x: Float[Tensor, "n d"],
    router: Float[Tensor, "e d"],
    experts: tuple[Float[Tensor, "e f2 d"], Float[Tensor, "e d f"]],
    shared: tuple[Float[Tensor, "f d"], Float[Tensor, "f d"], Float[Tensor, "d f"]],
    topk: int,
    record: Tap = NO_TAP,
) -> Float[Tensor, "n d"]:
    """Run a whole MoE block of float32 tokens in one call; the arguments have to be `can_run`.

    Values are shown when all is done. If one was changed, what follows from it is computed anew,
    by the same kernels, and what follows from one inside the experts by the loop: a change that
    changes nothing leaves the result as it is, to the bit.
    """
    (n, d), e, f = x.shape, len(router), shared[2].shape[1]
    empty = partial(torch.empty, **_CPU)
    logits, scores, indices = empty(n, e), empty(n, topk), empty(n, topk, dtype=torch.long)
    alone, out = empty(n, d), empty(n, d)
    slots = n * topk if any(map(record.watches, INSIDE)) else 0
    given = x, router, *experts, *shared
    within = (empty(slots, f), empty(slots, d)) if slots else (_NOTHING, _NOTHING)
    filled = logits, indices, scores, alone, out

    def fill(known: int) -> None:
        shares = _spread(n * (topk + 1), experts[1])
        if shares == 1:
            addresses = (tuple(map(Tensor.data_ptr, some)) for some in (given, within, filled))
            block(*addresses, (n, d, e, f, topk), known)
            return
        x, router, gate_up, down, *shared = map(array, given)
        arrays = [array(y) for y in filled]
        _, chosen, gates, _, total = arrays
        step = max(n // shares // PANEL, 1) * PANEL
        starts = [*range(0, max(n - step, 0) + 1, step), n]
        beside(
            partial(
                begun, x[a:b], router, *shared, room(b - a, d, f), *(y[a:b] for y in arrays), known
            )
            for a, b in pairwise(starts)
        )
        _routed(
            x, *ordered(chosen.ravel(), e), gates.ravel(), gate_up, down, n * topk,
            *map(array, within), total,
        )  # fmt: skip

    fill(0)
    noting, by_loop = loop.Noting(record), None

    def go_on(known: int) -> None:
        logits.gather(-1, indices)  # refuses experts that do not exist
        fill(known)

    def show(known: int, name: str, value: Tensor) -> None:
        changed = record(name, value)
        if changed is not value:
            moe_block(changed, value, partial(go_on, known))

    show(1, "router.logits", logits)
    show(2, "router.indices", indices)
    show(3, "router.scores", scores)
    if slots and not any(map(record.alters, INSIDE)):
        inside = x[:, None] * scores[..., None], *(y.unflatten(0, (n, topk)) for y in within)
        for name, value in zip(INSIDE, inside, strict=True):
            record(name, value)
    elif slots:
        by_loop = loop.apply(x, *sort(indices, e), scores, *experts, record=noting)
    show(4, "shared.out", alone)
    return alone + by_loop if by_loop is not None and noting.has_changed else out
