"""Stages on the whole model: decode, prefill, long contexts, recorded routers, pictures."""

import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llama4_lab.bench.base import Bench, Row, counted
from llama4_lab.model.static import StaticDecoder
from llama4_lab.plan import PIECE, weight_bytes
from llama4_lab.trace import trace

# Goals of an H200 that copies 4.3 TB/s and multiplies 788 TFLOP/s, in tokens/s; another GPU's are
# scaled by its own measured rates.
_COPY, _MATRIX = 4.3e12, 788e12
_DECODE_GOALS = {(1, 4096): 300, (8, 4096): 720, (1, 16 * 8192): 160}
_SHARE_GOALS = {(64, 1024): 0.66}
_PREFILL_GOALS = {8192: 15_000}
_REPLAY_GOAL, _RECORD_GOAL = 1.8, 1.005

_GRAPH, _LAUNCHED = "graph", "decoder without graph"
_PATIENCE = 1.0  # seconds of a step of the plain model, beyond which it is not timed again
_OFF = 0.3  # of the logits of the median row: bfloat16 sends near ties to other experts


def build(bench: Bench) -> Iterator[Row]:
    """Seed the whole model on the device, packed as it is drawn."""
    bench.clock.forget_peak()
    start = time.perf_counter()
    tensors = [*bench.model.parameters(), *bench.model.buffers()]
    bench.clock.wait()
    seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in tensors)
    planned = weight_bytes(bench.config, bench.kind)["total"]
    yield Row(
        f"weights built, {bench.config.num_hidden_layers} layers, {bench.kind}",
        seconds,
        "s",
        peak=bench.clock.peak(),
        note=f"{held / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB",
    )


def decode(bench: Bench) -> Iterator[Row]:
    """One step of several rows; of one row also what graphs gain and what recording costs."""
    for batch, context in bench.scale.decode.items():
        yield from _decode(bench, batch, context)


def long(bench: Bench) -> Iterator[Row]:
    """One step of one row at the end of a long context."""
    for context in bench.scale.long:
        yield from _decode(bench, 1, context)


def _decode(bench: Bench, batch: int, context: int) -> Iterator[Row]:
    gc.collect()  # an earlier decoder is part of a cycle, and holds the weights that it joined
    bench.clock.forget_peak()
    ways = Ways(bench, batch, context)
    ways.check()
    seconds = bench.clock.compare(ways.calls, seconds=2.0)
    best = min(seconds, key=seconds.__getitem__)
    peak = bench.clock.peak()
    distinct = ways.distinct()
    floor = bench.plan.decode(batch, context, distinct).seconds
    told = [
        f"{way} {seconds[way] * 1e3:.2f} ms" for way in sorted(seconds, key=seconds.__getitem__)
    ]
    goal = None
    if number := _DECODE_GOALS.get((batch, context)):
        goal = bench.goal(number * bench.gpu.bandwidth / _COPY)
    elif share := _SHARE_GOALS.get((batch, context)):
        goal = bench.goal(share, of_share=True)
    yield Row(
        f"decode, {counted(batch, 'row')}, context {context:,}",
        batch / seconds[best],
        "tokens/s",
        share=floor / seconds[best],
        goal=goal,
        peak=peak,
        note=", ".join([*told, f"{distinct:.1f} experts a layer", *ways.notes]),
    )
    if {_GRAPH, _LAUNCHED} <= set(seconds) and (batch, context) == (1, 4096):
        yield Row(
            "a step launched by Python, over a graph's",
            seconds[_LAUNCHED] / seconds[_GRAPH],
            "times",
            goal=bench.goal(_REPLAY_GOAL),
        )


class Ways:
    """The ways to take one decode step, all behind the same random past."""

    def __init__(self, bench: Bench, batch: int, context: int):
        self.bench = bench
        self.last = context - 1
        self.ids = bench.ids(batch, 1)
        self.decoder = StaticDecoder(bench.model, batch, context)
        self.cache = self.decoder.cache
        generator = bench.generator()
        for layer in self.cache.layers:
            layer.buffer.normal_(generator=generator)
        self.calls: dict[str, Callable[[], Tensor]] = {
            "model": self.model,
            _LAUNCHED: self.launched,
        }
        if self.decoder.graph is not None:
            self.calls[_GRAPH] = self.replayed
        self.notes: list[str] = []

    def model(self) -> Tensor:
        """The plain model."""
        self.cache.slots, self.cache.pad = self.last, [0] * len(self.ids)
        return self.bench.model(self.ids, cache=self.cache, keep_last=1)[:, 0]

    def launched(self) -> Tensor:
        """The decoder's kernels, each launched by Python."""
        self.decoder.ids.copy_(self.ids[:, 0])
        self.decoder.slot.fill_(self.last)
        return self.decoder.run()

    def replayed(self) -> Tensor:
        """The decoder's step as it is used."""
        self.cache.slots = self.last
        self.decoder.told = -1, self.cache.pad  # the slot stands where the last step left it
        return self.decoder.step(self.ids[:, 0])

    def check(self) -> None:
        """Drop ways that cannot run, and compare the others' logits with the plain model's."""
        found: dict[str, Tensor] = {}
        for way, call in list(self.calls.items()):
            try:
                found[way] = call().float().clone()
            except RuntimeError as error:
                self.notes.append(f"{way}: {str(error).strip()[:100]}")
                del self.calls[way]
        if "model" in self.calls:
            start = time.perf_counter()
            self.model()
            self.bench.clock.wait()
            if (seconds := time.perf_counter() - start) > _PATIENCE:
                del self.calls["model"]
                self.notes.append(f"model {seconds * 1e3:,.0f} ms, timed once")
        expected = next(iter(found.values()))
        for way, logits in list(found.items())[1:]:
            off = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
            self.notes.append(f"{way} off by {off:.2g}")
            if not off <= _OFF:
                del self.calls[way]
                self.notes.append("which is too much, and not timed")

    def distinct(self) -> float:
        """Return how many experts the step hits, in the mean of its MoE layers."""
        logits = self.decoder.routed.flatten(0, 1).float()
        chosen = logits.topk(self.bench.config.num_experts_per_tok).indices
        layers = chosen.unflatten(0, self.decoder.routed.shape[:2])
        return sum(float(len(layer.unique())) for layer in layers) / max(1, len(layers))


def recorded(bench: Bench) -> Iterator[Row]:
    """A step of one row with all router logits kept, over one without; none in a dense model."""
    if not bench.config.routed_layers:
        return
    gc.collect()
    ways = Ways(bench, *next(iter(bench.scale.decode.items())))

    def watched() -> None:
        with trace(bench.model, "layers.*.router.logits"):
            ways.model()

    times = bench.clock.compare({"plain": ways.model, "recorded": watched})
    yield Row(
        "the model with routers traced, over without",
        times["recorded"] / times["plain"],
        "times",
    )
    if ways.decoder.graph is None:
        return
    keeping, routed = bench.clock.graphed(ways.launched), ways.decoder.routed
    ways.decoder.routed = [None] * len(routed)  # pyright: ignore[reportAttributeAccessIssue]
    dropping = bench.clock.graphed(ways.launched)
    ways.decoder.routed = routed
    times = bench.clock.compare({"dropping": dropping, "keeping": keeping})
    yield Row(
        "a graph that keeps router logits, over without",
        times["keeping"] / times["dropping"],
        "times",
        goal=bench.goal(_RECORD_GOAL, at_most=True),
    )


def prefill(bench: Bench) -> Iterator[Row]:
    """Prompts of one row, in pieces, up to the logits of the last token."""
    for tokens in bench.scale.prompts:
        ids = bench.ids(1, tokens)
        bench.clock.forget_peak()

        def prompt(ids: Tensor = ids) -> None:
            cache = bench.model.new_cache()
            for layer in cache.layers:
                layer.reserve(min(ids.shape[1], layer.chunk or ids.shape[1]))
            for piece in ids.split(PIECE, dim=1):
                bench.model(piece, cache=cache, keep_last=1)

        seconds = bench.clock.time(prompt, seconds=3.0)
        floor = bench.plan.prefill(tokens).seconds
        wanted = _PREFILL_GOALS.get(tokens, 0) * bench.gpu.bf16 / _MATRIX
        yield Row(
            f"prefill, {counted(tokens, 'token')}",
            tokens / seconds,
            "tokens/s",
            share=floor / seconds,
            goal=bench.goal(wanted) if wanted else None,
            peak=bench.clock.peak(),
            note=f"first token after {seconds * 1e3:,.0f} ms",
        )


def pictures(bench: Bench) -> Iterator[Row]:
    """The vision encoder on tiles; its weights are held beside the text decoder's."""
    if (vision := bench.config.vision_config) is None:
        return
    side, tiles = vision.image_size, bench.scale.tiles
    shape = (tiles, vision.num_channels, side, side)
    pixels = torch.randn(shape, generator=bench.generator(), device=bench.device).bfloat16()
    ids = torch.full((1, tiles * vision.tokens_per_tile), bench.config.image_token_index)
    ids = ids.to(bench.device)
    bench.clock.forget_peak()
    seconds = bench.clock.time(lambda: bench.model.embed(ids, pixels))
    yield Row(
        f"pictures, {counted(tiles, 'tile')} to {ids.shape[1]} tokens",
        tiles / seconds,
        "tiles/s",
        peak=bench.clock.peak(),
    )
