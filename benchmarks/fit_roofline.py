"""Fit the coefficients in stallfree/perf/hardware to measured kernels, and report their errors on kernels that were left out.

    python -m benchmarks.fit_roofline FOLDER [FOLDER ...] [--paper FOLDER] [--only TEXT] [--quick] [--json FILE]

FOLDER holds profiles in the formats of `stallfree perf check`. For each device with compute profiles of 2024, the products'
coefficients are fitted over all its models, then with one model left out at a time, with the errors on that one; then attention's.
Of kernels of 2026, every second one is fitted, and the errors are those on the others: products by dtype, attention by precision of
the KV, all-reduce. Nothing is written: copy the printed values into the TOML files by hand. With --paper, Yi-34B's measured
iterations are shown next to the model's.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from stallfree.perf import aiconfigurator, hardware, shape, vidur
from stallfree.perf.hardware import Attending, Hardware, Product, Switched
from stallfree.perf.point import Error, Point, by
from stallfree.perf.profiles import KINDS, read
from stallfree.perf.roofline import Roofline

SAMPLE = 400
"""About this many measurements of each group are used in a fit (at most twice as many), spread evenly over all."""


@dataclass(frozen=True)
class Fit:
    """What is fitted: a part of a device, found by `part` and put back by `replaced`; its coefficients that are 0 stay 0. `seen`
    are the groups of measurements that count the same; `unseen` those that are reported."""

    what: str
    part: Callable[[Hardware], Product | Attending | Switched]
    replaced: Callable[[Hardware, Any], Hardware]
    seen: Sequence[Sequence[Point]]
    unseen: Mapping[str, Sequence[Point]]

    def rows(self, rounds: int) -> Iterator[dict[str, Any]]:
        """The coefficients, and the errors on each group that was not seen."""
        device = next(group[0].device for group in self.seen)
        part = self.part(device)
        names = [f.name for f in fields(part) if getattr(part, f.name)]
        samples = [group[:: max(1, len(group) // SAMPLE)] for group in self.seen]

        def with_(logs: Sequence[float]) -> Hardware:
            return self.replaced(device, replace(part, **{n: math.exp(v) for n, v in zip(names, logs, strict=True)}))

        def loss(logs: Sequence[float]) -> float:
            fitted = with_(logs)
            return sum(_loss(sample, fitted) for sample in samples)

        best = simplex(loss, [math.log(getattr(part, name)) for name in names], 0.15, rounds)
        fitted = with_(best)
        values = {n: math.exp(v) for n, v in zip(names, best, strict=True)}
        shown = {n.replace("_s", "_us") if n.endswith("_s") else n: v * 1e6 if n.endswith("_s") else v for n, v in values.items()}
        text = ", ".join(f"{name} {value:.3g}" for name, value in shown.items())
        for group, points in self.unseen.items():
            error = Error.of(point._replace(device=fitted) for point in points)
            errors = {"points": error.points, "median": error.median, "p90": error.p90}
            yield {"fit": self.what, "held against": group, **errors, "coefficients": text}
            text = ""


def _loss(sample: Sequence[Point], device: Hardware) -> float:
    """The mean, in which an outlier counts at most 0.5, plus half the 90th percentile, for the tail."""
    errors = sorted(abs(math.log(p.price(device) / p.seconds)) for p in sample)
    return sum(min(error, 0.5) for error in errors) / len(errors) + 0.5 * errors[len(errors) * 9 // 10]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="measured profiles")
    parser.add_argument("--paper", type=Path, metavar="FOLDER", help="where yi34b_figure-2_*.csv are")
    parser.add_argument("--only", default="", metavar="TEXT", help="only fits with this in their name")
    options = parser.parse_args()
    points = [point for folder in options.folders for point in read(folder)[0]]
    fits = [fit for _, own in by(points, lambda p: p.device.name).items() for fit in (*fits_2024(own), *fits_2026(own))]
    rounds = 40 if options.quick else 160
    rows = [row for fit in fits if options.only in fit.what for row in fit.rows(rounds)]
    if not rows:
        parser.error(f"nothing is fitted: no fit has {options.only!r} in its name; they are {', '.join(fit.what for fit in fits)}")
    harness.show("errors on measurements that were not fitted, and coefficients", rows, harness.machine(), options.json)
    if options.paper is not None:
        harness.show("Yi-34B, TP2, A100 PCIe, eager-2024 (ms)", iterations(options.paper), harness.machine(), None)


def fits_2024(points: Sequence[Point]) -> Iterator[Fit]:
    """Of one device: products of all models, then without one at a time; attention, which has too few points to leave some out."""
    linear = [p for p in points if p.operator in vidur.LINEAR]
    files = by(linear, lambda p: p.file)
    if linear:
        name = f"{linear[0].device.name}, {vidur.YEAR}, products"
        yield Fit(f"{name}, all", *_product(vidur.YEAR, "fp16"), [linear], {"all": linear})
        for file, unseen in files.items() if len(files) > 1 else ():
            yield Fit(f"{name}, others", *_product(vidur.YEAR, "fp16"), [[p for p in linear if p.file != file]], {file: unseen})
    attention = [p for p in points if KINDS[p.operator] == "attention"]
    if attention:
        yield Fit(
            f"{attention[0].device.name}, {vidur.YEAR}, attention", *_attention(vidur.YEAR, "fp16"), [attention], {"all": attention}
        )


def fits_2026(points: Sequence[Point]) -> Iterator[Fit]:
    """Of one device: products of each dtype with weights in memory, attention of each precision of the KV, all-reduce."""
    groups = {name: group for name, group in by(points, lambda p: p.operator).items() if name not in vidur.KINDS}
    where = f"{points[0].device.name}, {aiconfigurator.YEAR}"

    def fit(what: str, part: Any, names: Sequence[str]) -> Iterator[Fit]:
        if names:
            seen, unseen = [groups[name][::2] for name in names], {name: groups[name][1::2] for name in names}
            yield Fit(f"{where}, {what}", *part, seen, unseen)

    for dtype, precision in aiconfigurator.DTYPES.items():
        yield from fit(
            f"products, {dtype}", _product(aiconfigurator.YEAR, precision), [n for n in groups if n == f"{dtype}, from 60 MB"]
        )
    for precision in ("fp16", "fp8"):
        attention = [n for n in groups if f", {precision} KV" in n and "below 2,048" not in n]
        yield from fit(f"attention, {precision} KV", _attention(aiconfigurator.YEAR, precision), attention)
    yield from fit("all-reduce", _reduce(), [n for n in groups if n.startswith("all-reduce")])


def _product(year: str, name: str) -> tuple[Any, Any]:
    def put(device: Hardware, value: Product) -> Hardware:
        measured = device.measured[year]
        return _with(device, year, replace(measured, products={**measured.products, name: value}))

    return (lambda device: device.measured[year].products[name]), put


def _attention(year: str, name: str) -> tuple[Any, Any]:
    def put(device: Hardware, value: Attending) -> Hardware:
        measured = device.measured[year]
        return _with(device, year, replace(measured, attention={**measured.attention, name: value}))

    return (lambda device: device.measured[year].attention[name]), put


def _reduce() -> tuple[Any, Any]:
    def put(device: Hardware, value: Switched) -> Hardware:
        link = device.link(device.node, device.node)
        names = {name: replace(other, graph=value) if other == link else other for name, other in device.links.items()}
        return replace(device, links=names)

    return (lambda device: device.link(device.node, device.node).graph), put


def _with(device: Hardware, year: str, measured: hardware.Measured) -> Hardware:
    return replace(device, measured={**device.measured, year: measured})


def simplex(loss: Callable[[Sequence[float]], float], start: Sequence[float], step: float, rounds: int) -> list[float]:
    """The minimum near `start`, by Nelder and Mead's method (The Computer Journal 7, 1965)."""
    corners = [list(start), *([x + step * (i == j) for j, x in enumerate(start)] for i in range(len(start)))]
    ranked = sorted((loss(corner), corner) for corner in corners)
    for _ in range(rounds):
        centre = [sum(values) / len(start) for values in zip(*(corner for _, corner in ranked[:-1]), strict=True)]
        worst = ranked[-1][1]

        def away(by: float, centre: list[float] = centre, worst: list[float] = worst) -> tuple[float, list[float]]:
            corner = [c + by * (c - w) for c, w in zip(centre, worst, strict=True)]
            return loss(corner), corner

        new = away(1.0)
        if new[0] < ranked[0][0]:
            new = min(new, away(2.0))
        elif new[0] >= ranked[-2][0]:
            new = min(new, away(-0.5))
        if new[0] < ranked[-1][0]:
            ranked[-1] = new
        else:
            best = ranked[0][1]
            moved = [[(b + x) / 2 for b, x in zip(best, corner, strict=True)] for _, corner in ranked[1:]]
            ranked = [ranked[0], *((loss(corner), corner) for corner in moved)]
        ranked.sort()
    return ranked[0][1]


def iterations(folder: Path) -> list[dict[str, Any]]:
    """The iterations of Sarathi-Serve's figure 2 next to the model's; each decode has 1,020 tokens before it."""
    model = Roofline(hardware.load("a100-80g-pcie"), shape.Sharded(shape.load("yi-34b"), tp=2), "eager-2024")
    rows = []
    for phase in ("decode", "prefill"):
        with (folder / f"yi34b_figure-2_{phase}.csv").open() as file:
            for row in csv.DictReader(file):
                tokens, measured = int(row["batch_num_tokens"]), 1000 * float(row["batch_execution_time"])
                cost = 1000 * model.seconds([(1020, 1)] * tokens if phase == "decode" else [(0, tokens)])
                rows.append(
                    {"iteration": f"{phase} {tokens}", "measured": measured, "model": cost, "error": f"{cost / measured - 1:+.1%}"}
                )
    return rows


if __name__ == "__main__":
    main()
