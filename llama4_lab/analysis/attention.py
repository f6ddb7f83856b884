"""What a head attends to, at any length: exact rows, pooled tiles, summaries, never an N×N array.

The functions take one head's queries and keys as they enter the scores (the points ``attn.rot_q``
and ``attn.rot_k``; `keys_and_queries` reads them) and the layer's chunk. They stream over blocks of
keys that the queries can see, and keep a maximum and a log-sum-exp of each (Rabe & Staats 2021;
Milakov & Gimelshein 2018, alg. 3): half the square for a NoPE layer, one triangle a chunk for RoPE.
Scores are taken in float32, or in float64 where queries and keys are; a model in bfloat16 rounds
its own more coarsely. Sums are in float64, on the CPU where a GPU has none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.model import Llama4
from llama4_lab.model.attention import visible
from llama4_lab.packed import linear
from llama4_lab.precision import with_float64
from llama4_lab.prompt import Prompt, tokens_of
from llama4_lab.trace import trace

_ROWS, _KEYS = 256, 1024  # of one block of scores: 1 MB, which stays in a core's cache

Window = tuple[int, int]  # the first token and the one behind the last


@dataclass(frozen=True, eq=False)
class KeysAndQueries:
    """One layer's queries and keys as they enter the scores: rotated, normalised, tempered."""

    layer: int
    q: Float[Tensor, "h t dh"]
    k: Float[Tensor, "k t dh"]
    chunk: int | None  # tokens; None where the layer sees the whole past

    def head(self, head: int) -> tuple[Float[Tensor, "t dh"], Float[Tensor, "t dh"], int | None]:
        """Return a query head, the keys it reads, and the chunk: what `rows` or `tiles` take first.

        Raises:
            ValueError: a head that the layer does not have.
        """
        if not 0 <= head < len(self.q):
            raise ValueError(
                f"head {head} is out of range: layer {self.layer} has {len(self.q)} query heads "
                f"(0 to {len(self.q) - 1})"
            )
        return self.q[head], self.k[head * len(self.k) // len(self.q)], self.chunk


@dataclass(frozen=True, eq=False)
class Tiles:
    """A window of one head's pattern, pooled over blocks of query rows × key columns."""

    queries: Window
    keys: Window
    block: tuple[int, int]  # queries × keys in one tile; the last tiles may be smaller
    max: Float[np.ndarray, "rows cols"]  # share of a query's attention, in [0, 1]
    mean: Float[np.ndarray, "rows cols"]  # over all cells of the tile; forbidden ones count as 0
    visible: Float[np.ndarray, "rows cols"]  # share of cells that the mask allows, in [0, 1]


@dataclass(frozen=True, eq=False)
class Summary:
    """What one head does, for each query."""

    distance: Float[np.ndarray, " t"]  # tokens back to the keys attended to, on average
    entropy: Float[np.ndarray, " t"]  # nats, at most the log of the number of visible keys
    sink: Float[np.ndarray, " t"]  # share on the first visible key: the chunk's or the sequence's
    crossing: Float[np.ndarray, " t"]  # share on keys before the query's own chunk

    @property
    def means(self) -> Float[np.ndarray, " 4"]:
        """Distance, entropy, sink and crossing, each averaged over the queries."""
        return np.array([x.mean() for x in vars(self).values()])


@dataclass(frozen=True, eq=False)
class HeadSummaries:
    """`Summary` of each head, averaged over a prompt's queries; the axis l runs over `layers`."""

    layers: tuple[int, ...]
    chunks: tuple[int | None, ...]  # of each layer; None: `sink` is the sequence's first token
    border: int | None  # tokens from one chunk border to the next, for `crossing`
    distance: Float[np.ndarray, "l h"]  # tokens
    entropy: Float[np.ndarray, "l h"]  # nats
    sink: Float[np.ndarray, "l h"]  # share
    crossing: Float[np.ndarray, "l h"]  # share; 0 on layers that attend inside chunks


def keys_and_queries(model: Llama4, prompt: Prompt, layer: int) -> KeysAndQueries:
    """Run a prompt of one row and keep a layer's queries and keys; no pattern is computed.

    Raises:
        ValueError: a layer that the model does not have, a prompt of several rows or with padding,
            or a call inside a block that changes the layer's scores or pattern.
    """
    return _traced(model, prompt, [layer])[0]


def head_summaries(
    model: Llama4, prompt: Prompt, layers: Sequence[int] | None = None
) -> HeadSummaries:
    """Run a prompt of one row and summarise every head of some layers, or of all.

    The first queries count like all others: alone in sight, a token has entropy 0 and sink 1.
    Memory holds the queries and keys of the layers asked for.

    Raises:
        ValueError: as `keys_and_queries`.
    """
    config = model.config
    layers = range(config.num_hidden_layers) if layers is None else layers
    traced = _traced(model, prompt, layers)
    border = config.attention_chunk_size
    means = np.empty((4, len(traced), config.num_attention_heads))
    for row, kept in enumerate(traced):
        for head in range(config.num_attention_heads):
            means[:, row, head] = summarise(*kept.head(head), border=border).means
    chunks = tuple(kept.chunk for kept in traced)
    return HeadSummaries(tuple(layers), chunks, border, *means)


@torch.no_grad()
def _traced(model: Llama4, prompt: Prompt, layers: Sequence[int]) -> list[KeysAndQueries]:
    count, padding = len(tokens_of(prompt)), int((prompt.attention_mask == 0).sum())
    if padding:
        raise ValueError(
            f"this prompt of {count} tokens has {padding} of padding: build it as one row without"
        )
    for layer in layers:
        model.config.check_layer(layer)
        for name in (f"layers.{layer}.attn.scores", f"layers.{layer}.attn.pattern"):
            if model.tap.alters(name):
                raise ValueError(
                    f"{name!r} is changed here, and queries and keys do not tell what "
                    "becomes of it: leave that block, or read the point itself"
                )
    prompt = prompt.to(model.device)
    with trace(model, [f"layers.{i}.attn.rot_{x}" for i in layers for x in "qk"]) as cache:
        model.hidden(prompt.input_ids, prompt.pixel_values, prompt.attention_mask)

    def by_head(layer: int, name: str) -> Tensor:
        return cache[f"layers.{layer}.attn.rot_{name}"][0].transpose(0, 1)

    chunk = model.chunks
    return [KeysAndQueries(i, by_head(i, "q"), by_head(i, "k"), chunk[i]) for i in layers]


def rows(
    q: Float[Tensor, "t dh"], k: Float[Tensor, "s dh"], chunk: int | None, queries: Sequence[int]
) -> Float[Tensor, "r s"]:
    """Return the attention of some queries to all keys: exact rows of the pattern.

    >>> q = k = torch.zeros(4, 2)
    >>> rows(q, k, 2, [1, 2]).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]

    Raises:
        ValueError: a query outside the sequence, or queries and keys that do not fit each other.
    """
    q, k = _widened(q, k, chunk)
    for query in queries:
        if not 0 <= query < len(q):
            raise ValueError(
                f"query {query} is out of range: this head has {len(q)} queries (0 to {len(q) - 1})"
            )
    chosen = torch.tensor(queries, dtype=torch.long, device=q.device)
    keys = torch.arange(len(k), device=k.device)
    seen = visible(chosen[None], keys[None], chunk)[0]
    return _scores(q[chosen], k).masked_fill(~seen, float("-inf")).softmax(dim=-1)


@torch.no_grad()
def log_normaliser(
    q: Float[Tensor, "t dh"], k: Float[Tensor, "s dh"], chunk: int | None
) -> Float[Tensor, " t"]:
    """Return the log of the sum of ``exp(score)`` over the keys that each query sees, in float64.

    With it ``exp(score - log_normaliser)`` is the attention of any single cell.

    >>> log_normaliser(torch.zeros(3, 2), torch.zeros(3, 2), None).exp().round().tolist()
    [1.0, 2.0, 3.0]

    Raises:
        ValueError: queries and keys that do not fit each other.
    """
    q, k = _widened(q, k, chunk)
    whole = (0, len(k))
    spans = _spans(whole, 1, _ROWS)
    return torch.cat([_by_tile(q, k, chunk, span, whole, len(k))[1][:, 0] for span in spans])


@torch.no_grad()
def tiles(
    q: Float[Tensor, "t dh"],
    k: Float[Tensor, "s dh"],
    chunk: int | None,
    *,
    block: tuple[int, int],
    queries: Window | None = None,
    keys: Window | None = None,
    normaliser: Float[Tensor, " normalised"] | None = None,
) -> Tiles:
    """Pool a window of the pattern over tiles of ``block = (queries, keys)`` cells.

    Args:
        block: a block beyond the window is cut to it; the last row and column of tiles hold what
            is left.
        queries, keys: the window as (begin, end), the whole sequence if not given.
        normaliser: `log_normaliser` of the head, kept from an earlier call: then only the window
            is computed, otherwise all that its queries see.

    >>> tiles(torch.zeros(4, 2), torch.zeros(4, 2), 2, block=(2, 2)).mean.tolist()
    [[0.5, 0.0], [0.0, 0.5]]

    Raises:
        ValueError: a window that is empty or outside the sequence, a block without cells, or
            queries, keys and normaliser that do not fit each other.
    """
    q, k = _widened(q, k, chunk)
    queries, keys = _window("queries", queries, len(q)), _window("keys", keys, len(k))
    if min(block) < 1:
        raise ValueError(f"a tile of {block[0]} x {block[1]} cells is empty: give 1 or more")
    if normaliser is not None and len(normaliser) != len(q):
        raise ValueError(
            f"a normaliser of {len(normaliser)} queries does not fit {len(q)}: "
            "take log_normaliser of this head"
        )
    height, width = block
    row_edge, key_edge = (_edges(*x).to(q.device) for x in ((queries, height), (keys, width)))
    shape = len(row_edge) - 1, len(key_edge) - 1
    peak, mass, seen = torch.zeros(3, *shape, dtype=torch.float64, device=q.device)
    for span in _spans(queries, height, max(1, min(_ROWS, _ROWS * _KEYS // shape[1]))):
        top, log_mass = _by_tile(q, k, chunk, span, keys, width)
        if normaliser is None:
            sides = (0, keys[0]), (keys[1], len(k))
            outside = [_by_tile(q, k, chunk, span, side, len(k))[1] for side in sides]
            total = torch.cat([log_mass, *outside], dim=1).logsumexp(dim=1)
        else:
            total = normaliser[slice(*span)]
        here = slice((span[0] - queries[0]) // height, -((queries[0] - span[1]) // height))
        total = total[:, None]
        peak[here] = peak[here].maximum(_grouped((top - total).exp(), 0, height, 0.0).amax(1))
        mass[here] += _grouped((log_mass - total).exp(), 0, height, 0.0).sum(1)
        seen[here] += _grouped(_num_visible(span, key_edge, chunk), 0, height, 0).sum(1)
    cells = row_edge.diff()[:, None] * key_edge.diff()
    pooled = (x.float().cpu().numpy() for x in (peak, mass / cells, seen / cells))
    return Tiles(queries, keys, block, *pooled)


@torch.no_grad()
def summarise(
    q: Float[Tensor, "t dh"],
    k: Float[Tensor, "s dh"],
    chunk: int | None,
    *,
    border: int | None = None,
) -> Summary:
    """Summarise for each query where its attention goes.

    Args:
        border: tokens in a chunk, for the share that a layer without chunks draws across chunk
            borders; without it nothing counts as crossing.

    >>> summarise(torch.zeros(3, 2), torch.zeros(3, 2), None, border=2).crossing.round(2).tolist()
    [0.0, 0.0, 0.67]

    Raises:
        ValueError: queries and keys that do not fit each other.
    """
    q, k = _widened(q, k, chunk)
    spans = _spans((0, len(q)), 1, _ROWS)
    total, score, key = torch.cat([_expected(q, k, chunk, span) for span in spans], dim=1)
    query = torch.arange(len(q), device=q.device)
    first = torch.zeros_like(query) if chunk is None else query // chunk * chunk
    sink = ((q * k[first]).sum(dim=1) * q.shape[1] ** -0.5 - total).exp()
    crossing = torch.zeros_like(total)
    if chunk is None and border is not None:
        crossing = 1 - (log_normaliser(q, k, border) - total).exp()
    arrays = query - key, (total - score).clamp(min=0), sink.clamp(max=1), crossing.clamp(min=0)
    return Summary(*(x.cpu().numpy() for x in arrays))


def _expected(
    q: Float[Tensor, "t dh"], k: Float[Tensor, "t dh"], chunk: int | None, span: Window
) -> Float[Tensor, "what r"]:
    """Return the log-sum-exp, the mean score and the mean key position of a span of queries."""
    parts = []
    for first, scores in _blocks(q, k, chunk, span, (0, len(k)), 1):
        peak = _finite(scores.amax(dim=1, keepdim=True))
        below = scores.sub_(peak).clamp_(min=-1e4)  # no -inf, so that 0 · below is 0
        weight = below.exp()
        offset = torch.arange(scores.shape[1], device=q.device, dtype=q.dtype)
        sums = weight.sum(1), (weight * below).sum(1), weight @ offset
        mass, score, key = (x.double() for x in sums)
        peak = peak[:, 0].double()
        parts.append(torch.stack([peak, mass, score + peak * mass, key + first * mass]))
    peak, mass, score, key = torch.stack(parts, dim=-1)
    total = (peak + mass.log()).logsumexp(dim=1)
    share = (peak - total[:, None]).exp()
    return torch.stack([total, (share * score).sum(1), (share * key).sum(1)])


def _by_tile(
    q: Float[Tensor, "t dh"],
    k: Float[Tensor, "t dh"],
    chunk: int | None,
    span: Window,
    keys: Window,
    width: int,
) -> tuple[Float[Tensor, "r cols"], Float[Tensor, "r cols"]]:
    """Return maximum and log-sum-exp of a span's scores in each tile of keys, in float64."""
    shape = span[1] - span[0], len(_edges(keys, width)) - 1
    peak, mass = torch.full((2, *shape), float("-inf"), dtype=torch.float64, device=q.device)
    for first, scores in _blocks(q, k, chunk, span, keys, width):
        cells = _grouped(scores, 1, width, float("-inf"))
        top = cells.amax(dim=2)
        log_sum = cells.sub_(_finite(top)[:, :, None]).exp_().sum(dim=2).double().log() + top
        begin = (first - keys[0]) // width
        here = slice(begin, begin + top.shape[1])
        peak[:, here] = peak[:, here].maximum(top)
        mass[:, here] = mass[:, here].logaddexp(log_sum)
    return peak, mass


def _blocks(
    q: Float[Tensor, "t dh"],
    k: Float[Tensor, "t dh"],
    chunk: int | None,
    span: Window,
    keys: Window,
    width: int,
) -> Iterator[tuple[int, Float[Tensor, "r n"]]]:
    """Yield the first key and the scores of each block of keys that a span of queries may see."""
    top, bottom = span
    earliest = 0 if chunk is None else top // chunk * chunk
    row = torch.arange(top, bottom, device=q.device)
    for first, last in _spans(keys, width, _KEYS):
        last = min(last, bottom)
        if last <= max(first, earliest):
            continue
        step = width if last - first > width else 1  # whole tiles, or part of one
        first += max(0, earliest - first) // step * step
        scores = _scores(q[top:bottom], k[first:last])
        if last > top + 1 or (chunk is not None and first // chunk < (bottom - 1) // chunk):
            key = torch.arange(first, last, device=q.device)
            scores.masked_fill_(~visible(row[None], key[None], chunk)[0], float("-inf"))
        yield first, scores


def _scores(q: Float[Tensor, "r dh"], k: Float[Tensor, "n dh"]) -> Float[Tensor, "r n"]:
    # Scaled behind the product, so that blocks of some size round as the model's scores do: scaled
    # before it, float32 scores of 20 differ by 1e-5, and shares of attention by 4e-6.
    return linear(q, k).mul_(q.shape[1] ** -0.5)


def _spans(window: Window, size: int, most: int) -> Iterator[Window]:
    """Cut a window into spans of at most `most` tokens: whole tiles of a size, or part of one."""
    group = size * max(1, most // size)
    for start in range(*window, group):
        stop = min(start + group, window[1])
        for first in range(start, stop, most):
            yield first, min(first + most, stop)


def _grouped(x: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """Split an axis into tiles of a size; the last is filled up, a shorter axis is one tile."""
    size = min(size, x.shape[dim])
    if missing := -x.shape[dim] % size:
        x = F.pad(x, (0, missing) if dim == 1 else (0, 0, 0, missing), value=fill)
    return x.unflatten(dim, (-1, size))


def _edges(window: Window, size: int) -> Int[Tensor, " edges"]:
    """Return where the tiles of a window begin, and where the last one ends."""
    return torch.tensor([*range(*window, size), window[1]])


def _num_visible(
    span: Window, edges: Int[Tensor, " edges"], chunk: int | None
) -> Int[Tensor, "r cols"]:
    """Count the keys of each tile that each query of a span sees."""
    query = torch.arange(*span, device=edges.device)[:, None]
    first = torch.zeros_like(query) if chunk is None else query // chunk * chunk
    return ((query + 1).minimum(edges[1:]) - first.maximum(edges[:-1])).clamp(min=0)


def _finite(x: Tensor) -> Tensor:
    """Lift -inf, the maximum where nothing is visible, so that it can be subtracted."""
    return x.clamp(min=torch.finfo(x.dtype).min)


def _widened(
    q: Float[Tensor, "t dh"], k: Float[Tensor, "s dh"], chunk: int | None
) -> tuple[Float[Tensor, "t dh"], Float[Tensor, "s dh"]]:
    """Check queries and keys, lift them to the precision of the scores, and have float64."""
    if len(q) != len(k):
        raise ValueError(
            f"{len(q)} queries and {len(k)} keys: give both of the same tokens, from the first on"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(
            f"a chunk of {chunk} tokens is empty: give 1 or more, or None for no chunks"
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    return with_float64(q).to(wide).contiguous(), with_float64(k).to(wide).contiguous()


def _window(name: str, window: Window | None, length: int) -> Window:
    begin, end = window or (0, length)
    if not 0 <= begin < end <= length:
        raise ValueError(
            f"{name} {begin} to {end} are no window of {length} tokens: "
            f"give (begin, end) with 0 <= begin < end <= {length}"
        )
    return begin, end
