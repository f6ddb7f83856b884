"""What does an answer owe to each token, image patch or expert?"""

from collections.abc import Callable, Collection, Generator
from dataclasses import replace
from typing import Any

import ipywidgets
import numpy as np
import traitlets
from torch import Tensor

from llama4_lab.analysis.attribution import Attribution, attribute
from llama4_lab.analysis.expert_features import expert_features
from llama4_lab.analysis.features import Features, Target, patch_features, token_features
from llama4_widgets.moment import Moment
from llama4_widgets.panels import Axis, Content, diverging
from llama4_widgets.slices import Work, sliced
from llama4_widgets.view import View, in_row
from llama4_widgets.views.image import add_picture, drawn_pictures, pictures_of
from llama4_widgets.words import number, token_id

METHODS = ("integrated_gradients", "feature_ablation", "shapley_sampling")
FEATURES: dict[str, Callable[..., Features]] = {
    "tokens": token_features,
    "image patches": patch_features,
    "experts": expert_features,
}
PLACES = ("last token", "selected token")
_MOST = 20  # experts that are shown


class AttributionView(View):
    """captum's methods for tokens, patches and experts; they run when the button is pressed."""

    title = "Attribution"
    help = (
        "The answer's log-probability changes from its value with all parts off to that with all "
        "on, and a method divides this change among the parts. Off, a token reads as padding, a "
        "patch is grey, an expert adds nothing. Integrated gradients, which leave each token its "
        "experts, and Shapley values give all of the change away, as the completeness error "
        "measures; ablation promises nothing of the kind."
    )
    follows = ("token",)
    method = traitlets.Enum(METHODS, METHODS[0], help="of captum")
    features = traitlets.Enum(tuple(FEATURES), "tokens", help="the parts")
    after = traitlets.Enum(PLACES, PLACES[0], help="the position whose answer is explained")
    word = traitlets.Unicode(help="the answer to explain; empty: the model's own").tag(
        empty="the model's answer"
    )

    def controls(self) -> list[ipywidgets.Widget]:
        self.work = Work(self, "Run", self._steps)
        controls = self.linked(method="Method", features="Parts", after="Word after", word="Word")
        return [in_row(*controls, in_row(self.work.begin, self.work.stop))]

    # ---- the work

    def _steps(self) -> Generator[str, None, None]:
        """Answer the question in the clean run, and in the edited one; count the model's runs."""
        moment, method, question = self.moment, self.method, self._question()
        if self.features == "image patches" and not moment.prompt.spans.layouts:
            raise ValueError("this prompt has no picture: choose tokens or experts under Parts")
        build, runs = FEATURES[self.features], 0
        for is_edited in (False, True) if moment.edits else (False,):
            with _running(moment, is_edited):
                features = build(moment.model, moment.prompt, self._target())

            def work(
                pause: Callable[[str], None], features: Any = features, on: bool = is_edited
            ) -> Attribution:
                def value(gates: Tensor, fixed_routing: bool) -> Tensor:
                    nonlocal runs
                    # Nothing is open here, so that other views may use the model.
                    pause(f"{method}: {runs} runs of the model")
                    runs += len(gates)
                    with _running(moment, on):
                        return features.value(gates, fixed_routing)

                return attribute(replace(features, value=value), method, progress=False)

            moment.kept[(*question, is_edited)] = yield from sliced(work)

    def _target(self) -> Target:
        """Return which word after which position is explained."""
        last = len(self.moment.words) - 1
        position = last if self.after == PLACES[0] else self.selection.token
        token = token_id(self.moment.model.tokenizer, self.word) if self.word else None
        if token is None:  # the clean answer, in the edited run too
            token = int(self.moment.replay.logits[position].argmax())
        return Target(token, position)

    def _question(self) -> tuple[Any, ...]:
        return self.method, self.features, self._target()

    def _results(self) -> list[Attribution]:
        """Return the clean result, then the edited one, as far as they are known."""
        kept, question = self.moment.kept, self._question()
        keys = [(*question, is_edited) for is_edited in (False, True)]
        return [kept[key] for key in keys if key in kept]

    # ---- what is shown

    def content(self) -> Content:
        found = self._results()
        content = Content(self.axes())
        bound = max((float(abs(one.values).max()) for one in found), default=1.0) or 1.0
        scale = diverging(bound, "nats")
        for one, name in zip(found, ("clean", "edited"), strict=False):
            title = f"What gives the answer{f', {name}' if len(found) > 1 else ''}"
            note = f"red: for the answer; blue: against it; strongest: {bound:.3g} nats"
            if self.features == "tokens":
                values = np.full(len(self.moment.words), np.nan)
                values[one.places[:, 0]] = one.values
                content.add(name, title, values, ("token",), scale, kind="strip", note=note)
            elif self.features == "image patches":
                self._add_pictures(content, one, name, title, scale, note)
            else:
                self._add_experts(content, one, name, title, bound, note)
        return content

    def _add_pictures(
        self, content: Content, one: Attribution, name: str, title: str, scale: Any, note: str
    ) -> None:
        """Lay the values over the pictures; a global tile is drawn by itself."""
        prompt = self.moment.prompt
        assert prompt.spans.tiling is not None  # a prompt with pictures
        grid = prompt.spans.tiling.grid
        tile, patch = prompt.spans.tile[0].numpy(), prompt.spans.patch[0].numpy()
        values = np.full(len(tile), np.nan)
        values[patch >= 0] = one.values[tile[patch >= 0] * grid**2 + patch[patch >= 0]]
        content.array(name, values, ("token",))
        pictures = pictures_of(prompt)
        share = 1 / min(len(pictures), 5) if len(pictures) > 1 else None
        for i, picture in enumerate(pictures):
            local, whole = drawn_pictures(prompt, picture)
            parts = [("", picture.stitch(picture.position), local)]
            if picture.layout.num_tiles > 1:
                parts.append((", global tile", picture.position[-1], whole))
            for part, place, drawn in parts:
                add_picture(
                    content, f"{name} {i}{part}", f"{title}: picture {i}{part}", name, scale,
                    place, drawn, 60_000, note=note, share=share, opacity=0.6,
                )  # fmt: skip

    def _add_experts(
        self, content: Content, one: Attribution, name: str, title: str, bound: float, note: str
    ) -> None:
        order = np.argsort(-abs(one.values), kind="stable")[:_MOST]
        rows = [[one.labels[i], float(one.values[i])] for i in order]
        choices = [dict(zip(one.axes, map(int, one.places[i]), strict=True)) for i in order]
        content.table(
            name, title, ["part", "nats"], rows, choices, wide=False, bars=[None, bound],
            note=f"the {len(rows)} strongest of {len(one.values)}",
        )  # fmt: skip
        layers = sorted({int(layer) for layer in one.places[:, 0]})
        content.axes["all"] = Axis("layer", len(layers), "layer", values=layers)
        content.add(
            f"{name} map", title, one.values.reshape(len(layers), -1), ("all", "expert"),
            diverging(bound, "nats"), wide=False, note=note,
        )  # fmt: skip

    def fixed(self, content: Content) -> Collection[str]:
        return ("token",) if self.after == PLACES[1] else ()

    def summary(self) -> str:
        target = self._target()
        assert target.token is not None
        asked = f"‘{self.moment.word(target.token)}’ after token {target.position}"
        found = self._results()
        if not found:
            how = f"by {self.features} and {self.method}"
            return f"{asked} is not explained {how} yet: press Run, it takes seconds."
        told = [
            f"{name}: {number(one.all_off, '.3f')} nats with all parts off, "
            f"{number(one.all_on, '.3f')} with all on; "
            f"the values miss the change by {one.completeness_error:.2%}"
            for one, name in zip(found, ("clean", "edited"), strict=False)
        ]
        return f"{asked}. " + ". ".join(told) + "."


def _running(moment: Moment, is_edited: bool) -> Any:
    return moment.running_edited() if is_edited else moment.computing()
