"""How close each routing decision is to another one, and which ones rounding may change.

A token's experts change when a rival's logit overtakes that of a chosen expert. Both logits are
inner products with the same vector, so that the border between two experts is a plane.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4_lab.analysis.routing import moe_layers
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt
from llama4_lab.trace import trace

WHAT = {"router": (True, False), "input": (False, True), "both": (True, True)}
LARGEST = {"int8": 127, "int4": 7}  # integers on either side of zero; a row's absmax is the last


@dataclass(frozen=True, eq=False)
class Margins:
    """How far the decisions about the n tokens of a prompt are from flipping, by MoE layer.

    `margin` is in logits, `distance` in the residual stream that the layer's experts read
    (``layers.{i}.resid_mid``), `deviations` in standard errors of the rounding noise.
    """

    layers: tuple[int, ...]
    margin: Float[np.ndarray, "l n"]
    distance: Float[np.ndarray, "l n"]
    deviations: Float[np.ndarray, "l n"]
    flipped: Bool[np.ndarray, "l n"]  # with the router, its input or both really rounded

    def predicted(self, reach: float = 3.0) -> Bool[np.ndarray, "l n"]:
        """Return the decisions that noise of `reach` standard errors can flip."""
        return self.deviations < reach

    @property
    def expected_flips(self) -> Float[np.ndarray, " l"]:
        """Return how many flips normal noise would make in each layer, nearest rivals alone.

        That is a few too few where noise is so strong that second rivals matter (int4).
        """
        return (torch.erfc(torch.from_numpy(self.deviations) / 2**0.5) / 2).sum(-1).numpy()

    def recall(self, reach: float = 3.0) -> float:
        """Return the share of the real flips that were predicted; 1 if nothing flipped."""
        return _share(self.predicted(reach)[self.flipped])

    def precision(self, reach: float = 3.0) -> float:
        """Return the share of the predicted flips that are real; 1 if none was predicted."""
        return _share(self.flipped[self.predicted(reach)])


@torch.inference_mode()
def margins(model: Llama4, prompt: Prompt, format: str, what: str = "both") -> Margins:
    """Measure the decisions about a prompt, and predict which ones a format flips.

    Each layer is taken by itself: its input is that of the unrounded model, so that flips do not
    carry over to later layers.

    Raises:
        ValueError: a model without MoE layers, an unknown format or part to round, or a call inside
            a block that changes what a router says.
    """
    layers = moe_layers(model)
    for name in (f"layers.{i}.router.{part}" for i in layers for part in ("logits", "indices")):
        if model.tap.alters(name):
            raise ValueError(
                f"{name} is changed here, and margins are those of the router's weights: leave "
                "that block"
            )
    prompt = prompt.to(model.device)
    with trace(model, [f"layers.{i}.resid_mid" for i in layers]) as cache:
        model.hidden(prompt.input_ids, prompt.pixel_values, prompt.attention_mask)
    found = []
    for i in layers:
        block: Any = model.layers[i]
        topk = block.feed_forward.topk
        resid = cache[f"layers.{i}.resid_mid"][prompt.attention_mask.bool()]
        norm, router = block.post_attention_layernorm, block.feed_forward.router.weight.float()
        x = norm(resid).float()
        found.append(
            (
                margin(x, router, topk),
                flip_distance(resid.float(), router * norm.weight.float(), topk),
                deviations(x, router, format, what, topk),
                flipped(x, router, format, what, topk),
            )
        )
    return Margins(layers, *(torch.stack(rows).cpu().numpy() for rows in zip(*found, strict=True)))


def margin(
    x: Float[Tensor, "n d"], router: Float[Tensor, "e d"], topk: int = 1
) -> Float[Tensor, " n"]:
    """Return how many logits the weakest chosen expert is above the best of the others."""
    return _gaps(x @ router.T, topk)[1].amin((1, 2))


def flip_distance(
    x: Float[Tensor, "n d"], router: Float[Tensor, "e d"], topk: int = 1
) -> Float[Tensor, " n"]:
    """Return the length of the shortest change of x that changes its experts.

    It is the least ``(logit_a - logit_b) / |w_a - w_b|`` over chosen a and others b; the nearest
    rival need not be the one with the next best logit. With the residual stream as x and the weight
    of the norm multiplied into the router, it is the distance in the residual stream: RMSNorm
    scales all logits of a token alike, and moves no border.
    """
    chosen, gap = _gaps(x @ router.T, topk)
    apart = torch.cdist(router, router, compute_mode="donot_use_mm_for_euclid_dist")[chosen]
    return (gap / apart.clamp_min(torch.finfo(apart.dtype).tiny)).amin((1, 2))


def deviations(
    x: Float[Tensor, "n d"],
    router: Float[Tensor, "e d"],
    format: str,
    what: str = "both",
    topk: int = 1,
) -> Float[Tensor, " n"]:
    """Return the margin in standard errors of the noise that rounding makes, for the worst rival.

    Rounding errors are taken for independent and uniform over a step of the format (Widrow 1956):
    each has the variance ``step² / 12``. The rounded weights are not looked at, so that numbers
    which the format holds exactly count as if they were rounded.

    Raises:
        ValueError: an unknown format, or something else than router, input or both to round.
    """
    of_router, of_input = _parts(what)
    chosen, gap = _gaps(x @ router.T, topk)
    variance = torch.zeros_like(gap)
    if of_router:
        of_logit = x.square() @ step(router, format).square().T / 12
        variance += of_logit.gather(1, chosen)[..., None] + of_logit[:, None]
    if of_input:
        noise = step(x, format).square() / 12
        alone = noise @ router.square().T
        shared = torch.einsum("nd,nkd,ed->nke", noise, router[chosen], router)
        variance += (alone.gather(1, chosen)[..., None] + alone[:, None] - 2 * shared).clamp_min(0)
    return (gap / variance.sqrt().clamp_min(torch.finfo(gap.dtype).tiny)).amin((1, 2))


def flipped(
    x: Float[Tensor, "n d"],
    router: Float[Tensor, "e d"],
    format: str,
    what: str = "both",
    topk: int = 1,
) -> Bool[Tensor, " n"]:
    """Return whose experts change when the router, its input x or both are really rounded."""
    of_router, of_input = _parts(what)
    to_router = rounded(router, format) if of_router else router
    to_x = rounded(x, format) if of_input else x
    before, after = ((a @ b.T).topk(topk).indices for a, b in ((x, router), (to_x, to_router)))
    return (before.sort(-1).values != after.sort(-1).values).any(-1)


def rounded(x: Float[Tensor, "rows d"], format: str) -> Float[Tensor, "rows d"]:
    """Round to the nearest number of a format; int8 and int4 scale each row by its largest."""
    if format == "bf16":
        return x.bfloat16().to(x.dtype)
    size = step(x, format)
    return torch.where(size > 0, (x / size).round() * size, x)


def step(x: Float[Tensor, "rows d"], format: str) -> Float[Tensor, "rows d"]:
    """Return how far apart the numbers of a format lie around each value.

    Raises:
        ValueError: an unknown format.
    """
    if format == "bf16":  # 8 significant bits; frexp's mantissa lies in [0.5, 1)
        return torch.ldexp(torch.ones_like(x), x.frexp().exponent - 8) * (x != 0)
    if format not in LARGEST:
        known = ", ".join(["bf16", *LARGEST])
        raise ValueError(f"unknown format {format!r}: it can be {known}")
    return (x.abs().amax(-1, keepdim=True) / LARGEST[format]).expand_as(x)


def _gaps(
    logits: Float[Tensor, "n e"], topk: int
) -> tuple[Int[Tensor, "n topk"], Float[Tensor, "n topk e"]]:
    """Return the chosen experts and their lead over each expert; infinite among themselves."""
    top = logits.topk(topk)
    others = logits.scatter(1, top.indices, float("-inf"))
    return top.indices, top.values[..., None] - others[:, None]


def _parts(what: str) -> tuple[bool, bool]:
    """Return whether the router and whether its input is rounded."""
    if what not in WHAT:
        raise ValueError(f"cannot round {what!r}: it can be {', '.join(WHAT)}")
    return WHAT[what]


def _share(hits: Bool[np.ndarray, " n"]) -> float:
    return float(hits.mean()) if hits.size else 1.0
