"""Pictures of runs: from records, who got a token when, and who waited for whose prompt; from timelines, latencies and load.

It needs matplotlib (the extra `plot`) and knows nothing of how a run came about.
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


def require() -> None:
    """Raises ValueError, saying how to get it, if matplotlib is not installed: to be known before a run, not after it."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"plots need matplotlib, which is not installed: {extra('plot')}")


def streams(runs: Mapping[str, Sequence[StepRecord]], file: Path, window_s: tuple[float, float], long_prompt: int = 1000) -> None:
    """One panel per run: a row of dots for each stream, a dot for each token, and shading where an iteration computes a prompt of
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
    """A panel for each target: for each side, the share of late tokens over the request rate, and the share that is `allowed`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, sides) in zip(axes, panels.items(), strict=True):
        for name, points in sides.items():
            ours = name.startswith("slo")
            rates, shares = zip(*sorted(points), strict=True)
            drawn = [max(100 * share, 0.01) for share in shares]
            axis.plot(rates, drawn, "o-", label=name, linewidth=2.5 if ours else 1, markersize=3, color="black" if ours else None)
        axis.axhline(100 * allowed, color="tab:red", linestyle="--", linewidth=0.8)
        axis.set(yscale="log", title=title, xlabel="requests per second", ylabel="late tokens, %")
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def latencies(runs: Mapping[str, Sequence[Timeline]], slo: Slo) -> str:
    """Runs side by side as an SVG element: how TTFT and TBT are distributed, with the targets of `slo`; and for each run every TBT
    when it happened, and how many requests were there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2 * (1 + len(runs))), layout="constrained")
    axes = figure.subplots(1 + len(runs), 2, squeeze=False)
    ttfts = {name: [line.ttft for line in lines if line.ttft is not None] for name, lines in runs.items()}
    gaps = {name: [gap for line in lines for gap in line.gaps] for name, lines in runs.items()}
    _distribution(axes[0, 0], "TTFT", ttfts, slo.ttft)
    _distribution(axes[0, 1], "TBT", gaps, slo.tbt)
    for number, (name, lines) in enumerate(runs.items()):
        over_time, load = axes[1 + number]
        times = [t for line in lines for t in line.tokens[1:]]
        over_time.plot(times, [gap * 1e3 for gap in gaps[name]], ".", color=f"C{number}", markersize=1.5, rasterized=True)
        if slo.tbt:
            over_time.axhline(slo.tbt.seconds * 1e3, color="black", linestyle="--", linewidth=0.8)
        if number:
            over_time.sharey(axes[1, 0])
        over_time.set(title=f"{name}: every TBT", ylabel="ms")
        end = max((t for line in lines for t in (line.arrival, line.finished or 0.0)), default=0.0)
        changes = sorted([(line.arrival, 1) for line in lines] + [(line.finished or end, -1) for line in lines])
        load.step([t for t, _ in changes], list(accumulate(change for _, change in changes)), where="post", color=f"C{number}")
        load.plot([line.arrival for line in lines], [0] * len(lines), "|", color="black", markersize=8, alpha=0.5)
        load.set(title=f"{name}: requests there (a bar is an arrival)", ylabel="requests")
        for axis in (over_time, load):
            axis.set_xlim(0, end or None)
            axis.set_xlabel("seconds of the run")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    return _svg(figure)


def loads(reports: Mapping[tuple[str, float], Report]) -> str:
    """Configurations side by side as an SVG element: TTFT, TBT and throughput over the requests per second. `reports` by both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    panels: dict[str, Callable[[Report], float | None]] = {
        "TTFT p50, s": lambda r: r.ttft_s.p50 if r.ttft_s else None,
        "TTFT p99, s": lambda r: r.ttft_s.p99 if r.ttft_s else None,
        "TBT p99, ms": lambda r: 1e3 * r.tbt_s.p99 if r.tbt_s else None,
        "output tokens/s": lambda r: r.output_tokens_per_s,
    }
    for axis, (title, value) in zip(axes.flat, panels.items(), strict=True):
        for name in dict.fromkeys(name for name, _ in reports):
            points = sorted((rate, value(report)) for (other, rate), report in reports.items() if other == name)
            axis.plot(*zip(*((rate, y) for rate, y in points if y is not None), strict=True), "o-", label=name, markersize=3)
        axis.set(title=title, xlabel="requests per second", yscale="linear" if title == "output tokens/s" else "log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8)
    return _svg(figure)


def attainment(points: Mapping[str, Sequence[tuple[float, Report]]], slo: Slo) -> str:
    """As an SVG element: for each deployment, the share of first tokens in time against that of the tokens after them, a dot for
    each of the request rates, which are written beside it. Lines show what shares the `slo` wants: both are met in the corner.
    """
    from matplotlib.figure import Figure

    pace, wanted = ("tpot", slo.tpot) if slo.tpot else ("tbt", slo.tbt)
    paced = [100 * _in_time(report, pace) for told in points.values() for _, report in told]
    # At least as far below 100 % as the target, and three times that: a hundredth of a percent is not to fill the page.
    low = min(*paced, 100 - 3 * (100 - wanted.percentile) if wanted else 99.0)
    high = 100 + (100 - low) / 20
    written: list[tuple[float, float]] = []
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for name, told in points.items():
        shares = [(100 * _in_time(report, "ttft"), 100 * _in_time(report, pace)) for _, report in told]
        (line,) = axis.plot(*zip(*shares, strict=True), "o-", label=name, markersize=4)
        for (rate, _), (x, y) in zip(told, shares, strict=True):
            # Rates whose dots are in one place are written under each other.
            over = sum(abs(x - a) < 3 and abs(y - b) < (high - low) / 20 for a, b in written)
            written.append((x, y))
            away = (-5, -9 - 9 * over)
            axis.annotate(
                f"{rate:.3g}/s", (x, y), ha="right", fontsize=7, color=line.get_color(), xytext=away, textcoords="offset points"
            )
    for target, draw in ((slo.ttft, axis.axvline), (wanted, axis.axhline)):
        if target is not None:
            draw(target.percentile, color="black", linestyle="--", linewidth=0.8, label=str(target))
    axis.set(xlabel="first tokens in time, %", ylabel=f"tokens within {pace}, %", ylim=(low, high))
    axis.legend(fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def published(rows: Sequence[tuple[str, float, float]], title: str, file: Path) -> None:
    """Bars in pairs: what was published and what was simulated, by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 + 0.45 * len(rows)), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    axis.barh(places - 0.2, [value for _, value, _ in rows], 0.4, label="published", color="tab:gray")
    axis.barh(places + 0.2, [value for _, _, value in rows], 0.4, label="simulated", color="tab:blue")
    axis.set_yticks(places, [name for name, _, _ in rows])
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def lines(
    sides: Mapping[str, Sequence[tuple[float | str, float]]], across: str, up: str, title: str, file: Path, log: str = ""
) -> None:
    """A line for each side, through its points: over numbers, or over names. `log`: which axes are logarithmic, as "xy"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in sides.items():
        axis.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
    if any(isinstance(x, str) for points in sides.values() for x, _ in points):
        axis.tick_params(axis="x", labelrotation=35, labelsize=8)
    if "x" in log:
        axis.set_xscale("log", base=2)
    if "y" in log:
        axis.set_yscale("log")
    axis.set(xlabel=across, ylabel=up)
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def _in_time(report: Report, target: str) -> float:
    """The share within a target; all of them, if there is no such target."""
    return report.slo_attainment[target].in_time or 0.0 if target in report.slo_attainment else 1.0


def _svg(figure: Any) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _distribution(axis: Any, title: str, values: Mapping[str, Sequence[float]], target: Target | None) -> None:
    percent = np.linspace(0, 100, 501)
    for name, seconds in values.items():
        if seconds:
            axis.plot(np.maximum(np.percentile(seconds, percent) * 1e3, 0.01), percent, label=name)
            axis.set_xscale("log")
    if target:
        axis.axvline(target.seconds * 1e3, color="black", linestyle="--", linewidth=0.8)
        axis.axhline(target.percentile, color="black", linestyle="--", linewidth=0.8, label=str(target))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="lower right")
    axis.set(title=f"{title}, distribution", xlabel="ms", ylabel="% of all")
