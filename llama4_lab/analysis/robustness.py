"""Attacks on pictures, and the routing that they change; captum makes the attacks."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4_lab.analysis.features import NEXT_TOKEN, Question, Target
from llama4_lab.model import Llama4
from llama4_lab.prompt import Prompt

LEVEL = 1 / 127.5  # of 255 levels of a pixel, on the scale of pixel_values


@dataclass(frozen=True, eq=False)
class Attack:
    """A picture changed against a prediction, and what that did."""

    pixel_values: Float[Tensor, "tiles c height width"]
    before: float  # the target with the picture as it was, in the target's unit
    after: float
    layers: tuple[int, ...]  # MoE layers, the axis l
    flipped: Bool[np.ndarray, "l t"]  # tokens whose set of experts is another one now
    target: Target
    method: str

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def flips(self) -> Int[np.ndarray, " l"]:
        """Tokens of each layer whose experts changed."""
        return self.flipped.sum(axis=1)


@torch.inference_mode(False)  # gradients are taken wherever this stands
def attack(
    model: Llama4,
    prompt: Prompt,
    target: Target = NEXT_TOKEN,
    *,
    method: str = "pgd",
    radius: float = 4 * LEVEL,
    steps: int = 10,
    step_size: float | None = None,
    towards: bool = False,
    norm: str = "Linf",
    mask: Float[Tensor, "tiles c height width"] | None = None,
    random_start: bool = False,
    seed: int = 0,
) -> Attack:
    """Change a prompt's pictures a little, so that the target falls (or rises, with `towards`).

    ``fgsm`` takes one step of `radius` along the sign of the gradient (Goodfellow et al. 2015),
    ``pgd`` takes `steps` and stays within `radius` (Madry et al. 2018). Pixels stay in [-1, 1].

    Args:
        radius: the most that a pixel may change (``Linf``), or the length of the whole change
            (``L2``, for pgd only), on the scale of ``pixel_values``: `LEVEL` is one level of 255.
        step_size: of pgd, None for ``2.5 * radius / steps``.
        mask: 1 where pixels may change, 0 elsewhere; None lets all.
        random_start: let pgd begin at a random place within `radius`, drawn by `seed`.

    Raises:
        ValueError: an unknown method or norm, or no pictures; and as `Question.ask`.
    """
    if method not in ("fgsm", "pgd") or norm not in ("Linf", "L2"):
        raise ValueError(
            f"unknown attack {method!r} with norm {norm!r}; choose 'fgsm' or 'pgd', "
            "and 'Linf' or 'L2'"
        )
    question = Question.ask(model, prompt, target)
    prompt = question.prompt
    if prompt.pixel_values is None:
        raise ValueError("this prompt has no image to attack: build it with images=[...]")

    def value(pixels: Float[Tensor, "1 tiles c height width"]) -> Float[Tensor, " 1"]:
        return question.answer(1, {}, False, pixels[0])

    fgsm, pgd = _attacks_on(value)
    clean = prompt.pixel_values[None]  # one example, so that a norm is that of all tiles
    shared = {"target": 0, "targeted": towards, "mask": None if mask is None else mask[None]}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
        torch.default_generator.manual_seed(seed)
        if method == "fgsm":
            found = fgsm.perturb(clean, radius, **shared)
        else:
            step_size = 2.5 * radius / steps if step_size is None else step_size
            shared |= {"random_start": random_start, "norm": norm}
            found = pgd.perturb(clean, radius, step_size, steps, **shared)
    found = found.detach()
    with torch.no_grad():
        before, after = (value(pixels).item() for pixels in (clean, found))
    now = Question.ask(model, replace(prompt, pixel_values=found[0]), question.target).chosen
    flipped = np.zeros((len(now), len(prompt.tokens)), dtype=bool)
    for row, (name, was) in enumerate(question.chosen.items()):
        flipped[row] = (was.sort().values != now[name].sort().values).any(-1)[0].cpu()
    layers = model.config.routed_layers
    return Attack(found[0], before, after, layers, flipped, question.target, method)


def _attacks_on(value: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """Return captum's FGSM and PGD, which lower a value of pixels in [-1, 1]."""
    from captum.robust import FGSM, PGD

    bounds = {"lower_bound": -1.0, "upper_bound": 1.0}
    fgsm: Any = FGSM(value, lambda out, _: -out, **bounds)
    pgd: Any = PGD(value, lambda out, _: -out, **bounds)
    # captum leaves pixels whose gradient is below 1e-6; ours are many, and each matters little
    fgsm.zero_thresh = pgd.fgsm.zero_thresh = 0.0
    draw = pgd._random_point

    # Drawn on the CPU, whose generator alone is seeded and put back.
    pgd._random_point = lambda center, radius, norm, mask: (
        center + draw(torch.zeros_like(center, device="cpu"), radius, norm, 1).to(center) * mask
    )
    return fgsm, pgd
