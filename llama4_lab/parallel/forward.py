"""The forward pass of a model whose parameters are one rank's parts."""

from collections.abc import Iterable
from functools import wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4_lab import experts
from llama4_lab.cache import KVCache
from llama4_lab.experts import loop
from llama4_lab.model import Llama4
from llama4_lab.model.text import DecoderLayer, DenseBlock, MoEBlock, _PerToken
from llama4_lab.parallel.ranks import Ranks
from llama4_lab.points import INSIDE, Tap


def join(model: Llama4, ranks: Ranks) -> Llama4:
    """Make a model whose parameters are this rank's parts compute with the other ranks."""
    model.ranks = ranks
    if model.config.tie_word_embeddings:
        ranks.take(model, "lm_head.weight", model.embed_tokens.weight.detach())
    model.lm_head.register_forward_hook(lambda _, __, logits: ranks.gather(cast(Tensor, logits)))
    model.register_forward_pre_hook(_checks_inputs(ranks, model), with_kwargs=True)
    for layer in cast(Iterable[DecoderLayer], model.layers):
        attention, block = layer.self_attn, layer.feed_forward
        for sums in (attention.o_proj, block.down_proj if isinstance(block, DenseBlock) else block):
            sums.register_forward_hook(lambda _, __, part: ranks.sum(cast(Tensor, part)))
    return _replace_methods(model, ranks).eval()


def _replace_methods(model: Llama4, ranks: Ranks) -> Llama4:
    """Let a model, or one apart from another that is divided, speak of whole values."""
    for layer in cast(Iterable[DecoderLayer], model.layers):
        attention, block = layer.self_attn, layer.feed_forward
        methods = ((attention, "mix"), (attention, "write"), (block, "forward"))
        for module, name in methods:
            vars(module).pop(name, None)  # of the other one's module
        if isinstance(block, MoEBlock) and ranks.experts == "placed":
            block.forward = PlacedExperts(block, ranks).forward
        for module, name in methods:
            _show_whole(module, name, ranks)
    vars(model).pop("apart", None)
    apart = model.apart
    model.apart = lambda: _replace_methods(apart(), ranks)
    return model


def _show_whole(module: nn.Module, name: str, ranks: Ranks) -> None:
    """Let the taps that are given to a method see whole values."""
    method = getattr(module, name)

    @wraps(method)
    def shown(*given: Any) -> Any:
        return method(*(_Whole(x, ranks) if isinstance(x, Tap) else x for x in given))

    setattr(module, name, shown)


class _Whole(Tap):
    """Shows a tap the values of all ranks as one, and goes on with this rank's part."""

    def __init__(self, tap: Tap, ranks: Ranks):
        self.tap = tap
        self.ranks = ranks
        self.watches = tap.watches

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if not self.watches(name):
            return self.tap(name, value)
        return self.ranks.mine(name, self.tap(name, self.ranks.whole(name, value)))


class PlacedExperts:
    """The forward pass of a MoE block of which this rank holds some experts whole."""

    def __init__(self, block: MoEBlock, ranks: Ranks):
        self.block = block
        self.ranks = ranks

    @property
    def weights(self) -> tuple[Any, Any]:
        return self.block.experts.gate_up_proj, self.block.experts.down_proj

    def forward(self, x: Float[Tensor, "b t d"], tap: Tap, backend: str) -> Float[Tensor, "b t d"]:
        rows, record = x.flatten(0, 1), _PerToken(tap, x.shape[:2])
        # On all ranks, before one waits for others.
        backend = experts.backend_for(rows, backend, self.weights[0])
        logits = record("router.logits", F.linear(rows, self.block.router.weight))
        expert, score = experts.route(logits, self.block.topk, record)
        run = self.run_watched if any(map(record.watches, INSIDE)) else self.run
        first = len(self.weights[1]) * self.ranks.rank
        routed = run(rows, expert - first, score, record, backend)
        return (record("shared.out", self.block.shared_expert(rows)) + routed).view_as(x)

    def run(
        self,
        rows: Float[Tensor, "n d"],
        expert: Int[Tensor, "n topk"],
        score: Float[Tensor, "n topk"],
        record: Tap,
        backend: str,
    ) -> Float[Tensor, "n d"]:
        """Run the choices that fell on this rank's experts, each as a token of its own.

        Args:
            expert: counts from this rank's first one.
        """
        held, out = len(self.weights[1]), torch.zeros_like(rows)
        slot = ((expert >= 0) & (expert < held)).flatten().nonzero()[:, 0]
        token = slot // expert.shape[1]
        expert, score = expert.flatten()[slot, None], score.flatten()[slot, None]
        if len(slot):
            order, offsets = experts.sort(expert, held)
            apply = experts.BACKENDS[backend]
            done = apply(rows[token], order, offsets, score, *self.weights)
            out.index_add_(0, token, done)
        return out

    def run_watched(
        self,
        rows: Float[Tensor, "n d"],
        expert: Int[Tensor, "n topk"],
        score: Float[Tensor, "n topk"],
        record: Tap,
        backend: str,
    ) -> Float[Tensor, "n d"]:
        """Equal `run` and show the values inside; here all choices run, those of others as zeros.

        An expert that reads zeros writes exactly zeros, so that sums over the ranks are whole.
        """
        is_here = (expert >= 0) & (expert < len(self.weights[1]))
        order, offsets = experts.sort(expert.where(is_here, 0), len(self.weights[1]))
        inside = _Scattered(record, is_here, self.ranks)
        return loop.apply(rows, order, offsets, score * is_here, *self.weights, record=inside)


class _Scattered(Tap):
    """Shows values that are zero where another rank has them, and goes on likewise."""

    def __init__(self, tap: Tap, is_here: Tensor, ranks: Ranks):
        self.tap = tap
        self.is_here = is_here[..., None]
        self.ranks = ranks
        self.watches = tap.watches

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if not self.watches(name):
            return value
        whole = self.tap(name, self.ranks.sum(value.clone()))
        return whole.where(self.is_here, 0)


def _checksum(x: Tensor) -> float:
    """Return a number that tells a tensor from others: a random sum of its bytes and its sizes."""
    sizes = torch.tensor(x.shape, dtype=torch.float64)
    held = [each.detach().cpu().contiguous().flatten().view(torch.uint8) for each in (sizes, x)]
    numbers = torch.cat(held).long()
    factors = torch.randint(1 << 62, numbers.shape, generator=torch.Generator().manual_seed(0))
    return float((numbers * factors).sum() & ((1 << 52) - 1))  # exact, in any order


def _checks_inputs(ranks: Ranks, model: Llama4) -> Any:
    """Refuse inputs that differ between ranks, and a cache of other heads; one small exchange."""
    heads = model.config.num_key_value_heads // ranks.size

    def check(
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        keep_last: int | None = None,
    ) -> None:
        found = [input_ids, pixel_values, attention_mask]
        sums = [0.0 if x is None else _checksum(x) for x in found]
        all_sums = ranks.gather(
            torch.tensor(sums, dtype=torch.float64, device=ranks.device)[:, None]
        )
        differ = (all_sums != all_sums[:, :1]).any(dim=1).tolist()
        names = ("input_ids", "pixel_values", "attention_mask")
        if wrong := [name for name, is_wrong in zip(names, differ, strict=True) if is_wrong]:
            raise ValueError(
                f"the ranks were given different {', '.join(wrong)}: run the same lines on each, "
                "with the same seeds"
            )
        if cache is not None and (held := cache.layers[0].buffer.shape[2]) != heads:
            raise ValueError(
                f"a cache for {held} key/value heads was given where each of {ranks.size} ranks "
                f"holds {heads}: make it with model.new_cache()"
            )

    return lambda _, given, named: check(*given, **named)
