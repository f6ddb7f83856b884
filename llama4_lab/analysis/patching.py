"""Activation patching: which place of one run carries what another run lacks.

A corrupted run is given, place by place, what the clean run has there; how much of the clean answer
comes back says what that place carries (Meng et al. 2022, "Locating and Editing Factual
Associations in GPT", section 2; Heimersheim & Nanda 2024, "How to Use and Interpret Activation
Patching").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llama4_lab.analysis.positions import refuse_words
from llama4_lab.edits import Edit, Patch
from llama4_lab.model import Llama4
from llama4_lab.replay import Replay

Metric = Callable[[Tensor], Tensor]  # of logits [v], in float32


@dataclass(frozen=True, eq=False)
class Patching:
    """What a metric of the last position becomes by patching one place at a time.

    The first axis runs over layers, the second over `columns`: tokens or heads.
    """

    columns: tuple[int, ...]
    metric: Float[np.ndarray, "l columns"]
    clean: float
    corrupted: float

    @property
    def restored(self) -> Float[np.ndarray, "l columns"]:
        """Share of the way from the corrupted run to the clean one: 0 nothing, 1 all of it."""
        return (self.metric - self.corrupted) / (self.clean - self.corrupted)


def logit_difference(right: int, wrong: int) -> Metric:
    """Return the metric that counts how many nats a token is ahead of another.

    >>> float(logit_difference(1, 0)(torch.tensor([0.5, 2.0])))
    1.5
    """
    refuse_words(right, wrong)
    return lambda logits: logits[right] - logits[wrong]


def patch_positions(
    model: Llama4,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    part: str = "resid_pre",
    tokens: Sequence[int] | None = None,
) -> Patching:
    """Patch one token of one layer at a time.

    `part` is a point of every layer without its prefix: ``resid_pre``, ``attn.out``, …; `tokens`
    are all positions unless given. The prompts must be equally long, token for token.

    Raises:
        ValueError: prompts of different lengths, no tokens, or equally good answers: nothing to
            restore.
    """
    clean_run, replay = _runs(model, clean, corrupted, tokens)
    columns = tuple(range(len(replay)) if tokens is None else tokens)
    layers = range(model.config.num_hidden_layers)
    runs: list[list[Edit]] = [
        [Patch(f"layers.{layer}.{part}", "patch", (token,))]
        for layer in layers
        for token in columns
    ]
    return _patch(clean_run, replay, runs, columns, metric)


def patch_heads(
    model: Llama4,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    tokens: Sequence[int] | None = None,
) -> Patching:
    """Patch what one head gathers (``attn.z``), at all positions or at `tokens`.

    Raises:
        ValueError: as `patch_positions`.
    """
    clean_run, replay = _runs(model, clean, corrupted, tokens)
    heads = tuple(range(model.config.num_attention_heads))
    layers = range(model.config.num_hidden_layers)
    runs: list[list[Edit]] = [
        [Patch(f"layers.{layer}.attn.z", "patch", tokens, head=head)]
        for layer in layers
        for head in heads
    ]
    return _patch(clean_run, replay, runs, heads, metric)


def _runs(
    model: Llama4, clean: Any, corrupted: Any, tokens: Sequence[int] | None
) -> tuple[Replay, Replay]:
    if tokens is not None and not len(tokens):
        raise ValueError("no tokens were given: name one at least, or None for all")
    clean_run, replay = Replay(model, clean), Replay(model, corrupted, {"patch": clean})
    if len(clean_run) != len(replay):
        raise ValueError(
            f"the clean prompt has {len(clean_run)} tokens and the corrupted one {len(replay)}: "
            "patching needs prompts that agree token for token"
        )
    return clean_run, replay


@torch.no_grad()
def _patch(
    clean: Replay,
    replay: Replay,
    runs: list[list[Edit]],
    columns: tuple[int, ...],
    metric: Metric,
) -> Patching:
    ends = [float(metric(run.logits[-1].float())) for run in (clean, replay)]
    if ends[0] == ends[1]:
        raise ValueError(
            f"the metric is {ends[0]:.4g} in both runs, so there is nothing to restore: "
            "choose prompts or a metric that differ"
        )
    last = slice(-1, None)
    found = np.empty(len(runs))
    for i, run in replay.stream(runs):
        found[i] = float(metric(run.logits_of(last)[0].float()))
    return Patching(columns, found.reshape(-1, len(columns)), *ends)
