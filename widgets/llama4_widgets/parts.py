"""What a number is made of: one bar for each part, the strongest first."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

_FOR, _AGAINST = "#d55e00", "#0072b2"  # as in signed maps, and apart for colour-blind eyes


def figure(
    labels: Sequence[str],
    values: Float[np.ndarray, " parts"],
    *,
    title: str,
    unit: str,
    most: int = 15,
) -> go.Figure:
    """Draw the `most` strongest parts; the others are one bar, so that the sum stays.

    Args:
        unit: what the values are, for the axis.

    Raises:
        ValueError: values that do not fit their labels.
    """
    if np.shape(values) != (len(labels),):
        raise ValueError(f"values of shape {np.shape(values)} do not fit {len(labels)} labels")
    order = np.argsort(-np.abs(values), kind="stable")
    most += len(order) == most + 1  # one alone is no bar of others
    shown = order[:most]
    names = [labels[i] for i in shown]
    lengths = [float(values[i]) for i in shown]
    if rest := len(order) - len(shown):
        names.append(f"{rest} others together")
        lengths.append(float(values[order[most:]].sum()))
    drawn = go.Figure(
        go.Bar(
            x=lengths,
            y=list(range(len(names))),
            orientation="h",
            marker_color=[_FOR if length >= 0 else _AGAINST for length in lengths],
            text=[f"{length:+.2f}" for length in lengths],
            hovertext=names,
            hovertemplate="%{hovertext}: %{x:+.4f} " + unit + "<extra></extra>",
        )
    )
    drawn.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=names,
        autorange="reversed",
        automargin=True,
    )
    drawn.update_xaxes(title=unit, zeroline=True, zerolinecolor="#444")
    drawn.update_layout(
        title=f"{title}: {float(values.sum()):+.2f} {unit} in all",
        template="plotly_white",
        height=150 + 24 * len(names),
        margin={"t": 60, "b": 50},
    )
    return drawn
