"""What would the model say if it stopped early, and which of its parts wrote what it says?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import traitlets

from llama4_lab.analysis.decomposition import (
    Decomposition,
    decompose_logit,
    decompose_router,
    written,
)
from llama4_lab.analysis.lens import Lens, logit_lens
from llama4_lab.config import Llama4Config
from llama4_widgets.moment import Moment
from llama4_widgets.panels import Axis, Content, diverging, near, sequential
from llama4_widgets.view import View, in_row
from llama4_widgets.words import number, token_id, visible

COLOURS = ("top word", "final answer", "change by the edits")
_CELLS = 8192  # words of one update
_WORK = 1 << 37  # multiplications for a page that is kept: some 10 s on one core
_MOST = 14  # parts that are shown
_ROUNDING = 1e-3  # logits; sums of a float32 model are far below it


class LensView(View):
    """The likeliest next word at each half layer, and the parts that wrote its logit."""

    title = "Lens"
    help = (
        "Every half layer adds to the residual stream; read early through the final norm and the "
        "read-out, the stream shows what the model would say if it stopped there (logit lens). "
        "With the norm's scale held as it is, a logit is a sum over the parts that wrote to the "
        "stream: the bars are its addends."
    )
    follows = ("token", "layer")
    word = traitlets.Unicode(help="the next word to follow; empty: the clean run's answer").tag(
        empty="the model's answer"
    )
    colour = traitlets.Enum(COLOURS, COLOURS[0], help="whose log-probability colours a word")
    against_runner_up = traitlets.Bool(help="explain the lead over the runner-up, not the logit")

    def controls(self) -> list[ipywidgets.Widget]:
        against = "lead over the runner-up"
        controls = self.linked(word="Follow word", colour="Colour by", against_runner_up=against)
        controls[0].style.description_width = "initial"
        return [in_row(*controls)]

    # ---- what is shown

    def content(self) -> Content:
        return self._of(*self._lenses(self.moment))

    def whole(self) -> Content | None:
        count, config = len(self.moment.words), self.moment.model.config
        work = _points(config) * count * config.hidden_size * config.vocab_size
        is_part = count > _room(config)
        return self._of(*self._lenses(self.moment, count)) if is_part and work <= _WORK else None

    def _of(self, clean: Lens, edited: Lens) -> Content:
        names = self._names(edited)
        content = Content(self.axes())
        # Both halves of a layer select it; the embedding, what enters layer 0.
        content.axes["point"] = Axis(
            "stream", len(names), "layer", names, [layer for layer, _ in map(_place, edited.points)]
        )
        shown = range(int(edited.positions[0]), int(edited.positions[-1]) + 1)
        content.axes["near"], part = self.some(shown)
        whose = "the clean run's" if self.moment.edits else "the"
        goal = f"‘{visible(self.word)}’" if self.word else f"{whose} final answer"
        sure, change = sequential(-8, 0, "nats", "(sure)"), diverging(2, "nats", "or more")
        before, after = clean.target_logprob, edited.target_logprob
        colours = {
            COLOURS[0]: (edited.top_logprob[..., 0], sure, "the word shown"),
            COLOURS[1]: (after, sure, goal),
            COLOURS[2]: (after - before, change, f"{goal}, edited minus clean"),
        }
        values, scale, what = colours[self.colour]
        content.add(
            "words", "What the model would say here", values, ("point", "near"), scale,
            kind="words", text=self._texts(clean, edited), cell=84 if self.moment.edits else 56,
            note=f"colour: log-probability of {what}{part}; ●: already the answer at the end"
            + "; no edits: no change" * (self.colour == COLOURS[2] and not self.moment.edits),
        )  # fmt: skip
        rows = [i for i, name in enumerate(edited.points) if name.endswith("resid_post")]
        content.add(
            "answer", f"How sure is {goal} after each layer?", after[rows],
            ("layer", "near"), sure, note=f"log-probability{part}",
        )  # fmt: skip
        if self.moment.edits:
            content.add(
                "change", "Change by the edits", (after - before)[rows], ("layer", "near"), change,
                note="of the same log-probability, edited minus clean",
            )  # fmt: skip
        self._add_parts(content, "parts", self._of_word(edited))
        if self._is_moe():
            self._add_parts(content, "router", self._of_expert())
        return content

    def summary(self) -> str:
        _, edited = self._lenses(self.moment)
        token, column = self.selection.token, self._column(edited)
        sums = self._of_word(edited)
        answer = self.moment.word(int(edited.top_token[-1, column, 0]))
        same = edited.top_token[:, column, 0] == edited.top_token[-1, column, 0]
        since = len(same) - int(np.argmin(same[::-1])) if not same.all() else 0
        is_behind = not self.moment.changed.isdisjoint(sums.behind)
        says = "the last layer, before edits behind it, says" if is_behind else "the model says"
        text = (
            f"After {self.moment.called(token)} {says} ‘{answer}’ "
            f"({np.exp(edited.top_logprob[-1, column, 0]):.0%}), without a break since "
            f"‘{self._names(edited)[since]}’. {self._sum(sums)}"
        )
        layer = self.selection.layer
        if not self._is_moe():
            return f"{text} Layer {layer} is dense: it has no router."
        return f"{text} Router of layer {layer}: {self._sum(self._of_expert())}"

    def _wrote_more(self, sums: "_Sums") -> bool:
        """Whether edits wrote what is in no part: to the stream itself, or `behind` it."""
        is_there = any(".resid_" in at or at in sums.behind for at in self.moment.changed)
        return is_there and sums.runs[-1].residual > _ROUNDING

    def _sum(self, sums: "_Sums") -> str:
        """State of what a sum is, and how complete."""
        parts, over = sums.runs[-1], sums.versus and f" over {sums.versus}"
        text = (
            f"{len(parts.values)} parts of the {'lead' if over else 'logit'} of "
            f"{sums.name(parts.target)}{over} add up to {number(parts.values.sum(), '.4f')} logits"
        )
        if self._wrote_more(sums):
            more = number(_by_edits(parts), "+.4f")
            return f"{text}, edits of the stream or behind it wrote {more} more."
        if parts.residual == 0:
            return f"{text}, exactly the model's own number."
        return f"{text}, the model's own number is {number(parts.residual, '.1e')} away."

    def ahead(self, moment: Moment) -> Iterator[None]:
        moment.edited(written)
        yield
        self._lenses(moment)
        yield

    def _lenses(self, moment: Moment, most: int | None = None) -> tuple[Lens, Lens]:
        """Return the clean and the edited lens around the token, both asked about one word."""
        most = most or _room(moment.model.config)
        at = tuple(near(self.selection.token, len(moment.words), most))
        clean = moment.clean(logit_lens, at, target=self._goal(), top=1, kept=written)
        before, after = moment.clean(written), moment.edited(written)
        changed = tuple(point for point in clean.points if after[point] is not before[point])
        if not changed:
            return clean, clean
        asked = {"target": tuple(clean.target.tolist()), "top": 1, "points": changed}
        return clean, _instead(clean, moment.edited(logit_lens, at, **asked, kept=written))

    def _goal(self) -> int | None:
        return token_id(self.moment.model.tokenizer, self.word) if self.word else None

    def _names(self, lens: Lens) -> list[str]:
        return [_name(point, self.moment.model.config) for point in lens.points]

    def _column(self, lens: Lens) -> int:
        return self.selection.token - int(lens.positions[0])

    def _texts(self, clean: Lens, edited: Lens) -> list[list[str]]:
        """Say the top words, marked where they are the last row's, with the clean one if other."""
        ids = {int(i) for lens in (clean, edited) for i in np.unique(lens.top_token[..., 0])}
        words = {i: self.moment.word(i) for i in ids}

        def text(mine: int, last: int, theirs: int) -> str:
            said = ("● " if mine == last else "") + words[mine]
            return said if mine == theirs else f"{said} (was {words[theirs]})"

        mine, theirs = edited.top_token[..., 0].tolist(), clean.top_token[..., 0].tolist()
        return [
            [text(*cell) for cell in zip(row, mine[-1], others, strict=True)]
            for row, others in zip(mine, theirs, strict=True)
        ]

    def _quoted(self, idx: int) -> str:
        return f"‘{self.moment.word(idx)}’"

    # ---- sums

    def _is_moe(self) -> bool:
        return self.moment.model.config.is_moe(self.selection.layer)

    def _of_word(self, edited: Lens) -> "_Sums":
        goal = self._goal()
        target = int(edited.top_token[-1, self._column(edited), 0]) if goal is None else goal
        runs = self._both(decompose_logit, self.selection.token, target=target)
        title = f"What wrote the logit of {self._quoted(target)}?"
        return _Sums(title, runs, self._quoted, ("final_norm", "logits"))

    def _of_expert(self) -> "_Sums":
        layer = self.selection.layer
        runs = self._both(decompose_router, layer, self.selection.token)
        title = f"Why expert {runs[-1].target} in layer {layer}?"
        return _Sums(title, runs, _expert, (f"layers.{layer}.router.logits",))

    def _both(self, compute: Any, *where: int, target: int | None = None) -> list[Decomposition]:
        """Return the clean and the edited sum of one number; without edits, the clean one."""
        versus = "runner_up" if self.against_runner_up else None
        mine = self.moment.edited(compute, *where, target, versus, kept=written)
        if not self.moment.edits:
            return [mine]
        return [self.moment.clean(compute, *where, mine.target, mine.versus, kept=written), mine]

    def _add_parts(self, content: Content, name: str, sums: "_Sums") -> None:
        """Add the strongest parts, and all others as one."""
        found = sums.runs
        each = [_parts(one) for one in found]
        parts = list(dict.fromkeys(part for one in each for part in one))
        values = np.array([[one.get(part, 0.0) for part in parts] for one in each])
        order = np.argsort(-np.abs(values).max(axis=0), kind="stable")
        most = _MOST + (len(order) == _MOST + 1)  # one alone is no row of others
        shown, rest = order[:most], order[most:]
        rows = [[parts[i][0], *map(float, values[:, i])] for i in shown]
        choices = [_choice(*parts[i]) for i in shown]
        bound = float(np.abs(values).max())
        if len(rest):
            together = values[:, rest].sum(axis=1)
            rows.append([f"{len(rest)} others together", *map(float, together)])
            bound = max(bound, float(np.abs(together).max()))
        if self._wrote_more(sums):
            rows.append(["edits of the stream or behind it", *map(_by_edits, found)])
        totals = [number(one.total, ".4f") for one in found]
        rows.append(["all: the model's own number", *totals])
        choices += [None] * (len(rows) - len(choices))
        heads = ["logits"] if len(found) == 1 else ["clean (logits)", "edited (logits)"]
        title = sums.title + (sums.versus and f" Its lead over {sums.versus}:")
        content.table(
            name, title, ["part", *heads], rows, choices, wide=len(found) > 1,
            bars=[None, *(bound for _ in heads)], note="red: for it; blue: against it",
        )  # fmt: skip


class _Sums(NamedTuple):
    """A number of the model as sums of parts: in the clean run, then in the edited one, if any."""

    title: str
    runs: list[Decomposition]
    name: Callable[[int], str]  # of the words or experts, whose number it is
    behind: Sequence[str]  # the points between the stream and the number

    @property
    def versus(self) -> str:
        """What the number is the lead over, if it is one."""
        versus = self.runs[-1].versus
        return "" if versus is None else self.name(versus)


def _points(config: Llama4Config) -> int:
    return 1 + 2 * config.num_hidden_layers


def _room(config: Llama4Config) -> int:
    """Return of how many tokens an update shows the lens."""
    return max(_CELLS // _points(config), 16)


def _instead(clean: Lens, edited: Lens) -> Lens:
    """Return a lens with other rows for the points that edits changed."""
    rows = [clean.points.index(point) for point in edited.points]
    found = {"kl": np.full_like(clean.kl, np.nan)}  # of what the clean rows are not compared with
    for name in ("top_token", "top_logprob", "target_rank", "target_logprob"):
        found[name] = getattr(clean, name).copy()
        found[name][rows] = getattr(edited, name)
    return replace(clean, **found)


def _expert(idx: int) -> str:
    return f"expert {idx}"


def _by_edits(found: Decomposition) -> float:
    return found.total - float(found.values.sum())


def _parts(found: Decomposition) -> dict[tuple[str, str, int, int], float]:
    """Return the values by label, kind, layer and index."""
    keys = zip(found.labels, found.kind, found.layer.tolist(), found.index.tolist(), strict=True)
    return dict(zip(keys, found.values.tolist(), strict=True))


def _choice(_label: str, kind: str, layer: int, index: int) -> dict[str, int] | None:
    """Return what a click on a part selects."""
    if layer < 0:
        return None
    return {"layer": layer} | ({kind: index} if kind in ("head", "expert") else {})


def _place(point: str) -> tuple[int, str]:
    """Return the layer and the last name of a point of the stream."""
    return (0, point) if point == "embed" else (int(point.split(".")[1]), point.split(".")[2])


def _name(point: str, config: Llama4Config) -> str:
    layer, kind = _place(point)
    fed = "experts" if config.is_moe(layer) else "MLP"
    said = {"embed": "embedding", "resid_mid": f"layer {layer} attention"}
    return said.get(kind, f"layer {layer} {fed}")
