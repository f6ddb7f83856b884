"""One layer's attention as a view needs it: whole where it is small, else pooled or from some rows.

With `explore` and `moment` this is what needs torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from llama4_lab.analysis.attention import (
    KeysAndQueries,
    Window,
    keys_and_queries_of,
    rows,
    summarise,
    tiles,
)
from llama4_lab.model import Llama4
from llama4_lab.model.attention import visible
from llama4_lab.model.text import DecoderLayer
from llama4_lab.prompt import Prompt
from llama4_lab.trace import trace
from llama4_widgets.panels import sequential

if TYPE_CHECKING:
    from llama4_widgets.moment import Moment

MOST_CELLS = 1 << 24  # queries × keys of one picture: some 0.2 s on one core
_ROWS = 16  # at a time: 8 MB at 131,072 keys
_TOGETHER = 1 << 28  # bytes of queries and keys that are kept of one run


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer attends to, and by which rule."""

    uses_rope: bool
    chunk: int | None  # tokens; None where the layer sees the whole past
    pattern: Float[np.ndarray, "h t s"] | None  # NaN where nothing may be seen; None for `kept`
    kept: KeysAndQueries | None

    def row(self, head: int, query: int) -> Float[np.ndarray, " s"]:
        """Return a query's attention to all tokens, exactly; NaN where it may not look."""
        if self.pattern is not None:
            return self.pattern[head, query]
        assert self.kept is not None
        share = rows(*self.kept.head(head), [query])[0].cpu().numpy()
        key = np.arange(len(share))
        first = 0 if self.chunk is None else query // self.chunk * self.chunk
        return np.where((key >= first) & (key <= query), share, np.nan)


def attended(moment: "Moment", layer: int, is_whole: bool) -> list[tuple[str, Layer]]:
    """Return a layer's pattern in each of a moment's runs, or what it is made of.

    Long prompts take long to run: what other layers' patterns are made of comes with it, of as many
    as fit.

    Raises:
        ValueError: as `keys_and_queries`, which reads what is not whole.
    """
    if is_whole:
        return moment.runs(_pattern_of, layer)
    config = moment.model.config
    changed = {point for edit in moment.edits for point in edit.changes(config)}
    unread = {
        i
        for i in range(config.num_hidden_layers)
        if not changed.isdisjoint(f"layers.{i}.attn.{name}" for name in ("scores", "pattern"))
    }
    heads = config.num_attention_heads + config.num_key_value_heads
    most = max(1, _TOGETHER // (4 * heads * config.head_dim * len(moment.words)))
    beside = range(config.num_hidden_layers)[layer // most * most :][:most]
    layers = tuple(i for i in beside if i == layer or not {i, layer} & unread)
    found = moment.runs(_layers_of, layers)
    return [(run, each[layers.index(layer)]) for run, each in found]


def _layers_of(model: Llama4, prompt: Prompt, layers: tuple[int, ...]) -> list[Layer]:
    found = keys_and_queries_of(model, prompt, layers)
    return [Layer(_uses_rope(model, kept.layer), kept.chunk, None, kept) for kept in found]


def _uses_rope(model: Llama4, layer: int) -> bool:
    return cast(DecoderLayer, model.layers[layer]).self_attn.uses_rope


def _pattern_of(model: Llama4, prompt: Prompt, layer: int) -> Layer:
    prompt, name = prompt.to(model.device), f"layers.{layer}.attn.pattern"
    with torch.no_grad(), trace(model, name) as cache:
        model.hidden(prompt.input_ids, prompt.pixel_values, prompt.attention_mask)
    share, chunk = cache[name][0].float(), model.chunks[layer]
    at = torch.arange(share.shape[-1], device=share.device)[None]
    pattern = share.masked_fill(~visible(at, at, chunk), float("nan")).cpu().numpy()
    return Layer(_uses_rope(model, layer), chunk, pattern, None)


def pooled(
    kept: KeysAndQueries, head: int, queries: Window, keys: Window, side: int, pooling: str
) -> tuple[Float[np.ndarray, "rows cols"], tuple[int, int], bool]:
    """Pool a window of a head's pattern (by "max" or "mean") into at most side × side cells.

    Returns the cells, NaN where nothing may be seen; the queries × keys that each stands for; and
    whether all of those were read: of more than `MOST_CELLS` it is each block's middle query.
    """
    q, k, chunk = kept.head(head)
    tall, wide = (-(-(end - begin) // side) for begin, end in (queries, keys))
    if (queries[1] - queries[0]) * min(chunk or queries[1], queries[1]) <= MOST_CELLS:
        found = tiles(q, k, chunk, block=(tall, wide), queries=queries, keys=keys)
        cells = np.where(found.visible > 0, getattr(found, pooling), np.nan)
        return cells, (tall, wide), True
    chosen = [min(i + tall // 2, queries[1] - 1) for i in range(*queries, tall)]
    parts = []
    for i in range(0, len(chosen), _ROWS):
        some = chosen[i : i + _ROWS]
        share = rows(q, k, chunk, some)[:, slice(*keys)]
        parts.append(_pool_keys(share, some, chunk, keys, wide, pooling))
    return np.concatenate(parts), (tall, wide), tall == 1


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
    assert layer.kept is not None
    kept = layer.kept
    count, length = kept.q.shape[:2]
    if count * length * min(kept.chunk or length, length) <= MOST_CELLS:
        all_of_it = 0, length
        cells = [pooled(kept, i, all_of_it, all_of_it, side, "max")[0] for i in range(count)]
        means = [summarise(*kept.head(head), border=border).means for head in range(count)]
        return np.stack(cells), np.stack(means), 1
    step = -(-length // min(max(2 * MOST_CELLS // (count * length), side), length))
    queries = list(range(step // 2, length, step))
    maps, averages = [], []
    for head in range(count):
        small, sums = [], []
        for i in range(0, len(queries), _ROWS):
            some = queries[i : i + _ROWS]
            share = rows(*kept.head(head), some)
            wide = -(-length // side)
            small.append(_pool_keys(share, some, kept.chunk, (0, length), wide, "max"))
            sums.append(_averages(share, some, kept.chunk, border))
        maps.append(_fewer(np.concatenate(small), side))
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
    return torch.stack([distance, entropy, sink, crossing]).double().cpu().numpy()


def _fewer(cells: Float[np.ndarray, "r c"], most: int) -> Float[np.ndarray, "rows c"]:
    """Pool rows by their maximum, until there are at most so many."""
    tall = -(-len(cells) // most)
    filled = np.pad(
        np.nan_to_num(cells, nan=-1), ((0, -len(cells) % tall), (0, 0)), constant_values=-1
    )
    found = filled.reshape(-1, tall, cells.shape[1]).max(1)
    return np.where(found < 0, np.nan, found)


def in_decades(share: Shaped[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Return the logarithm to base 10 of shares; NaN stays."""
    return np.log10(np.maximum(share, 1e-12))


def decades(tokens: int) -> dict[str, Any]:
    """Return a scale from a tenth of an even share to 1: on a linear one little is seen."""
    low = -np.ceil(np.log10(tokens)) - 1
    return sequential(low, 0, "share", "(log scale)") | {"log": True}
