"""One layer's attention as a view needs it: whole where it is small, else pooled or from some rows.

With `explore` and `moment` this is what needs torch here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from llama4_lab.analysis.attention import (
    KeysAndQueries,
    Window,
    rows,
    summarise,
    tiles,
)
from llama4_lab.edits import ruled
from llama4_lab.model import Llama4
from llama4_lab.model.attention import visible
from llama4_lab.model.text import DecoderLayer
from llama4_lab.prompt import Prompt
from llama4_lab.replay import Edited
from llama4_lab.trace import trace
from llama4_widgets.moment import Moment, Reading
from llama4_widgets.panels import sequential

T = TypeVar("T")
MOST_CELLS = 1 << 24  # queries × keys of one picture: some 0.2 s on one core
_ROWS = 16  # at a time: 8 MB at 131,072 keys
_MOST_BYTES = 1 << 28  # of queries and keys that are kept of one run, or of a pattern


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer attends to, and by which rule."""

    uses_rope: bool
    chunk: int | None  # tokens; None where the layer sees the whole past
    pattern: Float[np.ndarray, "h t s"] | None  # NaN where nothing may be seen; None for `kept`
    kept: KeysAndQueries | Float[Tensor, "h t s"] | None  # what a long prompt's rows are read from
    known: dict[Any, Any] = field(default_factory=dict)  # of this layer, by question

    def once(self, question: Any, make: Callable[[], T]) -> T:
        """Return what is `known`, or is made now."""
        if question not in self.known:
            self.known[question] = make()
        return self.known[question]

    def rows(self, head: int, queries: Sequence[int]) -> Float[Tensor, "r s"]:
        """Return the attention of some queries to all tokens, exactly, from what is `kept`."""
        if isinstance(self.kept, KeysAndQueries):
            return rows(*self.kept.head(head), queries)
        assert self.kept is not None
        return self.kept[head, list(queries)]

    def row(self, head: int, query: int) -> Float[np.ndarray, " s"]:
        """Return a query's attention to all tokens, exactly; NaN where it may not look."""
        if self.pattern is not None:
            return self.pattern[head, query]
        share = self.rows(head, [query])[0].cpu().numpy()
        key = np.arange(len(share))
        first = 0 if self.chunk is None else query // self.chunk * self.chunk
        return np.where((key >= first) & (key <= query), share, np.nan)


def attended(moment: Moment, layer: int, is_whole: bool) -> list[tuple[str, Layer]]:
    """Return a layer's pattern in each of a moment's runs, or what it is made of.

    What the patterns of other layers are made of comes with it, of as many as fit. Edits of scores
    or pattern make the pattern itself needed.

    Raises:
        ValueError: such edits, and a pattern that takes more than `_MOST_BYTES`.
    """
    config, count = moment.model.config, len(moment.words)
    heads, names = config.num_attention_heads, ("scores", "pattern")
    if not moment.changed.isdisjoint(f"layers.{layer}.attn.{name}" for name in names):
        if (size := 4 * heads * count**2) > _MOST_BYTES:
            raise ValueError(
                f"edits change the scores of layer {layer}, whose pattern of {count} tokens takes "
                f"{size / 1e6:.3g} MB, more than {_MOST_BYTES / 1e6:.3g}: shorten the prompt, or "
                "choose another layer"
            )
        found = moment.runs(_pattern_of, layer)
    else:
        width = (heads + config.num_key_value_heads) * config.head_dim
        most = max(1, _MOST_BYTES // (4 * width * count))
        layers = range(config.num_hidden_layers)[layer // most * most :][:most]
        found = [(run, each[layer]) for run, each in moment.runs(_LAYERS, layers)]
    if not is_whole:
        return found
    return [(run, each.once(_in_whole, partial(_in_whole, each))) for run, each in found]


def _points(_moment: Moment, _alters: Any, layers: range) -> list[str]:
    return [f"layers.{i}.attn.rot_{x}" for i in layers for x in "qk"]


def _layers(moment: Moment, run: Edited, _points: Any, layers: range) -> dict[int, Layer]:
    found = {}
    with ruled(moment.model, run.edits):
        for i in layers:
            chunk = moment.model.chunks[i]
            q, k = (run.value(f"layers.{i}.attn.rot_{x}")[0].transpose(0, 1) for x in "qk")
            kept = KeysAndQueries(i, q, k, chunk)
            found[i] = Layer(_uses_rope(moment.model, i), chunk, None, kept)
    return found


_LAYERS = Reading(_points, _layers)


def _in_whole(layer: Layer) -> Layer:
    share = layer.kept
    if isinstance(share, KeysAndQueries):
        heads, count = share.q.shape[:2]
        share = torch.stack([layer.rows(head, range(count)) for head in range(heads)])
    assert share is not None
    at = torch.arange(share.shape[-1], device=share.device)[None]
    pattern = share.masked_fill(~visible(at, at, layer.chunk), float("nan")).cpu().numpy()
    return Layer(layer.uses_rope, layer.chunk, pattern, None)


def _pattern_of(model: Llama4, prompt: Prompt, layer: int) -> Layer:
    prompt, name = prompt.to(model.device), f"layers.{layer}.attn.pattern"
    with torch.no_grad(), trace(model, name) as cache:
        model.hidden(prompt.input_ids, prompt.pixel_values, prompt.attention_mask)
    return Layer(_uses_rope(model, layer), model.chunks[layer], None, cache[name][0].float())


def _uses_rope(model: Llama4, layer: int) -> bool:
    return cast(DecoderLayer, model.layers[layer]).self_attn.uses_rope


def pooled(
    layer: Layer, head: int, queries: Window, keys: Window, side: int, pooling: str
) -> tuple[Float[np.ndarray, "rows cols"], tuple[int, int], bool]:
    """Pool a window of a head's pattern (by "max" or "mean") into at most side × side cells.

    Returns the cells, NaN where nothing may be seen; the queries × keys that each stands for; and
    whether all of those were read: of more than `MOST_CELLS` it is each block's middle query.
    """
    tall, wide = (-(-(end - begin) // side) for begin, end in (queries, keys))
    chosen: Sequence[int] = range(*queries)
    if isinstance(layer.kept, KeysAndQueries):
        if len(chosen) * min(layer.chunk or queries[1], queries[1]) <= MOST_CELLS:
            q, k, chunk = layer.kept.head(head)
            found = tiles(q, k, chunk, block=(tall, wide), queries=queries, keys=keys)
            cells = np.where(found.visible > 0, getattr(found, pooling), np.nan)
            return cells, (tall, wide), True
        chosen = [min(i + tall // 2, queries[1] - 1) for i in chosen[::tall]]
    parts = []
    for i in range(0, len(chosen), _ROWS):
        some = chosen[i : i + _ROWS]
        share = layer.rows(head, some)[:, slice(*keys)]
        parts.append(_pool_keys(share, some, layer.chunk, keys, wide, pooling))
    cells, is_all = np.concatenate(parts), len(chosen) == queries[1] - queries[0]
    return _pool_queries(cells, tall if is_all else 1, pooling), (tall, wide), is_all


def _pool_keys(
    share: Float[Tensor, "r n"],
    queries: Sequence[int],
    chunk: int | None,
    keys: Window,
    width: int,
    pooling: str,
) -> Float[np.ndarray, "r cols"]:
    begin = np.arange(*keys, width)
    end = np.minimum(begin + width, keys[1])
    cells = F.pad(share, (0, -share.shape[1] % width)).unflatten(1, (-1, width))
    found = (
        cells.amax(2) if pooling == "max" else cells.sum(2) / torch.tensor(end - begin).to(share)
    )
    query = np.array(queries)[:, None]
    first = np.zeros_like(query) if chunk is None else query // chunk * chunk
    return np.where((begin <= query) & (end > first), found.cpu().numpy(), np.nan)


def glance(
    layer: Layer, border: int | None, side: int
) -> tuple[Float[np.ndarray, "h rows cols"], Float[np.ndarray, "h 4"], int]:
    """Return small maps of all heads (maxima), what the heads do on average, and a step.

    The averages are those of `llama4_lab.analysis.attention.HeadSummaries`: distance (tokens),
    entropy (nats), shares on the first visible key and across chunk borders; over one query in
    every `step`, which is 1 unless reading all takes long.
    """
    if layer.pattern is not None:
        at = range(layer.pattern.shape[1])
        every = [torch.from_numpy(np.nan_to_num(one)) for one in layer.pattern]
        means = [_averages(one, at, layer.chunk, border).mean(1) for one in every]
        return layer.pattern, np.stack(means), 1
    kept = layer.kept
    assert kept is not None
    count, length = (kept.q if isinstance(kept, KeysAndQueries) else kept).shape[:2]
    most = count * length * min(layer.chunk or length, length)
    if isinstance(kept, KeysAndQueries) and most <= MOST_CELLS:
        all_of_it = 0, length
        cells = [pooled(layer, i, all_of_it, all_of_it, side, "max")[0] for i in range(count)]
        means = [summarise(*kept.head(head), border=border).means for head in range(count)]
        return np.stack(cells), np.stack(means), 1
    step = -(-length // min(max(2 * MOST_CELLS // (count * length), side), length))
    queries = list(range(step // 2, length, step))
    maps, averages = [], []
    for head in range(count):
        small, sums = [], []
        for i in range(0, len(queries), _ROWS):
            some = queries[i : i + _ROWS]
            share = layer.rows(head, some)
            wide = -(-length // side)
            small.append(_pool_keys(share, some, layer.chunk, (0, length), wide, "max"))
            sums.append(_averages(share, some, layer.chunk, border))
        maps.append(_pool_queries(np.concatenate(small), -(-len(queries) // side), "max"))
        averages.append(np.concatenate(sums, axis=1).mean(1))
    return np.stack(maps), np.stack(averages), step


def _averages(
    share: Float[Tensor, "r s"], queries: Sequence[int], chunk: int | None, border: int | None
) -> Float[np.ndarray, "4 r"]:
    query = torch.tensor(list(queries), device=share.device)
    key = torch.arange(share.shape[1], device=share.device)
    first = torch.zeros_like(query) if chunk is None else query // chunk * chunk
    distance = query - share @ key.to(share.dtype)
    entropy = -torch.special.xlogy(share, share).sum(1)
    sink = share.gather(1, first[:, None])[:, 0]
    before = 0 * query if border is None else query // border * border
    crossing = (share * (key < before[:, None])).sum(1)
    return torch.stack([distance, entropy, sink, crossing]).cpu().double().numpy()


def _pool_queries(
    cells: Float[np.ndarray, "r c"], tall: int, pooling: str
) -> Float[np.ndarray, "rows c"]:
    """Pool rows in blocks of so many; what may not be seen counts as 0, and alone as NaN."""
    begin = np.arange(0, len(cells), tall)
    known, seen = np.nan_to_num(cells), np.logical_or.reduceat(np.isfinite(cells), begin)
    if pooling == "max":
        return np.where(seen, np.maximum.reduceat(known, begin), np.nan)
    count = np.diff(begin, append=len(cells))
    return np.where(seen, np.add.reduceat(known, begin) / count[:, None], np.nan)


def in_decades(share: Shaped[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Return the logarithm to base 10 of shares; NaN stays."""
    return np.log10(np.maximum(share, 1e-12))


def decades(tokens: int) -> dict[str, Any]:
    """Return a scale from a tenth of an even share to 1: on a linear one little is seen."""
    low = -np.ceil(np.log10(tokens)) - 1
    return sequential(low, 0, "share", "(log scale)") | {"log": True}
