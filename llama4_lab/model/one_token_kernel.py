"""The compiled half of `one_token`: one token's way through all layers, without torch.

It reads as `text` does, for ``b = t = 1``. Layers come as a table, one record each, that holds
sizes, rules and the memory addresses of the weights: to hand over a hundred arrays would take as
long as to compute a layer. All weights are float32 and contiguous; `one_token` sees to that.
"""

import numba
import numpy as np

from llama4_lab.compiled import compiled, floats
from llama4_lab.experts.numba import exp, neurons, token
from llama4_lab.plain_kernels import rows

f32 = np.float32
SIZE = 4  # bytes


@compiled
def forward(idx, position, model, layers, frequency, logits, router_logits, scores, indices):
    """Set ``logits [v]``, add the token's keys and values to the cache, and record the routing.

    Args:
        idx, position: the token and its place, from 0.
        model: one `one_token.MODEL` record.
        layers: a `one_token.LAYER` record for each layer.
        frequency: radians per position of each pair of a head, ``[dh / 2]``.
        router_logits, scores, indices: ``[l, e]``, ``[l, topk]``, ``[l, topk]``; the rows of dense
            layers are left as they are.
    """
    m = model[0]
    d, dh, h = m.d, m.dh, m.heads
    x, y, out = np.empty(d, f32), np.empty(d, f32), np.empty(d, f32)
    q, z, pattern = np.empty(h * dh, f32), np.empty(h * dh, f32), np.empty(m.longest, f32)
    k, v = np.empty(m.kv_heads * dh, f32), np.empty(m.kv_heads * dh, f32)
    hidden = np.empty(2 * m.widest, f32)
    turn = np.empty((2, dh // 2), f32)
    for i in range(dh // 2):
        angle = f32(position) * frequency[i]
        turn[0, i], turn[1, i] = np.cos(angle), np.sin(angle)
    steps = np.floor((f32(position) + f32(1)) / f32(m.floor_scale))
    temperature = f32(1) + f32(m.attn_scale) * np.log1p(steps)

    embedding = floats(m.embed + idx * d * SIZE, (d,))
    for i in range(d):
        x[i] = embedding[i]
    for i in range(len(layers)):
        layer = layers[i]
        norm(x, layer.input_norm, layer.input_norm_eps, y)
        project(layer.q, layer.q_bias, y, q)
        project(layer.k, layer.k_bias, y, k)
        project(layer.v, layer.v_bias, y, v)
        if layer.uses_rope:
            rotate(q, turn)
            rotate(k, turn)
            if layer.use_qk_norm:
                unit_rms(q, dh, layer.qk_eps)
                unit_rms(k, dh, layer.qk_eps)
        else:
            for j in range(len(q)):
                q[j] *= temperature
        mix(q, k, v, position, layer, m, pattern, z)
        project(layer.o, layer.o_bias, z, out)
        add(x, out)
        norm(x, layer.feed_norm, layer.feed_norm_eps, y)
        feed(y, layer, hidden, router_logits[i], scores[i], indices[i], out)
        add(x, out)
    norm(x, m.norm, m.norm_eps, y)
    rows(floats(m.head, (m.v, d)), y, logits)


@compiled
def add(x, y):
    for i in range(len(x)):
        x[i] += y[i]


@compiled
def norm(x, weight, eps, out):
    w = floats(weight, (len(x),))
    for i in range(len(x)):
        out[i] = x[i]
    unit_rms(out, len(x), eps)
    for i in range(len(x)):
        out[i] *= w[i]


@compiled
def unit_rms(x, width, eps):
    """Scale each `width` numbers to a root mean square of one."""
    for start in range(0, len(x), width):
        squares = f32(0)
        for i in range(start, start + width):
            squares += x[i] * x[i]
        scale = f32(1) / np.sqrt(squares / f32(width) + f32(eps))
        for i in range(start, start + width):
            x[i] *= scale


@compiled
def project(weight, bias, x, out):
    rows(floats(weight, (len(out), len(x))), x, out)
    if bias != 0:
        add(out, floats(bias, (len(out),)))


@compiled
def rotate(x, turn):
    half = turn.shape[1]
    for start in range(0, len(x), 2 * half):
        for i in range(half):
            j = start + 2 * i
            a, b = x[j], x[j + 1]
            x[j] = a * turn[0, i] - b * turn[1, i]
            x[j + 1] = a * turn[1, i] + b * turn[0, i]


@compiled
def mix(q, k, v, position, layer, m, pattern, z):
    """Store the keys and values, and gather what each head sees of the live ones."""
    dh, place = m.dh, position
    if layer.chunk:
        place = position % layer.chunk
    cache = floats(layer.cache, (2, m.kv_heads, layer.capacity, dh))
    for j in range(m.kv_heads):
        for i in range(dh):
            cache[0, j, place, i] = k[j * dh + i]
            cache[1, j, place, i] = v[j * dh + i]
    for j in range(m.heads):
        at = j * m.kv_heads // m.heads
        q_j, z_j = q[j * dh : (j + 1) * dh], z[j * dh : (j + 1) * dh]
        keys, values = cache[0, at, : place + 1], cache[1, at, : place + 1]
        attend(q_j, keys, values, pattern[: place + 1], z_j)


@compiled
def attend(q, keys, values, pattern, z):
    rows(keys, q, pattern)
    scale, top = f32(1) / np.sqrt(f32(len(q))), -f32(np.inf)
    for s in range(len(pattern)):
        pattern[s] *= scale
        top = max(top, pattern[s])
    total = f32(0)
    for s in range(len(pattern)):
        pattern[s] = exp(pattern[s] - top)
        total += pattern[s]
    for i in range(len(z)):
        z[i] = 0
    whole = len(pattern) // 4 * 4
    for s in range(0, whole, 4):  # four at a time, so that z is read and written less often
        a, b, c, d = pattern[s], pattern[s + 1], pattern[s + 2], pattern[s + 3]
        for i in range(len(z)):
            first, second = a * values[s, i] + b * values[s + 1, i], c * values[s + 2, i]
            z[i] += first + second + d * values[s + 3, i]
    for s in range(whole, len(pattern)):
        for i in range(len(z)):
            z[i] += pattern[s] * values[s, i]
    for i in range(len(z)):
        z[i] /= total


@compiled
def feed(x, layer, hidden, router_logits, scores, indices, out):
    d, e, f = len(x), layer.e, layer.f
    gate, up, down = (
        floats(layer.gate, (f, d)),
        floats(layer.up, (f, d)),
        floats(layer.down, (d, f)),
    )
    if e == 0:
        neurons(gate, up, x, f32(1), hidden[:f])
        rows(down, hidden[:f], out)
        return
    routed_gate_up, routed_down = (
        floats(layer.routed_gate_up, (e, 2 * f, d)),
        floats(layer.routed_down, (e, d, f)),
    )
    token(
        x, floats(layer.router, (e, d)), routed_gate_up, routed_down, gate, up, down,
        hidden, router_logits[:e], scores[: layer.topk], indices[: layer.topk], out,
    )  # fmt: skip


def compile(model: np.dtype, layer: np.dtype) -> None:
    """Load `forward` for such records from disk, or compile it and keep it there."""
    vector, matrix, i64 = numba.float32[::1], numba.float32[:, ::1], numba.int64
    records = (numba.from_dtype(each)[::1] for each in (model, layer))
    forward.compile((i64, i64, *records, vector, vector, matrix, matrix, numba.int64[:, ::1]))
