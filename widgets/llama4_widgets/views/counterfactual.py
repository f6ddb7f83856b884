"""What would a token have led to, had the router sent it to another expert?"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import ipywidgets
import numpy as np
import traitlets

from llama4_lab.analysis.counterfactual import Counterfactual, counterfactual
from llama4_lab.analysis.routing import moe_layers
from llama4_lab.edits import Route
from llama4_widgets.panels import Content, above_zero, around_zero
from llama4_widgets.slices import Work, sliced
from llama4_widgets.view import EditingView, button, in_row
from llama4_widgets.words import NO_NUMBERS

EFFECTS = ("KL from the prediction", "change of its top word")
READS = ("last token", "selected token")
_AT_ONCE = 160_000  # tokens of all runs together, times layers; more waits for the button
_KEYS = 2048  # that a token reads in the time of all else in its layer, more or less


class CounterfactualView(EditingView):
    """Every expert at every MoE layer for the selected token, coloured by its effect."""

    title = "Counterfactual"
    help = (
        "Each cell is a run of its own: the selected token was sent to that expert in that layer, "
        "with that expert's own score, and the model went on. Cells near zero are choices that "
        "hardly mattered; strong ones would have changed what comes next."
    )
    follows = ("token",)
    effect = traitlets.Enum(EFFECTS, EFFECTS[0], help="what colours a cell")
    read = traitlets.Enum(READS, READS[1], help="whose next word is looked at")

    def controls(self) -> list[ipywidgets.Widget]:
        self._add = button("", "send it there in all views", self.add_route)
        self._add.layout.display = "" if self.may_edit else "none"
        self.work = Work(self, "Run", self._steps)
        self.selection.observe(self._name_route, ["token", "layer", "expert"])
        for owner, field in ((self.selection, "token"), (self, "read")):
            owner.observe(lambda _: self.work.cancel(), field)  # it is another question now
        controls = self.linked(effect="Colour by", read="Word after")
        return [in_row(*controls, self._add, self.work.begin, self.work.stop)]

    def add_route(self) -> None:
        """Send the token to the selected expert in the selected layer, in all views."""
        route = Route(self.selection.layer, self.selection.token, self.selection.expert)
        with self.working():
            self.edits = (*self.moment.edits, route)

    def _name_route(self, _change: Any = None) -> None:
        choice, layers = self.selection, self.moment.model.config.routed_layers
        self._add.disabled = choice.layer not in layers
        self._add.description = (
            f"Layer {choice.layer} is dense"
            if self._add.disabled
            else f"Send token {choice.token} to expert {choice.expert} in layer {choice.layer}"
        )

    def _question(self) -> tuple[int, int]:
        token = self.selection.token
        return token, (len(self.moment.words) - 1 if self.read == READS[0] else token)

    def _runs(self) -> int:
        config = self.moment.model.config
        return len(moe_layers(self.moment.model)) * config.num_local_experts

    def _found(self) -> Counterfactual | None:
        """Return the effects, or nothing while they wait for the button."""
        moment, (token, read) = self.moment, self._question()
        count, layers = len(moment.words), moment.model.config.num_hidden_layers
        is_long = self._runs() * (count - token) * layers * (1 + count / _KEYS) > _AT_ONCE
        for each in (self.work.begin, self.work.stop):
            each.layout.display = "" if is_long else "none"
        question = counterfactual, token, read
        return moment.kept.get(question) if is_long else moment.once(question, self._compute())

    def _compute(self) -> Callable[..., Counterfactual]:
        """Return the function that answers the question."""
        (token, read), edits = self._question(), self.moment.edits
        return partial(counterfactual, self.moment.replay, token, read=read, edits=edits)

    def _steps(self) -> Generator[str, None, None]:
        """Compute what is too long to be computed at every click."""
        moment, question, compute = self.moment, self._question(), self._compute()

        def work(pause: Callable[[str], None]) -> Counterfactual:
            return compute(on_run=lambda done, count: pause(f"{done} of {count} runs"))

        moment.kept[counterfactual, *question] = yield from sliced(work)

    # ---- what is shown

    def content(self) -> Content:
        self.take_edits()
        self._name_route()
        found = self._found()
        if found is None or not _has_answer(found):
            return Content()
        top, where = int(found.clean.argmax()), f"after token {found.read}"
        values, scale, said = found.kl, above_zero(found.kl, "nats"), self.effect
        if self.effect == EFFECTS[1]:
            values = found.change(top)
            scale = around_zero(values, "nats")
            said = f"change of log-probability of ‘{self.moment.word(top)}’"
        content = Content(self.axes())
        both = ("moe layer", "expert")
        content.array("choice", found.is_choice.astype(np.int16), both)
        content.add(
            "effect", f"Token {found.token} ‘{self.moment.words[found.token]}’ sent to each expert",
            values, both, scale, marks="choice", note=f"{said} {where}; ring: the router's choice",
        )  # fmt: skip
        texts = [
            [
                ("● " if mine else "") + self.moment.word(int(word))
                for word, mine in zip(*row, strict=True)
            ]
            for row in zip(found.top, found.is_choice, strict=True)
        ]
        content.add(
            "words", f"The likeliest word {where} would be", None, both, scale, kind="words",
            array="effect", text=texts, cell=64, note="experts across; ●: the router's choice",
        )  # fmt: skip
        return content

    def summary(self) -> str:
        found = self._found()
        if found is None:
            tokens = self._runs() * (len(self.moment.words) - self.selection.token)
            runs = f"{self._runs():,} runs of {tokens:,} tokens in all"
            return f"Not computed yet: {runs} take a while: press Run."
        if not _has_answer(found):
            return f"{NO_NUMBERS.capitalize()}: there is no answer that a choice could change."
        kl = found.kl
        row, expert = np.unravel_index(int(kl.argmax()), kl.shape)
        word = self.moment.word(int(found.clean.argmax()))
        other = int((found.top != found.clean.argmax()).sum())
        return (
            f"Of {kl.size} ways to send {self.moment.called(found.token)}, "
            f"{other} would change the word after token {found.read} from ‘{word}’. Strongest: "
            f"expert {expert} in layer {found.layers[int(row)]}, KL {kl.max():.3g} nats, then "
            f"‘{self.moment.word(int(found.top[row, expert]))}’"
            + (", all with the edits." if self.moment.edits else ".")
        )


def _has_answer(found: Counterfactual) -> bool:
    """Whether the model predicts anything without a choice of ours."""
    return not np.isnan(found.clean).any()
