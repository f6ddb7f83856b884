"""Which expert does each token choose, how surely, and what do edits change?"""

import numpy as np

from llama4_lab.analysis.routing import Routing, routing_of
from llama4_widgets.panels import Content, diverging, experts, sequential
from llama4_widgets.view import View
from llama4_widgets.words import describe


class RouterView(View):
    """Tokens by layers: chosen expert, score, margin, every expert's probability."""

    title = "Router"
    help = (
        "In every MoE layer a router reads each token and picks the expert with the largest logit; "
        "the sigmoid of that logit, the score, multiplies what the expert reads. Small margins are "
        "close calls: little edits, or fewer bits, tip them over."
    )

    def content(self) -> Content:
        clean, edited = self.moment.clean(routing_of), self.moment.edited(routing_of)
        is_edited = bool(self.moment.edits)
        content = Content(self.axes())
        both = ("moe layer", "token")
        scale = experts(edited.num_experts)
        content.add("chosen", "Chosen expert", edited.expert[..., 0], both, scale)
        content.add(
            "strip", "The text, by expert of the layer", None, both, scale,
            kind="strip", shown=("token",), array="chosen",
        )  # fmt: skip
        if is_edited:
            flips = (clean.expert[..., 0] != edited.expert[..., 0]).astype(float)
            content.add(
                "flips", "Flips", np.where(flips, 1.0, np.nan), both,
                sequential(0, 1), note="tokens whose expert is another than in the clean run",
            )  # fmt: skip
        content.add("score", "Score", edited.score[..., 0], both, sequential(0, 1), wide=False)
        margin = np.minimum(edited.margin, 4.0)
        content.add(
            "margin", "Margin", margin, both, sequential(0, 4, "logits", "or more"),
            wide=False, note="over the runner-up",
        )  # fmt: skip
        each = ("moe layer", "token", "expert")
        if is_edited:
            content.array("clean probability", _sigmoid(clean), each)
        content.add(
            "probability", "Probability of each expert", _sigmoid(edited), each,
            sequential(0, 1), kind="bars", wide=False, colours=scale["colours"],
            clean="clean probability" if is_edited else None,
            note="sigmoid of the logit, each alone: no sum to 1" + ("; marks: clean" * is_edited),
        )  # fmt: skip
        if is_edited:
            change = _sigmoid(edited) - _sigmoid(clean)
            content.add(
                "change", "Change of the probabilities", change, each, diverging(1.0),
                shown=("expert", "token"), wide=False, note="edited minus clean, of the layer",
            )  # fmt: skip
        return content

    def summary(self) -> str:
        routing = self.moment.edited(routing_of)
        layer, token = self.selection.layer, self.selection.token
        if layer not in routing.layers:
            return f"layer {layer} is dense: it has no router"
        return describe(routing, layer, token)


def _sigmoid(routing: Routing) -> np.ndarray:
    return 1 / (1 + np.exp(-routing.logits))
