"""Who works how much, for what kind of text, and who follows whom."""

from collections.abc import Iterator, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch
import traitlets

from llama4_lab.analysis.counts import RoutingCounts
from llama4_lab.analysis.load import effective_experts, gini, max_over_mean, normalised_entropy
from llama4_lab.analysis.routing import Routing, routing_of
from llama4_lab.analysis.specialisation import Specialisation, specialisation
from llama4_lab.analysis.transitions import following
from llama4_widgets.panels import Axis, Content, above_zero, around_zero, sequential
from llama4_widgets.view import View, button, in_row
from llama4_widgets.views.router import add_load

_ROWS, _LENGTH = 4, 96  # documents of each kind of text, and their tokens, at most
_CONTEXT, _SHORT = 4, 12  # tokens on either side, and characters at most
_MOST = 40  # tokens in the list
_BALANCE = {  # of a load, and the decimals that are shown
    "entropy": (normalised_entropy, 3),
    "effective": (effective_experts, 2),
    "Gini": (gini, 3),
    "max / mean": (max_over_mean, 2),
}


class ExpertsView(View):
    """Load and balance by layer, the tokens that the selected expert takes, flows, specialisation.

    `domains` are texts by their kind, which the button measures; None takes the held-out texts that
    come with the shipped models.
    """

    title = "Experts"
    help = (
        "An even load wastes no expert; an expert that prefers a kind of text has specialised. The "
        "flow shows where the tokens of one layer's expert go in the next MoE layer: without "
        "habits every row would look alike."
    )
    follows = ("layer", "expert")
    specialised = traitlets.Any(help="the Specialisation that was measured")

    def __init__(self, *args: Any, domains: dict[str, str] | None = None, **options: Any):
        self._domains = domains
        super().__init__(*args, **options)

    def controls(self) -> list[ipywidgets.Widget]:
        tip = "count the clean model's experts of held-out texts, some seconds"
        return [in_row(button("Measure kinds of text", tip, self.measure))]

    def measure(self) -> None:
        """Count which experts the tokens of each kind of text choose, without any edits."""
        model = self.moment.model
        with self.working("counting experts over held-out texts"), self.moment.computing():
            rows = {name: self._rows(name, text) for name, text in self._texts().items()}
            self.specialised = specialisation(model, rows)
            self.refresh()

    def _rows(self, name: str, text: str) -> Iterator[torch.Tensor]:
        """Give a text's tokens when they are asked for, unless the kernel was interrupted."""
        with self.moment.computing():
            ids = self.moment.model.prompt(text[: 8 * _ROWS * _LENGTH]).input_ids[0, 1:]
        if not (size := min(_LENGTH, len(ids) // _ROWS)):
            raise ValueError(f"the text of {name!r} has {len(ids)} tokens: give it {_ROWS} or more")
        yield ids[: _ROWS * size].view(_ROWS, size)

    def _texts(self) -> dict[str, str]:
        if self._domains is None:
            from llama4_lab.train.card import held_out_texts

            return held_out_texts()
        return self._domains

    def content(self) -> Content:
        clean, edited = self.moment.clean(routing_of), self.moment.edited(routing_of)
        count = len(clean.layers)
        content = Content(self.axes() | {"next": Axis("next layer's expert", edited.num_experts)})
        both = ("moe layer", "expert")
        before = clean if self.moment.edits else None
        add_load(content, edited, before)
        content.add(
            "loads",
            "Load of all layers",
            None,
            both,
            sequential(0, 100 * float(edited.load.max()), "%"),
            array="load",
            wide=False,
        )
        content.table(
            "balance",
            "Balance",
            ["layer", *_BALANCE],
            [
                [layer, *(round(float(of(load)), digits) for of, digits in _BALANCE.values())]
                for layer, load in zip(edited.layers, edited.load, strict=True)
            ],
            [{"layer": layer} for layer in edited.layers],
            wide=False,
            note="all alike: entropy 1, Gini 0, max / mean 1, and as many effective as there are",
        )
        self._add_tokens(content, edited)
        if count > 1:
            counts = RoutingCounts.empty(count, edited.num_experts, 1)
            in_all = (edited.expert >= 0).all(axis=(0, 1))  # edits can give a layer more choices
            counts.update(edited.expert[..., in_all])
            flow = np.full((count, edited.num_experts, edited.num_experts), np.nan)
            is_used = counts.transitions.any(axis=-1, keepdims=True)
            flow[:-1] = np.where(is_used, 100 * following(counts.transitions), np.nan)
            content.add(
                "flow",
                "Flow to the next MoE layer",
                flow,
                ("moe layer", "expert", "next"),
                sequential(0, 100, "%"),
                wide=False,
                paged=True,
                note="of the tokens of an expert of the layer (down); empty: it has none"
                + ", first choices only" * (edited.expert.shape[-1] > 1),
            )
        if self.specialised is not None:
            self._add_domains(content, self.specialised)
        return content

    def _layer(self, routing: Routing) -> int:
        layer = self.selection.layer
        return layer if layer in routing.layers else routing.layers[0]

    def _add_tokens(self, content: Content, routing: Routing) -> None:
        layer, expert = self._layer(routing), self.selection.expert
        row, words = routing.row(layer), self.moment.words
        taken = np.argwhere(routing.expert[row] == expert).tolist()  # tokens and their choice
        content.table(
            "tokens",
            f"Tokens of expert {expert} in layer {layer}",
            ["token", "score", "in context"],
            [
                [words[i], round(float(routing.score[row, i, k]), 2), _context(words, i)]
                for i, k in taken[:_MOST]
            ],
            [{"token": i} for i, _ in taken[:_MOST]],
            wide=False,
            note=f"{len(taken)} of {len(words)}" + f", the first {_MOST}" * (len(taken) > _MOST),
        )

    def _add_domains(self, content: Content, found: Specialisation) -> None:
        domains = len(found.domains)
        content.axes["domain"] = Axis("kind of text", domains, labels=found.domains)
        content.axes["of"] = Axis("kind of text", domains, labels=found.domains)
        above = 100 * (found.share - found.mixed)
        content.add(
            "domains",
            "What an expert prefers",
            np.moveaxis(above, 1, 0),
            ("moe layer", "domain", "expert"),
            around_zero(above, "points", 0),
            note="in the layer, of the clean model: share of a kind's tokens above the mean of all "
            "kinds, in percentage points",
        )
        low, high = found.information_band()
        null = np.quantile(found.shuffled_information(), 0.95, axis=0)
        for name, values in (("low", low), ("high", high), ("null", null)):
            content.array(f"bits {name}", values, ("moe layer",))
        series = [
            {"array": "bits", "label": "measured", "colour": "#6c9cfc"},
            {"array": "bits low", "label": "95 % band", "colour": "#6c9cfc", "dash": "3 3"},
            {"array": "bits high", "label": "", "colour": "#6c9cfc", "dash": "3 3"},
            {"array": "bits null", "label": "shuffled kinds, 95 %", "colour": "#a83c00"},
        ]
        content.add(
            "bits",
            "Bits that an expert tells about the kind of text",
            found.mutual_information,
            ("moe layer",),
            above_zero(high, "bits", 1),
            kind="lines",
            series=series,
            note="of the clean model; band: of other passages of these texts",
        )

    def summary(self) -> str:
        routing = self.moment.edited(routing_of)
        layer = self.selection.layer
        dense = f"Layer {layer} is dense: it has no experts. " * (layer not in routing.layers)
        row = routing.row(self._layer(routing))
        load = routing.load[row]
        idle = int((load == 0).sum())
        return (
            f"{dense}Layer {routing.layers[row]}: expert {load.argmax()} takes most, "
            f"{100 * load.max():.0f} %; {idle} of {len(load)} take{'s' * (idle == 1)} nothing; as "
            f"even as {float(effective_experts(load)):.1f} experts with equal loads."
        )


def _context(words: Sequence[str], i: int) -> str:
    before, after = words[max(0, i - _CONTEXT) : i], words[i + 1 : i + 1 + _CONTEXT]
    return f"{''.join(before)[-_SHORT:]}[{words[i]}]{''.join(after)[:_SHORT]}"
