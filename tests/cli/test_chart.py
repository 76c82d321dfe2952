"""Bars are as high as their values."""

import pytest

from stallfree.cli.chart import LABEL, chart


def drawn(*bars: float, height: int = 2, top: float = 16, line: float | None = None) -> list[str]:
    return [row[LABEL:] for row in chart(bars, height, top, line).plain.split("\n")]


@pytest.mark.parametrize(("value", "expected"), [(0, "  "), (1, " ▁"), (8, " █"), (9, "▁█"), (16, "██"), (99, "██")])
def test_a_bar_is_an_eighth_of_a_line_exact_and_ends_at_the_top(value, expected):
    assert list(expected) == drawn(value)


def test_a_small_bar_is_seen():
    assert [" ", "▁"] == drawn(0.01)


def test_the_line_is_drawn_where_no_bar_is():
    assert ["╌▄╌", " █▄"] == drawn(0, 12, 4, line=9)


def test_a_bar_above_the_line_is_red():
    assert {"green", "red"} == {str(s.style) for s in chart([8, 10], 2, 16, 9).spans} & {"green", "red"}


def test_the_axis_says_its_top_its_line_and_zero():
    assert ["16", "9", "", "0"] == [row[:LABEL].strip() for row in chart([0], 4, 16, 9).plain.split("\n")]
