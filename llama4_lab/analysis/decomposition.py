"""Which parts of the model wrote a logit: of the next token, or of a router.

The residual stream is a sum: the embedding, and what every head and every expert added. A logit is
a row of weights times that sum after a norm; with the norm's scale frozen at its value, each part
has its share, and the shares add up (direct logit attribution; Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"). A share says what was written, not what the model would say
without it: removing a part changes the scale and everything behind it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4_lab.analysis.lens import position_in, run
from llama4_lab.analysis.positions import refuse_words
from llama4_lab.checkpoint.quantised import require_whole
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.model.attention import visible
from llama4_lab.model.text import RMSNorm
from llama4_lab.packed import Packed
from llama4_lab.prompt import Prompt

_LABELS = {
    "embed": "token embedding",
    "patch": "image patch",
    "head": "layer {layer} head {index}",
    "text_source": "layer {layer} from position {index}",
    "patch_source": "layer {layer} from image patch at {index}",
    "bias": "layer {layer} attention bias",
    "mlp": "layer {layer} MLP",
    "shared": "layer {layer} shared expert",
    "expert": "layer {layer} expert {index}",
    "edit": "layer {layer}: an edit of what its heads wrote",
}


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A logit at `position`, or the difference of two, as a sum of parts in the order they wrote.

    Kinds are ``embed`` or ``patch`` (what entered at the position: a token's embedding or an image
    feature), ``head``, ``bias`` (of the heads' output, where there is one), ``mlp``, ``shared`` and
    ``expert``; heads split by what they read are ``text_source`` and ``patch_source``. Where an
    edit changes what all heads of a layer wrote together, ``edit`` is the difference.

    >>> kind, layer, index = ["embed", "head"], np.array([-1, 0]), np.array([4, 2])
    >>> parts = Decomposition(kind, layer, index, np.array([1.0, -3.0]), -2.0, 4, 7, None)
    >>> parts.strongest(1), parts.residual
    ([('layer 0 head 2', -3.0)], 0.0)
    """

    kind: list[str]
    layer: Int[np.ndarray, " parts"]  # -1 before the layers
    index: Int[np.ndarray, " parts"]  # of the head or expert, or the position read; -1 for none
    values: Float[np.ndarray, " parts"]  # in logits
    total: float  # the model's own
    position: int
    target: int  # token id or expert
    versus: int | None  # whose logit is subtracted

    @property
    def residual(self) -> float:
        """How far the sum of the parts is from the model's own number, in logits."""
        return abs(float(self.values.sum()) - self.total)

    @property
    def labels(self) -> list[str]:
        """The parts' names, for display."""
        parts = zip(self.kind, self.layer, self.index, strict=True)
        return [_LABELS[kind].format(layer=layer, index=index) for kind, layer, index in parts]

    def strongest(self, count: int = 10) -> list[tuple[str, float]]:
        """Return the parts of largest size, either sign, as labels and values."""
        labels = self.labels
        order = np.argsort(-np.abs(self.values), kind="stable")[:count]
        return [(labels[i], float(self.values[i])) for i in order]

    def by_kind(self) -> dict[str, float]:
        """Return the sums over the parts of each kind."""
        return _sums(self.kind, self.values)

    def by_layer(self) -> dict[int, float]:
        """Return the sums over the parts of each layer; -1 is what entered before the layers."""
        return _sums(self.layer.tolist(), self.values)


@torch.no_grad()
def written(model: Llama4, prompt: Prompt) -> dict[str, Tensor]:
    """Run a prompt once and keep what all parts wrote, and where, to ask many questions about it.

    That is about five times the residual stream of every layer, on the model's device.
    """
    return run(model, prompt, written_points(model.config, model.tap.alters))


def written_points(config: Llama4Config, alters: Callable[[str], bool]) -> list[str]:
    """Return the points that `written` keeps, in a run whose edits alter some."""
    layers = config.num_hidden_layers
    stream = [f"layers.{i}.{half}" for i in range(layers) for half in ("resid_mid", "resid_post")]
    routers = [f"layers.{i}.router.logits" for i in config.routed_layers]
    behind = ["final_norm", *filter(alters, ["logits"])]
    return [*_parts(config, 2 * layers, False, alters), *stream, *behind, *routers]


@torch.inference_mode()
def decompose_logit(
    model: Llama4,
    prompt: Prompt,
    position: int = -1,
    target: int | None = None,
    versus: int | Literal["runner_up"] | None = None,
    *,
    sources: bool = False,
    kept: dict[str, Tensor] | None = None,
) -> Decomposition:
    """Split a next-token logit, or the difference of two, into the parts of the model.

    One forward pass. In float32 the parts sum to the model's logit within 1e-4; in bfloat16 the
    stream is rounded after each part. `Decomposition.residual` says how much that took, and what
    edits of the stream itself, of the final norm or of logits did, which is in no part.

    Args:
        position: of the token that the logits follow; -1 is the last one.
        target: a token id; None is the likeliest.
        versus: a token id whose logit is subtracted, or "runner_up": the likeliest token that is
            neither `target` nor the likeliest of all.
        sources: split each layer's heads by the positions they read instead of by head. The rows of
            the pattern come from `attn.rot_q` and `attn.rot_k`, so nothing behind them may be
            changed.
        kept: of `written`, in place of a pass; not with `sources`.

    Raises:
        ValueError: a prompt of several rows; a position or token out of range; with `sources`, a
            call inside a block that changes scores, patterns or what heads gather; a model that is
            divided among ranks.
    """
    require_whole(model, "decomposing a logit")
    t = position_in(prompt, position)
    halves = 2 * model.config.num_hidden_layers
    stream = f"layers.{halves // 2 - 1}.resid_post"
    cache = kept or _run(model, prompt, halves, sources, [stream, "final_norm"])
    logits = model.lm_head(cache["final_norm"][0, t])
    if (altered := cache.get("logits")) is not None:
        logits = altered[0, t]
    ids = f"this vocabulary has ids 0 to {len(logits) - 1}"
    pair = _choose(
        logits, logits.argmax()[None], target, versus, f"token id {{}} is out of range: {ids}"
    )
    direction = _direction(model.norm, cache[stream][0, t], model.lm_head.weight, pair)
    parts = _split(model, cache, prompt, t, direction, halves, sources)
    return _collect(parts, logits, t, pair)


@torch.inference_mode()
def decompose_router(
    model: Llama4,
    prompt: Prompt,
    layer: int,
    position: int = -1,
    expert: int | None = None,
    versus: int | Literal["runner_up"] | None = None,
    *,
    sources: bool = False,
    kept: dict[str, Tensor] | None = None,
) -> Decomposition:
    """Split a router logit ("why this expert?"), or the difference of two, into what came before.

    The router reads the stream behind the heads of its own layer, through the layer's second norm.
    Cost and accuracy are those of `decompose_logit`.

    Args:
        layer: a MoE layer.
        position: of the token that is routed; -1 is the last one.
        expert: None is the strongest chosen one.
        versus: an expert whose logit is subtracted, or "runner_up": the best one that was not
            chosen and is not `expert`.
        sources, kept: as in `decompose_logit`.

    Raises:
        ValueError: a prompt of several rows; a layer without experts; a position or expert out of
            range; no runner-up, because all experts are chosen; otherwise as `decompose_logit`.
    """
    require_whole(model, "decomposing a router's logit")
    t = position_in(prompt, position)
    moe = model.config.routed_layers
    if layer not in moe:
        known = ", ".join(map(str, moe)) or "none"
        raise ValueError(f"layer {layer} has no experts: the MoE layers are {known}")
    halves = 2 * layer + 1
    read = [f"layers.{layer}.{name}" for name in ("resid_mid", "router.logits", "router.indices")]
    cache = kept or _run(model, prompt, halves, sources, read)
    stream, logits, chosen = (cache[name][0, t] for name in read)
    known = f"layer {layer} has experts 0 to {len(logits) - 1}"
    pair = _choose(logits, chosen, expert, versus, f"expert {{}} is out of range: {known}")
    block: Any = model.layers[layer]
    rows = block.feed_forward.router.weight
    direction = _direction(block.post_attention_layernorm, stream, rows, pair)
    parts = _split(model, cache, prompt, t, direction, halves, sources)
    return _collect(parts, logits, t, pair)


class _Pair(NamedTuple):
    target: int
    versus: int | None


def _choose(
    logits: Float[Tensor, " options"],
    chosen: Int[Tensor, " topk"],
    target: int | None,
    versus: int | Literal["runner_up"] | None,
    out_of_range: str,
) -> _Pair:
    """Check both options, and fill in the strongest chosen one and the best of the others."""
    if target is None:
        target = int(chosen[0])
    for option in (target,) if versus in (None, "runner_up") else (target, versus):
        refuse_words(option)
        if not 0 <= option < len(logits):
            raise ValueError(out_of_range.format(option))
    if versus == "runner_up":
        others = logits.index_fill(0, chosen, float("-inf"))
        others[target] = float("-inf")
        if not others.isfinite().any():
            raise ValueError(
                f"there is no runner-up, for all {len(logits)} are chosen: give the one to compare"
            )
        versus = int(others.argmax())
    return _Pair(target, versus)


def _direction(
    norm: RMSNorm,
    stream: Float[Tensor, " d"],
    rows: Float[Tensor, "options d"] | Packed,
    pair: _Pair,
) -> Float[Tensor, " d"]:
    """Return what the stream is multiplied by to give the logit, with the norm's scale frozen."""
    row = rows[pair.target].float()
    if pair.versus is not None:
        row = row - rows[pair.versus].float()
    return row * norm.weight.float() * (stream.float().square().mean() + norm.eps).rsqrt()


# The stream is written in halves: half 2i is the attention of layer i, half 2i + 1 what follows it.


def _run(
    model: Llama4, prompt: Prompt, halves: int, sources: bool, names: Iterable[str]
) -> dict[str, Tensor]:
    """Run the prompt and keep the named values, and what the first halves wrote."""
    if sources:
        _refuse_changed_patterns(model, (halves + 1) // 2)
    return run(model, prompt, [*_parts(model.config, halves, sources, model.tap.alters), *names])


def _parts(
    config: Llama4Config, halves: int, sources: bool, alters: Callable[[str], bool]
) -> list[str]:
    """Name what the first halves wrote."""
    written = [
        f"layers.{half // 2}.{name}"
        for half in range(halves)
        for name in _writers(config, half, sources)
    ]
    outs = (f"layers.{half // 2}.attn.out" for half in range(0, halves, 2))
    return ["embed", *written, *filter(alters, outs)]


def _refuse_changed_patterns(model: Llama4, layers: int) -> None:
    for layer in range(layers):
        for part in ("scores", "pattern", "z"):
            if model.tap.alters(name := f"layers.{layer}.attn.{part}"):
                raise ValueError(
                    f"{name} is changed here, and sources=True makes patterns of queries and keys "
                    "alone: leave that block, or split by heads"
                )


def _writers(config: Llama4Config, half: int, sources: bool) -> list[str]:
    """Name the values that a half's parts are made of, without the layer."""
    layer, follows = divmod(half, 2)
    if not follows:
        return ["attn.rot_q", "attn.rot_k", "attn.v"] if sources else ["attn.z"]
    if config.is_moe(layer):
        return ["shared.out", "experts.out", "router.indices"]
    return ["mlp.out"]


class _Written(NamedTuple):
    """Parts of one kind, from one half of a layer."""

    kind: str
    index: list[int]
    values: Float[Tensor, " parts"]


def _split(
    model: Llama4,
    cache: dict[str, Tensor],
    prompt: Prompt,
    t: int,
    direction: Float[Tensor, " d"],
    halves: int,
    sources: bool,
) -> Iterator[tuple[int, _Written]]:
    """Yield the layers' parts, each with its share of ``stream[t] @ direction``."""
    is_patch = prompt.input_ids[0].cpu() == model.config.image_token_index
    if prompt.pixel_values is None:
        is_patch = torch.zeros_like(is_patch)
    entered = cache["embed"][0, t, None].float() @ direction
    yield -1, _Written("patch" if is_patch[t] else "embed", [t], entered)
    for half in range(halves):
        layer, follows = divmod(half, 2)
        names = _writers(model.config, half, sources)
        at = {name: cache[f"layers.{layer}.{name}"][0] for name in names}
        block: Any = model.layers[layer]
        parts = (
            _fed(at, t, direction)
            if follows
            else _attended(block.self_attn, at, t, direction, prompt, is_patch)
        )
        wrote = [*parts]
        if not follows and (altered := cache.get(f"layers.{layer}.attn.out")) is not None:
            together = torch.cat([each.values for each in wrote]).sum()
            more = altered[0, t, None].float() @ direction - together
            wrote.append(_Written("edit", [-1], more))
        for written in wrote:
            yield layer, written


def _fed(at: dict[str, Tensor], t: int, direction: Float[Tensor, " d"]) -> Iterator[_Written]:
    for name, kind in (("mlp.out", "mlp"), ("shared.out", "shared")):
        if name in at:
            yield _Written(kind, [-1], at[name][t, None].float() @ direction)
    if "experts.out" in at:
        values = at["experts.out"][t].float() @ direction
        yield _Written("expert", at["router.indices"][t].tolist(), values)


def _attended(
    attention: Any,
    at: dict[str, Tensor],
    t: int,
    direction: Float[Tensor, " d"],
    prompt: Prompt,
    is_patch: Bool[Tensor, " s"],
) -> Iterator[_Written]:
    weight, bias = attention.o_proj.weight, attention.o_proj.bias
    heads = rearrange(direction @ weight.float(), "(h dh) -> h dh", dh=attention.head_dim)
    if "attn.z" in at:
        values = (at["attn.z"][t].float() * heads).sum(dim=-1)
        yield _Written("head", list(range(len(heads))), values)
    else:
        seen = _seen(prompt, t, attention.chunk)
        values = _by_source(at, t, seen, heads)
        for kind, mask in (("text_source", ~is_patch[seen]), ("patch_source", is_patch[seen])):
            yield _Written(kind, seen[mask].tolist(), values[mask])
    if bias is not None:
        yield _Written("bias", [-1], bias[None].float() @ direction)


def _seen(prompt: Prompt, t: int, chunk: int | None) -> Int[Tensor, " s"]:
    """Return the positions that attention at position t reads."""
    slot = torch.arange(prompt.input_ids.shape[1])
    position = slot[None] - (prompt.attention_mask[0] == 0).sum().cpu()  # padding is negative
    return slot[visible(position[:, t, None], position, chunk)[0, 0]]


def _by_source(
    at: dict[str, Tensor], t: int, seen: Int[Tensor, " s"], heads: Float[Tensor, "h dh"]
) -> Float[Tensor, " s"]:
    """Return what all heads at position t take from each seen position to the logit.

    One row of the pattern is made from q and k; a head's share is linear in the values it mixes.
    """
    k, v = at["attn.rot_k"][seen].float(), at["attn.v"][seen].float()
    q, heads = (
        rearrange(x, "(k g) dh -> k g dh", k=k.shape[1])
        for x in (at["attn.rot_q"][t].float(), heads)
    )
    pattern = (einsum(q, k, "k g dh, s k dh -> k g s") * q.shape[-1] ** -0.5).softmax(dim=-1)
    return einsum(pattern, einsum(v, heads, "s k dh, k g dh -> k g s"), "k g s, k g s -> s")


def _collect(
    parts: Iterable[tuple[int, _Written]], logits: Float[Tensor, " options"], t: int, pair: _Pair
) -> Decomposition:
    parts, logits = list(parts), logits.float()
    total = logits[pair.target] - (0.0 if pair.versus is None else logits[pair.versus])
    return Decomposition(
        kind=[written.kind for _, written in parts for _ in written.index],
        layer=np.array([layer for layer, written in parts for _ in written.index]),
        index=np.array([idx for _, written in parts for idx in written.index]),
        values=torch.cat([written.values for _, written in parts]).cpu().double().numpy(),
        total=float(total),
        position=t,
        target=pair.target,
        versus=pair.versus,
    )


def _sums(keys: Iterable[Any], values: Iterable[float]) -> dict[Any, float]:
    sums: dict[Any, float] = {}
    for key, value in zip(keys, values, strict=True):
        sums[key] = sums.get(key, 0.0) + float(value)
    return sums
