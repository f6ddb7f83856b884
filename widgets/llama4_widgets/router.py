"""Which expert does each token choose? One figure, and a live explorer of the same decisions."""

import base64
import html
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import plotly.graph_objects as go
import traitlets
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from llama4_widgets.colours import colour, ink
from llama4_widgets.picture import svg
from llama4_widgets.words import describe, visible

if TYPE_CHECKING:
    from llama4_lab.analysis.routing import Routing

_ROOMY = 90  # tokens; with more, cells are too narrow for a number and a name


def figure(routing: "Routing", layer: int, token: int) -> go.Figure:
    """Draw every choice of a prompt; below it one token's router and one layer's load.

    Raises:
        ValueError: a layer without experts, or a token outside the prompt.
    """
    row, token = routing.row(layer), routing.position(token)
    heights = max(140, 24 * len(routing.layers)), 220  # pixels, of the map and of the charts
    gap = 210 if _is_roomy(routing) else 130
    drawn = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=list(heights),
        vertical_spacing=gap / (sum(heights) + gap),
        horizontal_spacing=0.13,
        subplot_titles=[
            "Chosen expert, by layer and token",
            f"Router of layer {layer} at token {token} ‘{_shown(routing.tokens[token])}’",
            f"Load of layer {layer}, {len(routing.tokens)} tokens",
        ],
    )
    drawn.add_trace(_map(routing), row=1, col=1)
    drawn.add_shape(
        **{"type": "rect", "x0": token - 0.5, "x1": token + 0.5, "y0": row - 0.5, "y1": row + 0.5},
        line={"color": "black", "width": 3},
        row=1,
        col=1,
    )
    probability = 1 / (1 + np.exp(-routing.logits[row, token]))
    chosen = routing.expert[row, token]
    drawn.add_trace(_bars(probability, "%{y:.2f}", chosen), row=2, col=1)
    drawn.add_trace(_bars(100 * routing.load[row], "%{y:.1f}", chosen), row=2, col=2)
    uniform = 100 / routing.num_experts
    of_load = {"xref": "x3 domain", "yref": "y3"}
    drawn.add_shape(
        **of_load, x0=0, x1=1, y0=uniform, y1=uniform, line={"dash": "dash", "color": "#444"}
    )
    drawn.add_annotation(
        **of_load,
        x=1,
        xanchor="left",
        y=uniform,
        text=f"all alike:<br>{uniform:.3g} %",
        showarrow=False,
    )
    _label_axes(drawn, routing)
    drawn.update_layout(
        title={"text": html.escape(describe(routing, layer, token))},
        template="plotly_white",
        height=sum(heights) + gap + 160,
        margin={"t": 100, "b": 60, "l": 80, "r": 90},
        showlegend=False,
        coloraxis=_expert_scale(routing.num_experts, heights[0]),
    )
    return drawn


def _is_roomy(routing: "Routing") -> bool:
    return len(routing.tokens) <= _ROOMY


def _shown(token: str) -> str:
    return html.escape(visible(token))


def _map(routing: "Routing") -> go.Heatmap:
    tokens = range(len(routing.tokens))
    sentences = [
        [html.escape(describe(routing, layer, token)) for token in tokens]
        for layer in routing.layers
    ]
    return go.Heatmap(
        z=routing.expert[..., 0],
        coloraxis="coloraxis",
        texttemplate="%{z}" if _is_roomy(routing) and routing.num_experts < 100 else None,
        textfont={"size": 9},
        customdata=sentences,
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1 if _is_roomy(routing) else 0,
        ygap=1,
    )


def _bars(height: Float[np.ndarray, " e"], text: str, chosen: Int[np.ndarray, " topk"]) -> go.Bar:
    experts = list(range(len(height)))
    is_chosen = np.isin(experts, chosen)
    edge = 2.5 if len(height) <= 32 else 0.5
    return go.Bar(
        x=experts,
        y=height,
        marker={
            "color": [colour(e) for e in experts],
            "opacity": np.where(is_chosen, 1, 0.65),
            "line": {"color": "black", "width": np.where(is_chosen, edge, 0)},
        },
        texttemplate=text if len(height) <= 16 else None,
        textposition="outside",
        cliponaxis=False,
        hovertemplate=f"expert %{{x}}: {text}<extra></extra>",
    )


def _label_axes(drawn: go.Figure, routing: "Routing") -> None:
    count, roomy = len(routing.tokens), _is_roomy(routing)
    ticks = list(range(0, count, 1 if roomy else -(-count // 20)))
    drawn.update_xaxes(
        title="token" if roomy else "position of the token",
        tickvals=ticks,
        ticktext=[_shown(routing.tokens[i]) for i in ticks] if roomy else ticks,
        tickangle=-90 if roomy else 0,
        tickfont={"size": 10},
        showgrid=False,
        row=1,
        col=1,
    )
    drawn.update_yaxes(
        title="layer",
        tickvals=list(range(len(routing.layers))),
        ticktext=[str(layer) for layer in routing.layers],
        autorange="reversed",
        showgrid=False,
        row=1,
        col=1,
    )
    drawn.update_xaxes(title="expert", dtick=1 if routing.num_experts <= 16 else 8, row=2)
    drawn.update_yaxes(
        title="sigmoid(logit), each expert<br>alone: no sum to 1",
        range=[0, 1.15],
        tickvals=[0, 0.5, 1],
        row=2,
        col=1,
    )
    drawn.update_yaxes(title="share of choices (%)", rangemode="tozero", row=2, col=2)


def _expert_scale(num_experts: int, height: int) -> dict[str, Any]:
    """Return the legend: a scale of one step for each expert, `height` pixels tall."""
    edges = [(e + end) / num_experts for e in range(num_experts) for end in (0, 1)]
    return {
        "cmin": -0.5,
        "cmax": num_experts - 0.5,
        "colorscale": [(edge, colour(i // 2)) for i, edge in enumerate(edges)],
        "colorbar": {
            "title": {"text": "expert"},
            "tickvals": list(range(0, num_experts, 1 if num_experts <= 16 else 8)),
            "len": height + 30,
            "lenmode": "pixels",
            "y": 1.0,
            "yanchor": "top",
            "thickness": 16,
        },
    }


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class RouterExplorer(anywidget.AnyWidget):
    """Shows a prompt's routing and lets people walk through it by mouse and keyboard.

    `layer`, `token` and `text` are traits: set them, observe them, or read them in the next cell.
    Setting `text`, or typing a text and pressing Enter, runs it.

    Args:
        routing: the decisions to show; `routing` always holds those on screen.
        text: what they belong to.
        run: makes the routing of another text; without it the explorer shows one recording.
    """

    _esm = _read("elements.js") + _read("router.js")
    _css = _read("router.css")

    layer = traitlets.Int(help="layer of the model; one that has experts").tag(sync=True)
    token = traitlets.Int(help="position in the prompt").tag(sync=True)
    text = traitlets.Unicode(help="the text that is shown").tag(sync=True)
    is_live = traitlets.Bool(help="whether other texts can be run").tag(sync=True)
    routing = traitlets.Instance("llama4_lab.analysis.routing.Routing").tag(
        sync=True, to_json=lambda routing, _: _message(routing)
    )

    def __init__(
        self,
        routing: "Routing",
        text: str = "",
        run: "Callable[[str], Routing] | None" = None,
        **choice: int,
    ):
        self._run = lambda _: routing  # the first text has been run
        super().__init__(routing=routing, text=text, is_live=run is not None, **choice)
        self._run = run
        self.on_msg(self._receive)

    def figure(self) -> go.Figure:
        """Return what is on screen as one static figure."""
        return figure(self.routing, self.layer, self.token)

    def to_html(self, path: str | Path) -> None:
        """Write the explorer as one page that works by itself: no kernel, no network."""
        state = {name: getattr(self, name) for name in ("layer", "token", "text")}
        state |= {"is_live": False, "routing": _message(self.routing)}
        parts = {
            "TITLE": html.escape(self.text[:80]),
            "STYLE": self._css,
            "SCRIPT": self._esm,
            "STATE": json.dumps(state, default=_base64).replace("<", "\\u003c"),
        }
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))
        Path(path).write_text(page, encoding="utf-8")

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add a picture and a sentence, for pages that run no script."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        data["text/plain"] = f"RouterExplorer: {describe(self.routing, self.layer, self.token)}"
        data["image/svg+xml"] = svg(self.routing, self.layer, self.token)
        return data, metadata

    @traitlets.default("layer")
    def _first_layer(self) -> int:
        return self.routing.layers[0]

    @traitlets.default("token")
    def _first_word(self) -> int:
        return min(1, len(self.routing.tokens) - 1)  # what stands behind begin-of-text

    @traitlets.validate("layer")
    def _check_layer(self, proposal: Any) -> int:
        with _explained():
            self.routing.row(proposal["value"])
        return proposal["value"]

    @traitlets.validate("token")
    def _check_token(self, proposal: Any) -> int:
        with _explained():
            return self.routing.position(proposal["value"])

    @traitlets.validate("text")
    def _show(self, proposal: Any) -> str:
        """Run a text and show it; one that cannot be run changes nothing."""
        text = proposal["value"]
        if self._run is None:
            raise traitlets.TraitError(
                f"this explorer cannot run {text!r:.40}: it shows a recorded routing; "
                "explore(model, text) makes one that runs other texts"
            )
        with _explained(), self.hold_sync():
            self.routing = self._run(text)
        return text

    @traitlets.observe("routing")
    def _keep_choice_inside(self, _change: Any) -> None:
        if self.layer not in self.routing.layers:
            self.layer = self.routing.layers[0]
        self.token = min(self.token, len(self.routing.tokens) - 1)

    def _receive(self, _widget: Any, content: dict[str, str], _buffers: Any) -> None:
        """Run the text that was typed, and answer what was wrong with it, if anything."""
        problem = ""
        try:
            self.text = content["run"]
        except traitlets.TraitError as error:
            problem = str(error)
        self.send({"problem": problem})


@contextmanager
def _explained() -> Iterator[None]:
    """Raise the error that traitlets knows, with the same sentence."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise traitlets.TraitError(str(error)) from error


def _message(routing: "Routing") -> dict[str, Any]:
    """Pack a routing for the browser: words as JSON, numbers as bytes."""
    experts = range(routing.num_experts)
    return {
        "tokens": routing.tokens,
        "words": [visible(token) for token in routing.tokens],
        "layers": routing.layers,
        "colours": [colour(e) for e in experts],
        "inks": [ink(colour(e)) for e in experts],
        "expert": routing.expert.astype("<i2").tobytes(),
        "runnerUp": routing.runner_up.astype("<i2").tobytes(),
        "score": routing.score.astype("<f4").tobytes(),
        "margin": routing.margin.astype("<f4").tobytes(),
        "logits": routing.logits.astype("<f4").tobytes(),
        "load": routing.load.astype("<f4").tobytes(),
    }


def _base64(array: bytes) -> str:
    return base64.b64encode(array).decode()
