"""Figures of the instruments: what they draw is what they were given."""

import numpy as np
import pytest
from PIL import ImageColor

from llama4_widgets import heatmap, parts


def a_heatmap(values, **options):
    rows, columns = ([str(i) for i in range(n)] for n in values.shape)
    return heatmap.figure(
        values,
        title="Effect",
        unit="nats",
        rows=rows,
        columns=columns,
        down="layer",
        across="token",
        **options,
    )


def test_a_heat_map_begins_at_zero_or_lies_around_it():
    values = np.array([[1.0, 2.0], [3.0, -4.0]])
    signed, plain = a_heatmap(values, is_signed=True), a_heatmap(np.abs(values))
    assert (signed.data[0].zmin, signed.data[0].zmax) == (-4, 4)
    assert (plain.data[0].zmin, plain.data[0].zmax) == (0, 4)
    np.testing.assert_array_equal(signed.data[0].z, values)
    assert signed.data[0].customdata[1, 0] == "layer 1<br>token 0"
    assert signed.layout.xaxis.title.text == "token"


def test_a_heat_map_survives_equal_names_and_values_that_are_no_numbers():
    values = np.full((1, 2), np.nan)
    drawn = heatmap.figure(
        values, title="", unit="", rows=["a"], columns=["the", "the"], down="", across=""
    )
    assert drawn.layout.xaxis.ticktext == ("the", "the")
    assert drawn.layout.xaxis.tickvals == (0, 1)
    assert drawn.data[0].zmax == 1


def test_a_long_heat_map_names_some_of_its_columns():
    drawn = a_heatmap(np.zeros((2, 500)))
    assert len(drawn.layout.xaxis.ticktext) <= 40
    assert drawn.layout.xaxis.ticktext[1] == str(drawn.layout.xaxis.tickvals[1])


def test_bars_show_the_strongest_parts_and_keep_the_sum():
    values = np.array([0.5, -3.0, 0.25, 1.0])
    drawn = parts.figure(list("abcd"), values, title="Logit", unit="logits", most=2)
    assert drawn.layout.yaxis.ticktext == ("b", "d", "2 others together")
    assert sum(drawn.data[0].x) == pytest.approx(values.sum())
    assert drawn.layout.title.text == "Logit: -1.25 logits in all"
    against, is_for, _ = drawn.data[0].marker.color
    signed = dict(a_heatmap(values[None], is_signed=True).data[0].colorscale)
    for bar, end in ((against, signed[0.0]), (is_for, signed[1.0])):  # red or blue in both
        sides = [red > blue for red, _, blue in map(ImageColor.getrgb, (bar, end))]
        assert sides[0] == sides[1]


def test_one_part_more_is_shown_by_its_name():
    drawn = parts.figure(["a", "b", "c"], np.array([1.0, -3.0, 2.0]), title="", unit="", most=2)
    assert drawn.layout.yaxis.ticktext == ("b", "c", "a")


def test_values_that_do_not_fit_their_names_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\) do not fit 3 labels"):
        parts.figure(["a", "b", "c"], np.zeros(2), title="", unit="")
    with pytest.raises(ValueError, match=r"shape \(2, 3\) do not fit 2 rows and 1 columns"):
        heatmap.figure(
            np.zeros((2, 3)), title="", unit="", rows=["a", "b"], columns=["a"], down="", across=""
        )
