"""Which expert does each token choose, how surely, and what do edits change?"""

from collections.abc import Collection, Sequence, Set
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from llama4_lab.analysis.routing import Routing, routing_of
from llama4_widgets.panels import Content, diverging, experts, near, sequential
from llama4_widgets.view import View
from llama4_widgets.words import counted, describe

_BOTH = ("moe layer", "token")
_RULES = (1, 2, 2.5, 5, 10, 15, 20, 25)  # % from one rule to the next
_ROUNDING = 0.01  # of scores in bfloat16, and more
_WHOLE, _PART = 294_000, 230_000  # bytes of an update: of all tokens at most, of some about


class RouterView(View):
    """Tokens by layers: chosen expert, every expert's probability and load, score, margin."""

    title = "Router"
    help = (
        "In every MoE layer a router reads each token and picks the expert with the largest logit; "
        "the sigmoid of that logit, the score, multiplies what the expert reads. Small margins are "
        "close calls: little edits, or fewer bits, tip them over."
    )

    follows = ("token",)
    _near = range(0)  # the tokens on screen: of long texts those around the selected one
    _most = 0  # of them

    def content(self) -> Content:
        self._most = self._room()
        self._near = self._around()
        return self._of(self._near)

    def whole(self) -> Content | None:
        count = len(self.moment.tokens)
        return self._of(range(count)) if len(self._near) < count else None

    def fixed(self, content: Content) -> Collection[str]:
        return ("token",) if content.axes["token"].size < len(self.moment.tokens) else ()

    def _runs(self) -> tuple[Routing, Routing, np.ndarray, bool]:
        """Return the clean and the edited run, the flips, and whether others than the strongest
        experts are among them."""
        clean, edited = self.moment.clean(routing_of), self.moment.edited(routing_of)
        changed = flips(clean, edited)
        is_marked = bool((changed != (clean.expert[..., 0] != edited.expert[..., 0])).any())
        return clean, edited, changed, is_marked

    def _of(self, tokens: range) -> Content:
        """Return what is drawn of some tokens."""
        clean, edited, changed, is_marked = self._runs()
        is_edited, content = bool(self.moment.edits), Content(self.axes())
        content.axes["token"], part = self.some(tokens)
        here, before = (_cut(each, tokens) for each in (edited, clean))
        scale = experts(edited.num_experts)
        chosen = _add_choices(content, here, before if is_edited else None)
        topk = here.expert.shape[-1]
        strongest = f"; the strongest of {topk}" * (topk > 1)
        content.add(
            "strip", "The text, by expert of the layer", None, _BOTH, scale,
            kind="strip", shown=("token",), array="chosen", chosen=chosen, walk="moe layer",
            note=part[2:],
        )  # fmt: skip
        if is_marked:
            content.array("flips", changed[:, tokens], _BOTH)
        content.add(
            "chosen", "Chosen expert", here.expert[..., 0], _BOTH, scale,
            clean="clean chosen" if is_edited else None, marks="flips" if is_marked else None,
            note=(
                f"rings: {counted(int(changed.sum()), 'flip')}, where the clean run chose others"
                if is_edited else "by layer (down) and token (across)"
            ) + strongest + part,
        )  # fmt: skip
        each = (*_BOTH, "expert")
        if is_edited:
            content.array("clean probability", _sigmoid(before.logits), each, paged=True)
        content.add(
            "probability", "Probability of each expert", _sigmoid(here.logits), each,
            sequential(0, 1), kind="bars", wide=False, colours=scale["colours"], chosen=chosen,
            clean="clean probability" if is_edited else None, paged=True,
            note="each a sigmoid: no sum to 1" + ("; marks: clean" * is_edited),
        )  # fmt: skip
        add_load(content, edited, clean if is_edited else None, chosen)
        content.add(
            "score", "Score", here.score[..., 0], _BOTH, sequential(0, 1), wide=False,
            note=_told_of_scores(edited) + strongest,
        )  # fmt: skip
        content.add(
            "margin", "Margin", here.margin, _BOTH, sequential(0, 4, "logits", "or more"),
            wide=False, note="over the runner-up",
        )  # fmt: skip
        if is_edited:
            change = _sigmoid(here.logits) - _sigmoid(before.logits)
            content.add(
                "change", "Change of the probabilities", change, each, diverging(1.0),
                shown=("expert", "token"), note="edited minus clean, of the layer", paged=True,
            )  # fmt: skip
        return content

    def turn(self, chosen: Set[str]) -> None:
        if self._around() != self._near:
            self.refresh()

    def _around(self) -> range:
        return near(self.selection.token, len(self.moment.tokens), self._most)

    def _room(self) -> int:
        """Return how many tokens an update has room for, after what each takes."""
        clean, edited, _, is_marked = self._runs()
        words, is_edited = self.moment.words, bool(self.moment.edits)
        layers, _, topk = edited.expert.shape
        each = layers * (3 + is_edited + is_marked) + edited.num_experts * (1 + 2 * is_edited)
        each += 3 + 2 * (topk + is_edited * clean.expert.shape[-1])
        each += 4 + sum(len(word.encode()) for word in words) / len(words)  # as JSON
        return len(words) if each * len(words) <= _WHOLE else int(_PART / each)

    def summary(self) -> str:
        routing = self.moment.edited(routing_of)
        layer, token = self.selection.layer, self.selection.token
        if layer not in routing.layers:
            return f"layer {layer} is dense: it has no router"
        clean = self.moment.clean(routing_of) if self.moment.edits else None
        return describe(routing, layer, token, clean)


def flips(one: Routing, other: Routing) -> Int[np.ndarray, "l n"]:
    """Return 1 where two runs chose other experts, in any order, by MoE layer and token."""
    sides = [one.expert, other.expert]
    topk = max(expert.shape[-1] for expert in sides)  # edits can give a layer more choices
    mine, theirs = (
        np.sort(np.pad(expert, ((0, 0), (0, 0), (0, topk - expert.shape[-1])), constant_values=-1))
        for expert in sides
    )
    return (mine != theirs).any(axis=-1).astype(int)


def add_flips(content: Content, counts: Sequence[int], note: str) -> None:
    """Add the flips of each MoE layer as bars, on a scale of four whole steps."""
    content.add(
        "flips", "Routing flips", np.array(counts), ("moe layer",),
        sequential(0, 4 * max(1, -(-max(counts) // 4))), kind="bars", wide=False, note=note,
    )  # fmt: skip


def add_load(
    content: Content,
    routing: Routing,
    clean: Routing | None,
    chosen: list[str] | None = None,
) -> None:
    """Add the load of a layer as bars, beside that of a clean run."""
    even = 100 / routing.num_experts
    axes = ("moe layer", "expert")
    most = 110 * max(float(each.load.max()) for each in (routing, clean or routing))
    high = 4 * next((rule for rule in _RULES if 4 * rule >= most), _RULES[-1])
    if clean is not None:
        content.array("clean load", 100 * clean.load, axes)
    content.add(
        "load",
        "Load of the layer",
        100 * routing.load,
        axes,
        sequential(0, high, "%"),
        kind="bars",
        wide=False,
        colours=experts(routing.num_experts)["colours"],
        clean="clean load" if clean is not None else None,
        chosen=chosen,
        reference=even,
        note=f"of all choices; dashed: all alike, {even:.3g} %"
        + "; marks: clean" * (clean is not None),
    )


def _add_choices(content: Content, routing: Routing, clean: Routing | None) -> list[str]:
    """Add what a sentence about a choice needs; return the arrays of the experts, strongest first.

    `words.describe` says the same.
    """
    names, said = _add_chosen(content, routing)
    content.array("runner up", routing.runner_up, _BOTH, paged=True)
    margin = _hundredths(routing.margin, routing.runner_up)
    content.array("told margin", margin, _BOTH, paged=True)
    content.sentence = (
        f"{{moe layer}}, {{token}}: {said}[, margin {{told margin:2}} logits over expert "
        "{runner up}]"
    )
    if clean is not None:
        content.sentence += f"; clean: {_add_chosen(content, clean, 'clean ')[1]}"
    content.otherwise = "{layer} is dense: it has no router"
    return names


def _add_chosen(content: Content, routing: Routing, of: str = "") -> tuple[list[str], str]:
    """Add the chosen experts and their scores; return the experts' arrays and a part of a sentence.

    Of the run that is shown, a panel brings the strongest expert.
    """
    names, parts = [], []
    for k in range(routing.expert.shape[-1]):
        chosen, score = (of + name + f" {k + 1}" * (k > 0) for name in ("chosen", "told score"))
        if k or of:
            content.array(chosen, routing.expert[..., k], _BOTH, paged=k > 0)
        hundredths = _hundredths(routing.score[..., k], routing.expert[..., k])
        content.array(score, hundredths, _BOTH, paged=True)
        said = f"expert {{{chosen}}} with score {{{score}:2}}"
        parts.append(f"[ and {said}]" if k else said)
        names.append(chosen)
    return names, "".join(parts)


def _hundredths(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Round like `words.decimals`; a panel of a long text has steps, too coarse for a sentence.

    Where what they are `of` is below 0, there are none.
    """
    found = np.floor(100 * np.where(of >= 0, values, 0).astype(float) + 0.5)
    return found.clip(-(2**24), 2**24).astype(int) if np.isfinite(found).all() else found


def _told_of_scores(routing: Routing) -> str:
    """Say what a score is, and of how many an edit made something else: a skipped layer's are 0."""
    logits = np.take_along_axis(routing.logits, routing.expert[..., :1], axis=-1)
    differ = np.abs(_sigmoid(logits) - routing.score[..., :1]) > _ROUNDING
    told = f"; {differ.sum():,} differ from the probability, by an edit" * bool(differ.any())
    return "multiplies what the expert reads" + told


def _cut(routing: Routing, tokens: range) -> Routing:
    arrays = ("logits", "expert", "score", "runner_up", "margin")
    at = slice(tokens.start, tokens.stop)
    return replace(routing, **{name: getattr(routing, name)[:, at] for name in arrays})


def _sigmoid(logits: Float[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes"]:
    return 1 / (1 + np.exp(-logits))
