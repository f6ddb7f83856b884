"""What the shipped models are promised to do; a card keeps a promise or breaks it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama4_lab.train.card import Card


@dataclass(frozen=True)
class Promise:
    """A figure of the card with its lowest or highest value."""

    what: str
    figure: Callable[[Card], float]
    at_least: float = -math.inf
    at_most: float = math.inf

    def measured(self, card: Card) -> float:
        """Return the figure; not a number if the card lacks it."""
        try:
            return self.figure(card)
        except (KeyError, ValueError):
            return math.nan

    @property
    def bounds(self) -> str:
        low = f"at least {self.at_least:g}" if self.at_least > -math.inf else ""
        high = f"at most {self.at_most:g}" if self.at_most < math.inf else ""
        return " and ".join(filter(None, (low, high)))


def broken(promises: Sequence[Promise], card: Card) -> list[str]:
    """Return one sentence for each promise that a card does not keep."""
    return [
        f"{promise.what}: {value:.3g}, promised {promise.bounds}"
        for promise in promises
        if not promise.at_least <= (value := promise.measured(card)) <= promise.at_most
    ]


def loss(domain: str, at_most: float) -> Promise:
    return Promise(
        f"bits per byte, {domain}", lambda card: card.bits_per_byte[domain], at_most=at_most
    )


def layers_with(bits: float, at_least: float) -> Promise:
    def share(card: Card) -> float:
        found = card.information["domain"]
        return sum(x >= bits for x in found) / len(found)

    return Promise(f"layers whose experts tell {bits:g} bits of the domain", share, at_least)


def recall(where: str, at_least: float = -math.inf, at_most: float = math.inf, how="as trained"):
    what = f"codes told, {where}, {how}"
    return Promise(what, lambda card: card.recall[where][how], at_least, at_most)


def picture(task: str, at_least: float, what: str = "right") -> Promise:
    return Promise(f"pictures, {task}, {what}", lambda card: card.pictures[task][what], at_least)


def sums(kind: str, at_least: float) -> Promise:
    return Promise(f"sums, {kind}", lambda card: card.sums[kind], at_least)


def busiest(at_most: float) -> Promise:
    return Promise("share of the fullest expert", lambda card: max(card.fullest), at_most=at_most)


SEEN = ("shape", "colour", "exists", "shape_at", "colour_at", "object_at")
PROMISES: dict[str, tuple[Promise, ...]] = {
    "mini": (
        loss("english", 1.7),
        loss("python", 1.5),
        layers_with(0.8, 0.5),
        busiest(0.3),
        recall("same chunk", 0.95),
        *(recall(where, 0.9) for where in ("1 to 250", "251 to 500", "501 to 1000")),
        recall("1001 to 1500", 0.9),
        *(recall(where, 0.9, how="RoPE layers see all") for where in ("1 to 250", "501 to 1000")),
        recall("251 to 500", at_most=0.05, how="NoPE layers see one chunk"),
        recall("1001 to 1500", at_most=0.05, how="NoPE layers see one chunk"),
        *(picture(task, 0.9) for task in (*SEEN, "scan", "caption")),
        *(picture(task, 0.95, "changed") for task in SEEN),
        *(picture(task, 0.9, "kept") for task in SEEN),
        picture("place", 0.8),
        picture("count", 0.75),
        picture("picture", 0.65),
        *(sums(kind, 0.95) for kind in ("add", "subtract", "multiply")),
        *(sums(kind, 0.9) for kind in ("larger", "smaller")),
        sums("sequence", 0.8),
    ),
    "nano": (
        loss("english", 2.4),
        loss("python", 2.4),
        layers_with(0.5, 0.5),
        busiest(0.4),
        picture("scan", 0.3),
        picture("shape_at", 0.35),
        sums("larger", 0.75),
        sums("smaller", 0.75),
    ),
}
