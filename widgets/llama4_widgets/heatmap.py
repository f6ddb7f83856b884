"""One heat map with named rows and columns: layers by tokens, by heads, by experts."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Num, Shaped

_MOST_TICKS = 40


def figure(
    values: Num[np.ndarray, "r c"],
    *,
    title: str,
    unit: str,
    rows: Sequence[str],
    columns: Sequence[str],
    down: str,
    across: str,
    is_signed: bool = False,
    texts: Shaped[np.ndarray, "r c"] | None = None,
) -> go.Figure:
    """Draw values as colours, from zero up, or on both sides of zero where they have a sign.

    Args:
        unit: what the numbers are, for the colour bar and the hover text.
        rows, columns: a name for each; equal names stay apart.
        down, across: what the rows and the columns are.
        texts: what stands in each cell.

    Raises:
        ValueError: values that do not fit rows and columns.
    """
    values = np.asarray(values)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values of shape {values.shape} do not fit {len(rows)} rows and {len(columns)} columns"
        )
    finite = values[np.isfinite(values)].astype(float)
    most = float(np.abs(finite).max(initial=0.0)) or 1.0
    lowest = -most if is_signed else min(0.0, float(finite.min(initial=0.0)))
    drawn = go.Figure(
        go.Heatmap(
            z=values,
            zmin=lowest,
            zmax=most,
            colorscale="RdBu_r" if is_signed else "Blues",
            text=texts,
            texttemplate=None if texts is None else "%{text}",
            customdata=np.array(
                [[f"{down} {row}<br>{across} {c}" for c in columns] for row in rows]
            ),
            hovertemplate="%{customdata}<br>%{z:.4g} " + unit + "<extra></extra>",
            colorbar={"title": {"text": unit.replace(" ", "<br>")}},
            xgap=1 if len(columns) <= _MOST_TICKS else 0,
            ygap=1,
        )
    )
    for axis, names in ((drawn.update_xaxes, columns), (drawn.update_yaxes, rows)):
        every = -(-len(names) // _MOST_TICKS)
        axis(
            tickmode="array",
            tickvals=list(range(0, len(names), every)),
            ticktext=[str(name) for name in names[::every]],
        )
    drawn.update_xaxes(title=across, showgrid=False)
    drawn.update_yaxes(title=down, autorange="reversed", showgrid=False)
    drawn.update_layout(
        title=title,
        template="plotly_white",
        height=190 + 26 * min(len(rows), _MOST_TICKS),
        margin={"t": 60, "b": 60},
    )
    return drawn
