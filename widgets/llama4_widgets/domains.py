"""Which experts does each kind of text use? One heat map a model, side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots


def figure(
    domains: Sequence[str], panels: Mapping[str, Float[np.ndarray, "domain e"]]
) -> go.Figure:
    """Draw each domain's share by expert, one panel for each titled array, on one colour scale.

    Args:
        panels: shares in [0, 1] by title; the rows are the domains.
    """
    drawn = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        subplot_titles=list(panels),
        horizontal_spacing=0.04,
    )
    for column, share in enumerate(panels.values(), start=1):
        drawn.add_heatmap(
            z=100 * share,
            y=list(domains),
            texttemplate="%{z:.0f}",
            coloraxis="coloraxis",
            hovertemplate="%{y}: %{z:.1f} % of its tokens go to expert %{x}<extra></extra>",
            xgap=1,
            ygap=1,
            row=1,
            col=column,
        )
    drawn.update_xaxes(title="expert", dtick=1)
    drawn.update_yaxes(autorange="reversed")
    drawn.update_layout(
        template="plotly_white",
        height=150 + 34 * len(domains),
        margin={"t": 60, "b": 60},
        coloraxis={
            "colorscale": "Blues",
            "cmin": 0,
            "colorbar": {"title": {"text": "share of the<br>domain’s<br>tokens (%)"}},
        },
    )
    return drawn
