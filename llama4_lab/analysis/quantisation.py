"""What rounding the weights of a layer does to the routing and the predictions of a model.

Weights are rounded and multiplied out again, and everything runs in the model's own dtype: this
shows what a format loses, and saves no memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from llama4_lab.analysis import margins
from llama4_lab.analysis.routing import uniform_topk
from llama4_lab.checkpoint.quantised import require_plain, require_whole
from llama4_lab.config import Llama4Config
from llama4_lab.model import Llama4
from llama4_lab.trace import trace

KINDS = ("int8", "int4", "ternary")
GROUP = 32  # neighbours in a row that share an int4 scale
PARTS = {  # of a MoE layer (True) and of a dense one
    True: {
        "attention": "self_attn.",
        "router": "feed_forward.router.",
        "experts": "feed_forward.experts.",
        "shared": "feed_forward.shared_expert.",
    },
    False: {"attention": "self_attn.", "mlp": "feed_forward."},
}
Ids = Int[Tensor, "_ _"]  # b t; unnamed, since batches may differ


@dataclass(frozen=True, eq=False)
class Quantisation:
    """What rounding one layer at a time did; l runs over `layers`, r over `routers`."""

    kind: str
    layers: tuple[int, ...]  # rounded, one at a time
    routers: tuple[int, ...]  # the MoE layers
    loss: float  # of the clean run, nats per token
    change: Float[np.ndarray, " l"]  # of the loss, nats per token
    kl: Float[np.ndarray, " l"]  # of the rounded from the clean prediction, mean nats per token
    flips: Float[np.ndarray, "l r"]  # share of tokens whose experts changed, in [0, 1]


@torch.no_grad()
def quantisation(
    model: Llama4,
    batches: Sequence[Ids],
    kind: str,
    parts: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
) -> Quantisation:
    """Round one layer at a time, and compare each run with the clean one.

    Batches are token ids without padding; a row's last token is only predicted, never read. `parts`
    are those of `rounded`; `layers` are all that have them, unless given.

    Raises:
        ValueError: an unknown kind, a part that a layer does not have, nothing to predict, or a
            model whose weights are packed or divided among ranks.
    """
    require_whole(model, "rounding")
    config = model.config
    parts = None if parts is None else tuple(parts)
    every = range(config.num_hidden_layers)
    if layers is None:
        layers = [i for i in every if set(parts or ()) <= PARTS[config.is_moe(i)].keys()] or every
    layers = tuple(layers)
    _check_kind(kind)
    _check_layers(config, layers, parts)
    routers = config.routed_layers
    scored = count_predicted(batches)
    loss, change, kl = 0.0, np.zeros(len(layers)), np.zeros(len(layers))
    flips = np.zeros((len(layers), len(routers)))
    total = len(batches) * len(layers)
    with tqdm(total=total, desc=f"round to {kind}", unit="run", delay=2) as bar:
        for ids in batches:
            clean, clean_nats, clean_chosen = _run(model, ids, routers)
            loss += clean_nats / scored
            for row, layer in enumerate(layers):
                with rounded(model, layer, kind, parts):
                    mine, nats, chosen = _run(model, ids, routers)
                change[row] += (nats - clean_nats) / scored
                apart = F.kl_div(mine, clean, reduction="sum", log_target=True).item()
                kl[row] += max(apart, 0.0) / scored  # equal runs can sum to a hair below zero
                flips[row] += (chosen != clean_chosen).any(-1).sum(1).cpu().numpy() / scored
                bar.update()
    return Quantisation(kind, layers, routers, loss, change, kl, flips)


@contextmanager
def rounded(
    model: Llama4, layer: int, kind: str, parts: Iterable[str] | None = None
) -> Iterator[None]:
    """Let a layer compute with rounded weights inside the block.

    `parts` are "attention", "router", "experts" and "shared" of a MoE layer, "attention" and "mlp"
    of a dense one; None stands for all of them. Norms and biases stay. Blocks nest, so that many
    layers can be rounded.

    Raises:
        ValueError: a layer out of range, an unknown kind, a part that the layer does not have, or
            a model whose weights are packed or divided among ranks.
    """
    require_whole(model, "rounding")
    require_plain(model, "rounding")
    parts = None if parts is None else tuple(parts)
    _check_layers(model.config, (layer,), parts)
    of_layer = PARTS[model.config.is_moe(layer)]
    prefixes = tuple(of_layer[part] for part in (of_layer if parts is None else parts))
    block = model.layers[layer]
    with swapped(
        {
            (block, name): round_weight(weight, kind)
            for name, weight in block.named_parameters()
            if name.startswith(prefixes) and weight.ndim > 1
        }
    ):
        yield


@contextmanager
def swapped(weights: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Put tensors in place of parameters, given by module and dotted name, inside the block."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for (module, name), weight in weights.items():
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            before.append((owner, last, owner.get_parameter(last)))
            setattr(owner, last, nn.Parameter(weight, requires_grad=False))
        yield
    finally:
        for owner, last, parameter in reversed(before):
            setattr(owner, last, parameter)


@torch.no_grad()
def round_weight(weight: Float[Tensor, "*rows d"], kind: str) -> Float[Tensor, "*rows d"]:
    """Return a matrix, or a stack of them, with its weights rounded to the nearest of a format.

    int8 has 255 steps up to the largest weight of each row, int4 has 15 steps up to the largest of
    each 32 neighbours in a row. Ternary weights are -s, 0 or s, where s is the mean size of a
    matrix's weights (BitNet b1.58, Ma et al. 2024, eq. 1 to 3, there while training). What
    ``load(quantize=...)`` keeps in memory is coarser: scales in bfloat16, of 128 neighbours.

    >>> round_weight(torch.tensor([[0.1, -0.9, 2.0, 1.0]]), "ternary").tolist()
    [[0.0, -1.0, 1.0, 1.0]]

    Raises:
        ValueError: an unknown kind.
    """
    _check_kind(kind)
    w = weight.float()
    if kind == "ternary":
        size = w.abs().mean((-2, -1), keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return ((w / size).round().clamp(-1, 1) * size).to(weight.dtype)
    width = w.shape[-1]
    group = GROUP if kind == "int4" else width
    groups = F.pad(w, (0, -width % group)).unflatten(-1, (-1, group))
    whole = margins.rounded(groups.flatten(0, -2), kind).view_as(groups).flatten(-2)
    return whole[..., :width].to(weight.dtype)


def count_predicted(batches: Sequence[Ids]) -> int:
    """Count the tokens that have one before them.

    Raises:
        ValueError: there is none, or a row of a single token.
    """
    if not batches or any(ids[:, 1:].numel() == 0 for ids in batches):
        shapes = ", ".join(str(tuple(ids.shape)) for ids in batches) or "none"
        raise ValueError(f"batches of shapes {shapes}: each needs a row of two tokens or more")
    return sum(ids[:, 1:].numel() for ids in batches)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: weights can be {', '.join(KINDS)}")


def _check_layers(
    config: Llama4Config, layers: Iterable[int], parts: tuple[str, ...] | None
) -> None:
    for layer in layers:
        of_layer = PARTS[config.is_moe(layer)]
        for part in parts or ():
            if part not in of_layer:
                name = "MoE" if config.is_moe(layer) else "dense"
                raise ValueError(
                    f"layer {layer} is a {name} layer and has no part {part!r}: choose from "
                    f"{', '.join(of_layer)}"
                )


def _run(
    model: Llama4, ids: Ids, routers: Sequence[int]
) -> tuple[Float[Tensor, "n v"], float, Int[Tensor, "r n topk"]]:
    """Return log-probabilities, the sum of losses in nats, and the experts chosen, sorted."""
    ids = ids.to(model.device)
    points = [f"layers.{i}.router.indices" for i in routers]
    with trace(model, points) as cache:
        logprobs = model(ids[:, :-1]).float().log_softmax(-1).flatten(0, 1)
    nats = F.nll_loss(logprobs, ids[:, 1:].flatten(), reduction="sum").item()
    topk = uniform_topk(model) if routers else 0
    chosen = [cache[point].flatten(0, 1).sort(-1).values for point in points]
    return logprobs, nats, torch.stack(chosen) if chosen else ids.new_zeros(0, len(logprobs), topk)
