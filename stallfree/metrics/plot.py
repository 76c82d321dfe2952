"""Draws runs: from records, the tokens of each stream and the prompts they waited for; from timelines, latencies and load.

It needs matplotlib (the extra `plot`). It does not know how a run was made.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from stallfree import extra
from stallfree.core.record import StepRecord
from stallfree.core.slo import Slo, Target
from stallfree.metrics.report import Report
from stallfree.metrics.timeline import Timeline, timelines

MARKS = "osD^vP*X"
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Marks and dashes for the sides of a picture, in turn: see `_style`."""

NONE_LATE = 0.01
"""Per cent of late tokens. A logarithmic axis has no 0, so runs without late tokens are drawn below this, and others above."""


def require() -> None:
    """Raises ValueError, with the command that installs it, if matplotlib is missing. Call it before a run, not after."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"plots need matplotlib, which is not installed: {extra('plot')}")


def streams(runs: Mapping[str, Sequence[StepRecord]], file: Path, window_s: tuple[float, float], long_prompt: int = 1000) -> None:
    """Draw a panel per run: a row for each stream, with a dot for each token, and shading while an iteration computes a prompt of
    at least `long_prompt` tokens, as dark as its share of the iteration's tokens. `window_s`: from and to, in seconds after the
    first token.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4 * len(runs) + 0.4), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, records) in zip(axes, runs.items(), strict=True):
        lines = timelines(records)
        origin = min(line.tokens[0] for line in lines.values() if line.tokens) + window_s[0]
        rows = [line for line in lines.values() if line.prompt_tokens < long_prompt]
        for r in records:
            total = sum(count for _, _, count in r.work)
            long = sum(count for id, _, count in r.work if lines[id].prompt_tokens >= long_prompt)
            if long:
                axis.axvspan(
                    r.t_start - origin, r.t_end - origin, color="tab:orange", alpha=0.15 + 0.35 * long / total, linewidth=0
                )
        for row, line in enumerate(rows):
            axis.plot([t - origin for t in line.tokens], [row] * len(line.tokens), ".", color="tab:blue", markersize=2.5)
        axis.set_xlim(0, window_s[1] - window_s[0])
        axis.set_yticks(range(0, len(rows), 5))
        axis.set_ylabel("stream")
        axis.set_title(name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds (a dot is a token; orange: a long prompt is being computed)")
    figure.savefig(file, dpi=150)


def late_shares(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], file: Path, allowed: float = 0.01) -> None:
    """Draw a panel for each target: each side's share of late tokens over the request rate, and the share that is `allowed`. A rate
    without late tokens is in the band below, where each side has its own level. All panels share a legend, so a side has the same
    place in each. The legend shows only the first word of `slo ...`; the titles have the rest.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, sides) in zip(axes, panels.items(), strict=True):
        for number, (name, points) in enumerate(sides.items()):
            is_slo = name.startswith("slo")
            style = _style(number, len(sides)) | ({"color": "black", "linewidth": 2.5, "zorder": 3} if is_slo else {})
            rates, shares = zip(*sorted(points), strict=True)
            drawn = [max(100 * share, NONE_LATE) if share else NONE_LATE * 0.8 ** (number + 1) for share in shares]
            axis.plot(rates, drawn, label="slo" if is_slo else name, **style)
        axis.axhline(100 * allowed, color="tab:red", linestyle="--", linewidth=0.8)
        axis.set(title=title, xlabel="requests per second", ylabel="late tokens, %")
        _logarithmic(axis, "y")
        axis.axhspan(NONE_LATE * 0.8 ** (len(sides) + 1), NONE_LATE, color="0.92", zorder=0)
        axis.set_ylim(bottom=NONE_LATE * 0.8 ** (len(sides) + 1))
        ticks = [tick for tick in axis.get_yticks() if NONE_LATE < tick <= axis.get_ylim()[1]]
        axis.set_yticks([NONE_LATE * 0.8 ** ((len(sides) + 1) / 2), *ticks], ["none", *(f"{tick:g}" for tick in ticks)])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(file, dpi=150)


def latencies(runs: Mapping[str, Sequence[Timeline]], slo: Slo) -> str:
    """Runs side by side as SVG elements: the distributions of TTFT and TBT, with the targets of `slo`; and for each run every TBT
    and the number of requests over time.
    """
    ttfts = {name: [line.ttft for line in lines if line.ttft is not None] for name, lines in runs.items()}
    gaps = {name: [gap for line in lines for gap in line.gaps] for name, lines in runs.items()}
    panels = [_distribution("TTFT", ttfts, slo.ttft), _distribution("TBT", gaps, slo.tbt)]
    highest = max((1e3 * gap for of_run in gaps.values() for gap in of_run), default=0.0)
    for number, (name, lines) in enumerate(runs.items()):
        end = max((t for line in lines for t in (line.arrival, line.finished or 0.0)), default=0.0)
        over_time, load = _panel(f"{name}: every TBT", "seconds of the run"), _panel(f"{name}: requests", "seconds of the run")
        times = [t for line in lines for t in line.tokens[1:]]
        over_time.plot(times, [gap * 1e3 for gap in gaps[name]], ".", color=f"C{number}", markersize=1.5, rasterized=True)
        if slo.tbt:
            over_time.axhline(slo.tbt.seconds * 1e3, color="black", linestyle="--", linewidth=0.8)
        over_time.set(ylabel="ms", ylim=(0, 1.05 * highest or None), xlim=(0, end or None))
        changes = sorted([(line.arrival, 1) for line in lines] + [(line.finished or end, -1) for line in lines])
        load.step([t for t, _ in changes], list(accumulate(change for _, change in changes)), where="post", color=f"C{number}")
        load.plot([line.arrival for line in lines], [0] * len(lines), "|", color="black", markersize=8, alpha=0.5)
        load.set(ylabel="requests there (a bar is an arrival)", xlim=(0, end or None))
        panels += [over_time, load]
    return "\n".join(map(_svg, panels))


def loads(reports: Mapping[tuple[str, float], Report]) -> str:
    """TTFT, TBT and throughput over the request rate, as SVG. `reports`: by configuration and rate (1/s)."""
    values: dict[str, Callable[[Report], float | None]] = {
        "TTFT p50, s": lambda r: r.ttft_s.p50 if r.ttft_s else None,
        "TTFT p99, s": lambda r: r.ttft_s.p99 if r.ttft_s else None,
        "TBT p99, ms": lambda r: 1e3 * r.tbt_s.p99 if r.tbt_s else None,
        "output tokens/s": lambda r: r.output_tokens_per_s,
    }
    names = list(dict.fromkeys(name for name, _ in reports))
    panels = []
    for title, value in values.items():
        axis = _panel(title, "requests per second")
        for number, name in enumerate(names):
            points = sorted((rate, value(report)) for (other, rate), report in reports.items() if other == name)
            drawn = [(rate, y) for rate, y in points if y is not None]
            axis.plot([x for x, _ in drawn], [y for _, y in drawn], label=name, **_style(number, len(names)))
        if title != "output tokens/s":
            _logarithmic(axis, "y")
        _legend(axis)
        panels.append(axis)
    return "\n".join(map(_svg, panels))


def attainment(points: Mapping[str, Sequence[tuple[float, Report]]], slo: Slo) -> str:
    """As SVG elements: for each deployment, the share of first tokens in time over the request rate, and that of later tokens.
    Dashes show the shares that `slo` wants.
    """
    pace, paced = ("tpot", slo.tpot) if slo.tpot else ("tbt", slo.tbt)
    panels = []
    for tokens, name, target in (("first tokens", "ttft", slo.ttft), ("tokens", pace, paced)):
        axis = _panel(f"{tokens} within {name}, %", "requests per second")
        for number, (deployment, pairs) in enumerate(points.items()):
            shares = [100 * _in_time(report, name) for _, report in pairs]
            axis.plot([rate for rate, _ in pairs], shares, label=deployment, **_style(number, len(points)))
        if target is not None:
            axis.axhline(target.percentile, color="black", linestyle="--", linewidth=0.8, label=str(target))
            # At least three times as far below 100 % as the target: a hundredth of a percent must not fill the panel.
            axis.set_ylim(bottom=min(axis.get_ylim()[0], 100 - 3 * (100 - target.percentile)))
        _legend(axis)
        panels.append(axis)
    return "\n".join(map(_svg, panels))


def published(rows: Sequence[tuple[str, float, float]], title: str, file: Path) -> None:
    """Draw a pair of bars for each name: the published value and the simulated one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 + 0.45 * len(rows)), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    for side, label, color in ((-0.2, "published", "tab:gray"), (0.2, "simulated", "tab:blue")):
        bars = axis.barh(places + side, [row[1 if side < 0 else 2] for row in rows], 0.4, label=label, color=color)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    axis.margins(x=0.08)
    axis.set_yticks(places, [name for name, _, _ in rows])
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def lines(
    sides: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    title: str,
    file: Path,
    *,
    log: str = "",
    even: float | None = None,
) -> None:
    """Draw a line for each side through its points. `log`: which axes are logarithmic, such as "xy"; a logarithmic x axis has ticks
    at the points. `even`: the value at which two sides are equal.
    """
    axis = _panel(title, across, width=8.5, height=4)
    for number, (name, points) in enumerate(sides.items()):
        axis.plot(*zip(*points, strict=True), label=name, **_style(number, len(sides)))
    if "x" in log:
        _logarithmic(axis, "x")
        axis.set_xticks(sorted({x for points in sides.values() for x, _ in points}))
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.xaxis.minorticks_off()
    if "y" in log:
        _logarithmic(axis, "y")
    if even is not None:
        axis.axhline(even, color="black", linewidth=0.8, zorder=0)
    axis.set_ylabel(up)
    _legend(axis)
    axis.figure.savefig(file, dpi=150)


def dots(
    sides: Mapping[str, Sequence[tuple[str, float]]],
    across: str,
    title: str,
    file: Path,
    *,
    log: bool = False,
    even: float | None = None,
) -> None:
    """Draw a row for each name, with a dot for each side, one under the other. Names have no order, so no line joins the dots.
    `across`: the name of the values. `log`: whether their axis is logarithmic. `even`: the value at which two sides are equal.
    """
    names = list(dict.fromkeys(name for points in sides.values() for name, _ in points))
    apart = 0.7 / len(sides)
    axis = _panel(title, across, width=8.5, height=1.1 + len(names) * max(0.28, 0.13 * len(sides)))
    for number, (side, points) in enumerate(sides.items()):
        places = [names.index(name) + apart * (number - (len(sides) - 1) / 2) for name, _ in points]
        axis.plot(
            [value for _, value in points], places, label=side, linestyle="none", marker=MARKS[number % len(MARKS)], markersize=5
        )
    for between in range(1, len(names)):
        axis.axhline(between - 0.5, color="0.88", linewidth=0.8, zorder=0)
    if log:
        _logarithmic(axis, "x")
    if even is not None:
        axis.axvline(even, color="black", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    _legend(axis)
    axis.figure.savefig(file, dpi=150)


def _panel(title: str, across: str, *, width: float = 6, height: float = 3.3) -> Any:
    """The axes of a separate picture, with its size in inches: on a narrow page, panels stand under each other."""
    from matplotlib.figure import Figure

    axis = Figure(figsize=(width, height), layout="constrained").subplots()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(across)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def _style(number: int, sides: int) -> dict[str, Any]:
    """How side `number` of so many `sides` is drawn. All show where their points coincide: each has its own mark, open and smaller
    than those under it, and dashes that show the lines under them.
    """
    mark, dashes = MARKS[number % len(MARKS)], DASHES[number % len(DASHES)]
    size = 9 - 5 * number / max(sides - 1, 1)
    return {
        "color": f"C{number % 10}", "linestyle": dashes, "linewidth": 1.3,
        "marker": mark, "markersize": size, "markerfacecolor": "none",
    }  # fmt: skip


def _logarithmic(axis: Any, which: str) -> None:
    """Make an axis logarithmic, with as many plain numbers as have room. Call it after its points are drawn."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    low, high = getattr(axis, f"get_{which}lim")()
    line = getattr(axis, f"{which}axis")
    decades = LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,), numticks=12)
    line.set_major_locator(decades if high / low > 10 else MaxNLocator(5))
    line.set_major_formatter("{x:,g}")
    line.set_minor_formatter(NullFormatter())


def _legend(axis: Any) -> None:
    """Draw the names of the sides beside the axes, where they hide nothing; no legend for a single side."""
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        below = axis.figure.get_figwidth() <= 6
        where: dict[str, Any] = {"loc": "outside lower left", "ncols": 2} if below else {"loc": "outside right upper"}
        axis.figure.legend(handles, names, fontsize=8, frameon=False, **where)


def _in_time(report: Report, target: str) -> float:
    """The share of cases within a target, of several classes with one of the first that has it; 1 if there is no such target."""
    attained = next((met for name, met in report.slo_attainment.items() if name.split()[-1] == target), None)
    return 1.0 if attained is None else attained.in_time or 0.0


def _svg(axis: Any) -> str:
    text = StringIO()
    axis.figure.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _distribution(title: str, values: Mapping[str, Sequence[float]], target: Target | None) -> Any:
    axis = _panel(f"{title}, distribution", "ms")
    percent = np.linspace(0, 100, 501)
    drawn = {name: np.maximum(np.percentile(seconds, percent) * 1e3, 0.01) for name, seconds in values.items() if seconds}
    for number, (name, ms) in enumerate(drawn.items()):
        axis.plot(ms, percent, label=name, color=f"C{number % 10}", linestyle=DASHES[number % len(DASHES)])
    if target:
        axis.axvline(target.seconds * 1e3, color="black", linestyle="--", linewidth=0.8)
        axis.axhline(target.percentile, color="black", linestyle="--", linewidth=0.8, label=str(target))
    if drawn:
        _logarithmic(axis, "x")
    axis.set_ylabel("% of all")
    _legend(axis)
    return axis
