"""What differs between two runs that stand side by side, and what cannot be compared."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4_lab.analysis.routing import routing_of
from llama4_lab.replay import divergence
from llama4_widgets.moment import ROUNDING, Moment
from llama4_widgets.panels import Content, above_zero
from llama4_widgets.selection import Selection
from llama4_widgets.view import View
from llama4_widgets.views.router import add_flips, flips
from llama4_widgets.words import NO_NUMBERS, counted

_AT_ONCE = 256  # tokens


class DifferenceView(View):
    """Another run beside this one: predictions, routing, and the likeliest next words."""

    title = "Difference"
    help = (
        "Two runs of as many tokens are compared place by place: KL divergence says how far apart "
        "their predictions are, flips where a router chose other experts. Runs that differ in what "
        "they are made of can only be read side by side, and the text says so."
    )
    follows = ("token",)

    def __init__(self, moment: Moment, selection: Selection, other: Moment):
        self.other = other
        self._kl: tuple[Any, Any] = (None, None)  # of which two moments, and their KL
        super().__init__(moment, selection)

    def content(self) -> Content:
        content = Content(self.axes())
        self._said = _hindrances(self.moment, self.other)
        if len(self.moment.tokens) == len(self.other.tokens):
            kl = self.kl() if _is_same_vocabulary(self.moment, self.other) else None
            if kl is not None and np.isnan(kl).any():
                self._said.insert(0, f"{NO_NUMBERS}: no predictions are left to compare")
            elif kl is not None:
                where = int(kl.argmax())
                strongest = f"{kl[where]:.3g} nats at token {where}"
                source = "the run beside" if self._is_other_first() else "this run"
                mean = f"mean {kl.mean():.3g} over all {counted(len(kl), 'token')}"
                said = f"KL from {source}: {mean}, most {strongest}"
                if kl[where] < ROUNDING:
                    strongest, said = "none", "the predictions are the same, up to rounding"
                self._said.insert(0, said)
                content.add(
                    "kl", "How far apart the predictions are", kl, ("token",),
                    above_zero(kl, "nats"), kind="strip",
                    note=f"KL from {source}; strongest: {strongest}",
                )  # fmt: skip
            if _is_same_routing(self.moment, self.other):
                found = self.flips()
                self._said.insert(0, counted(int(found.sum()), "routing flip"))
                note = f"of {counted(found.shape[1], 'token')}, those with other experts"
                add_flips(content, found.sum(axis=1).tolist(), note)
        self._add_answers(content)
        return content

    def kl(self) -> Float[np.ndarray, " n"]:
        """Return the KL divergence of the second run's predictions from the first's, in nats."""
        pair = (self.moment, self.other)
        if self._kl[0] != pair:
            self._kl = (pair, _kl(*(pair[::-1] if self._is_other_first() else pair)))
        return self._kl[1]

    def _is_other_first(self) -> bool:
        """Whether the run beside is the clean one of the two; else this one comes first."""
        return bool(self.moment.edits) and not self.other.edits

    def flips(self) -> Int[np.ndarray, "l n"]:
        """Return 1 where the two runs chose other experts, by MoE layer and token."""
        return flips(*(side.edited(routing_of) for side in (self.moment, self.other)))

    def _add_answers(self, content: Content) -> None:
        """Add the likeliest next words after the selected token, of both."""
        sides, names = [], []
        for side in (self.moment, self.other):
            token = min(self.selection.token, len(side.tokens) - 1)
            sides.append(_logits(side)[token].float().softmax(-1))
            names.append(side.called(token))
        title = f"What follows {' and '.join(dict.fromkeys(names))}"
        if _is_same_vocabulary(self.moment, self.other):
            heads = ["next token", "this (%)", "beside (%)"]
            rows = self.moment.likeliest(*sides)
        else:
            heads = ["this", "this (%)", "beside", "beside (%)"]
            both = self.moment.likeliest(sides[0]), self.other.likeliest(sides[1])
            rows = [mine + theirs for mine, theirs in zip(*both, strict=True)]
        content.table("answers", title, heads, rows, wide=False)

    def summary(self) -> str:
        return "; ".join(self._said) + "."


def _hindrances(mine: Moment, other: Moment) -> list[str]:
    """Say what of two runs cannot be compared, and why."""
    found = []
    counts = [len(side.tokens) for side in (mine, other)]
    if counts[0] != counts[1]:
        found.append(
            f"the prompts have {counts[0]} and {counts[1]} tokens, so that no token has a "
            "counterpart: there is no difference by token"
        )
    elif differing := sum(a != b for a, b in zip(mine.tokens, other.tokens, strict=True)):
        found.append(f"{differing} of {counts[0]} tokens differ: compared place by place")
    if not _is_same_vocabulary(mine, other):
        found.append("the models have other vocabularies: predictions cannot be subtracted")
    if not _is_same_routing(mine, other):
        found.append("the models have other MoE layers or experts: choices cannot be compared")
    return found


def _is_same_vocabulary(mine: Moment, other: Moment) -> bool:
    if mine.model is other.model:
        return True
    sizes = {side.model.config.vocab_size for side in (mine, other)}
    sample = range(0, min(sizes), max(1, min(sizes) // 512))
    return len(sizes) == 1 and all(mine.word(i) == other.word(i) for i in sample)


def _is_same_routing(mine: Moment, other: Moment) -> bool:
    """Whether both have experts, as many, in the same layers."""

    def sizes(moment: Moment) -> tuple[int, ...]:
        config = moment.model.config
        return config.num_local_experts, config.num_experts_per_tok, *config.routed_layers

    return sizes(mine) == sizes(other) and len(sizes(mine)) > 2


def _logits(moment: Moment) -> Float[Tensor, "n v"]:
    return moment.edited_run.logits if moment.edits else moment.replay.logits


@torch.no_grad()
def _kl(first: Moment, second: Moment) -> Float[np.ndarray, " n"]:
    found = []
    pairs = (_logits(side).split(_AT_ONCE) for side in (first, second))
    for ours, theirs in zip(*pairs, strict=True):
        p, q = (part.float().log_softmax(-1) for part in (ours, theirs.to(ours.device)))
        found.append(divergence(q, p))
    return torch.cat(found).cpu().numpy()
