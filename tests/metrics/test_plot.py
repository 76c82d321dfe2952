"""Pictures can be read: names stand in rows of their own, no number is printed over another, and nothing is hidden."""

from itertools import combinations, pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stallfree.metrics import plot

NAMES = ["tight 256/32", "loose 2048/512", "gamma, CV 4, heavy tail", "bursts, log-normal", "over the best co-located"]
WIDE = {"a": [(name, 0.5 * 10**number) for number, name in enumerate(NAMES)], "b": [(name, 7.0) for name in NAMES]}
NARROW = {"a": [(name, 1.0) for name in NAMES], "b": [(name, 1.3) for name in NAMES], "c": [(name, 1.3) for name in NAMES]}
SAME = {name: [(32.0, 1.0), (128.0, 1.1), (512.0, 0.9)] for name in ("slo", "sarathi 512", "sarathi 2048", "orca", "vllm")}
APART = {"a": [(1, 0.001), (2, 9e5)], "b": [(1, 3), (2, 4)]}
CLOSE = {"a": [(1.2, 40.0), (1.5, 70.0), (2.0, 90.0)], "b": [(1.2, 41.0), (1.5, 69.0), (2.0, 91.0)]}
PANELS = {"21 ms": {"slo 21ms@p99": [(1.0, 0.0), (2.0, 0.004)], "sarathi 16": [(1.0, 0.0), (2.0, 0.3)], "orca": [(1.0, 0.0)]}}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The pictures that were written, laid out."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: figures.append(figure))
    yield figures
    assert figures


PICTURES = {
    "dots": lambda: plot.dots(NARROW, "factor", "title", Path("x.png"), even=1.0),
    "dots over decades": lambda: plot.dots(WIDE, "seconds", "title", Path("x.png"), log=True),
    "lines at the same places": lambda: plot.lines(SAME, "tokens", "ratio", "title", Path("x.png"), log="x", even=1.0),
    "lines within a decade": lambda: plot.lines(CLOSE, "times", "ms", "title", Path("x.png"), log="xy"),
    "lines over decades": lambda: plot.lines(
        {"a": [(1, 0.001), (2, 9e5)], "b": [(1, 3), (2, 4)]}, "x", "y", "t", Path("x"), log="y"
    ),
    "late shares": lambda: plot.late_shares(PANELS, Path("x.png")),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_is_printed_over_something_else(drawn, picture):
    PICTURES[picture]()
    (figure,) = drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    for axes in figure.axes:
        for line, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [tick for tick in (*line.get_major_ticks(), *line.get_minor_ticks()) if tick.label1.get_text()]
            shown = [tick.label1.get_window_extent(renderer) for tick in ticks if min(limits) <= tick.get_loc() <= max(limits)]
            assert len(shown) >= 2
            assert not any(a.overlaps(b) for a, b in combinations(shown, 2))
        for legend in figure.legends:
            assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))


@pytest.mark.parametrize("sides", [WIDE, NARROW])
def test_names_have_dots_in_rows_which_no_line_joins(drawn, sides):
    plot.dots(sides, "factor", "title", Path("x.png"))
    (axes,) = drawn[0].axes
    dots = [line for line in axes.lines if line.get_label() in sides]
    assert {"None"} == {line.get_linestyle() for line in dots}
    assert NAMES == [label.get_text() for label in axes.get_yticklabels()]
    # Equal values do not overlap either.
    places = [place for line in dots for place in zip(*line.get_data(), strict=True)]
    assert len(places) == len(set(places))


def test_sides_with_the_same_points_all_show(drawn):
    plot.lines(SAME, "tokens", "ratio", "title", Path("x.png"))
    (axes,) = drawn[0].axes
    assert len(SAME) == len({line.get_marker() for line in axes.lines}) == len({line.get_color() for line in axes.lines})
    assert {"none"} == {line.get_markerfacecolor() for line in axes.lines}
    assert all(below.get_markersize() > above.get_markersize() for below, above in pairwise(axes.lines))
    assert "-" == axes.lines[0].get_linestyle()
    assert all("-" != line.get_linestyle() for line in axes.lines[1:4])


def test_a_logarithmic_axis_says_the_numbers_that_were_looked_at(drawn):
    plot.lines({"a": [(64, 1), (1024, 2), (4096, 3)]}, "budget", "rate", "title", Path("x.png"), log="x")
    figure = drawn[0]
    figure.draw(FigureCanvasAgg(figure).get_renderer())
    assert ["64", "1,024", "4,096"] == [tick.get_text() for tick in figure.axes[0].get_xticklabels()]


def test_sides_without_late_tokens_have_a_level_each_below_all_others(drawn):
    plot.late_shares(PANELS, Path("x.png"))
    (axes,) = drawn[0].axes
    none = [float(line.get_ydata()[0]) for line in axes.lines if line.get_label() in ("slo", "sarathi 16", "orca")]
    assert 3 == len(set(none))
    assert max(none) < plot.NONE_LATE < 0.4


def test_without_matplotlib_the_hint_names_the_checkout(monkeypatch):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[plot\]' in the checkout"):
        plot.require()
