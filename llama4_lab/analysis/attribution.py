"""What a prediction owes to each part: tokens, image patches, experts, router decisions.

`llama4_lab.analysis.features` and `llama4_lab.analysis.expert_features` say what the parts are;
`attribute` hands any of them to captum. Attacks on pictures are in
`llama4_lab.analysis.robustness`, and captum's own methods for language models take what
`llama4_lab.analysis.captum_models` returns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from llama4_lab.analysis.features import NEXT_TOKEN, Features, Target, token_features
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt

METHODS = {  # our names of captum's classes
    "feature_ablation": "FeatureAblation",
    "shapley": "ShapleyValues",
    "shapley_sampling": "ShapleyValueSampling",
    "integrated_gradients": "IntegratedGradients",
}
_LEAST = 0.1  # nats or logits of change; a share of less than that is not worth chasing
_POINTS = 16  # on each piece of the way from all off to all on
_MOST_EXACT = 8  # features; their 40,320 orders take some 10 seconds to walk through


@dataclass(frozen=True, eq=False)
class Attribution:
    """What captum gave each feature of the target's change from all off to all on."""

    axes: tuple[str, ...]
    places: Int[np.ndarray, "k axes"]
    labels: list[str]
    values: Float[np.ndarray, " k"]  # in the target's unit
    all_on: float
    all_off: float
    method: str
    target: Target
    fixed_routing: bool

    @property
    def completeness_error(self) -> float:
        """How far the values miss ``all_on - all_off`` in total, as a share of it.

        Zero up to rounding for Shapley values; for integrated gradients and conductance the error
        of the integral, jumps of the routing included; ablation promises nothing.

            >>> ab = (np.array([[0], [1]]), ["a", "b"], np.array([3.0, 1.0]))
            >>> two = Attribution(("token",), *ab, 5.0, 0.0, "shapley", NEXT_TOKEN, False)
            >>> two.completeness_error
            0.2
        """
        change = self.all_on - self.all_off
        missing = abs(float(self.values.sum()) - change)
        if change:
            return missing / abs(change)
        return math.inf if missing else 0.0


@torch.inference_mode(False)  # gradients are taken wherever this stands
def attribute(
    features: Features,
    method: str = "shapley_sampling",
    *,
    samples: int = 25,
    max_pieces: int = 64,
    tolerance: float = 0.005,
    batch_size: int = 16,
    fixed_routing: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Attribution:
    """Divide the target among features by a method of captum.

    - ``feature_ablation``: what is lost when one feature is turned off.
    - ``shapley``: the mean gain of turning a feature on, over all orders (Shapley 1953); every
      coalition is run once, so 8 features cost 256 runs.
    - ``shapley_sampling``: the same over `samples` random orders (Castro et al. 2009).
    - ``integrated_gradients``: the gradient on the straight way from all off to all on
      (Sundararajan et al. 2017, eq. 1), at 16 points of Gauss and Legendre. The piece of the way
      that misses most of its part of the change is halved into pieces of 16 points each, until all
      together miss less than `tolerance` (a share of the change, or of 0.1 if it is smaller),
      or there are `max_pieces`.

    Args:
        batch_size: runs in one forward pass.
        fixed_routing: let each token keep the clean run's experts. When they may change, the
            target jumps where they do; gradients do not see jumps, and integrated gradients are
            not complete then. None fixes the routing for integrated gradients only.
        progress: show a bar where it takes long.

    Raises:
        ValueError: an unknown method, or more features than exact Shapley values take.
    """
    from captum import attr

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    count = len(features.labels)
    if method == "shapley" and count > _MOST_EXACT:
        raise ValueError(
            f"exact Shapley values take at most {_MOST_EXACT} features, these are {count}: "
            "choose fewer, or 'shapley_sampling'"
        )
    if fixed_routing is None:
        fixed_routing = method == "integrated_gradients"

    def value(on: Tensor) -> Tensor:
        return features.value(on, fixed_routing)

    ends = features.ends(fixed_routing)
    on = torch.ones(1, count, device=features.device)
    if method == "integrated_gradients":
        rule = attr.IntegratedGradients(value)
        spread = partial(rule.attribute, n_steps=_POINTS, internal_batch_size=batch_size)
        values = _along(spread, value, on, tolerance, max_pieces, progress)
        return _attribution(features, values, ends, method, fixed_routing)
    options = {"perturbations_per_eval": batch_size}
    if method == "shapley_sampling":
        options["n_samples"] = samples
    bar = tqdm(desc=method, unit="run", delay=2, disable=not progress)

    def counted(on: Tensor) -> Tensor:
        bar.update(len(on))
        return value(on)

    rule = getattr(attr, METHODS[method])(_remembering(counted))
    with bar, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where captum draws
        values = rule.attribute(on, baselines=0, **options)[0]
    return _attribution(features, values, ends, method, fixed_routing)


@torch.inference_mode(False)  # gradients are taken wherever this stands
def conductance(
    model: Llama4,
    prompt: Prompt,
    layer: int,
    target: Target = NEXT_TOKEN,
    *,
    baseline: str | int | Float[Tensor, " d"] = "pad",
    max_pieces: int = 64,
    tolerance: float = 0.005,
    batch_size: int = 16,
    progress: bool = True,
) -> Attribution:
    """Say how much of the tokens' effect passes the residual stream behind a layer, by position.

    captum's layer conductance (Dhamdhere et al. 2018, eq. 2) of ``layers.{layer}.resid_post``,
    summed over its width, on the way from the baseline (see `token_features`) to the prompt. The
    positions of one layer hold all that passes, so they add up to ``all_on - all_off``. The routing
    is fixed; `max_pieces` and `tolerance` are those of `attribute`.

    Raises:
        ValueError: a layer that the model does not have, and as `token_features`.
    """
    from captum.attr import LayerConductance

    model.config.check_layer(layer)
    features = token_features(model, prompt, target, baseline=baseline)

    def value(on: Tensor) -> Tensor:
        return features.value(on, True)

    conductor: Any = LayerConductance(value, model.layers[layer])
    rule = partial(
        conductor.attribute,
        n_steps=_POINTS,
        method="riemann_trapezoid",  # of captum's, the one whose points include both ends
        internal_batch_size=batch_size,
    )

    def spread(on: Tensor, baselines: Tensor) -> Tensor:
        # captum takes the gradient at the start of each step: both directions make a trapezoid
        return (rule(on, baselines=baselines) - rule(baselines, baselines=on)).sum(dim=-1) / 2

    on = torch.ones(1, len(features.labels), device=features.device)
    values = _along(spread, value, on, tolerance, max_pieces, progress)
    ends = features.ends(fixed_routing=True)
    return _attribution(features, values, ends, "layer_conductance", fixed_routing=True)


def _along(
    spread: Callable[..., Tensor],
    value: Callable[[Tensor], Tensor],
    on: Float[Tensor, "1 k"],
    tolerance: float,
    max_pieces: int,
    progress: bool,
) -> Float[Tensor, " k"]:
    """Add up what captum spreads over the features on pieces of the way from all off to all on.

    Norms make a model steep where what they divide by is small: evenly spread points miss that.
    """

    def change(start: float, end: float) -> float:
        with torch.no_grad():
            return value(torch.cat([start * on, end * on])).diff().item()

    def piece(start: float, end: float) -> tuple[float, float, float, Tensor]:
        values = spread(end * on, baselines=start * on)[0].detach()
        bar.update()
        return abs(values.sum().item() - change(start, end)), start, end, values

    allowed = tolerance * max(abs(change(0.0, 1.0)), _LEAST)
    with tqdm(total=2 * max_pieces - 1, desc="at most", delay=0.5, disable=not progress) as bar:
        pieces = [piece(0.0, 1.0)]
        while sum(missing for missing, *_ in pieces) > allowed and len(pieces) < max_pieces:
            pieces.sort(key=lambda found: found[0])
            _, start, end, _ = pieces.pop()
            middle = (start + end) / 2
            pieces += [piece(start, middle), piece(middle, end)]
    return torch.stack([values for *_, values in pieces]).sum(dim=0)


def _attribution(
    features: Features,
    values: Float[Tensor, " k"],
    ends: tuple[float, float],
    method: str,
    fixed_routing: bool,
) -> Attribution:
    all_off, all_on = ends
    return Attribution(
        features.axes,
        features.places,
        features.labels,
        values.cpu().double().numpy(),
        all_on,
        all_off,
        method,
        features.target,
        fixed_routing,
    )


def _remembering(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Run each coalition of features once: captum asks for it in every order that builds it."""
    known: dict[bytes, Tensor] = {}

    def remembered(on: Tensor) -> Tensor:
        keys = [row.tobytes() for row in on.bool().cpu().numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in known}
        if new:
            known.update(zip(new, value(on[list(new.values())]), strict=True))
        return torch.stack([known[key] for key in keys])

    return remembered
