"""Fit the coefficients in stallfree/perf/hardware to measured kernels, and report their errors on kernels that were left out.

    python -m benchmarks.fit_roofline FOLDER [--paper FOLDER] [--quick] [--json FILE]

FOLDER holds profiles in the format of `stallfree perf check`. For each device with compute profiles, compute, bandwidth,
kernel_us and wave_us are fitted over all its models, then with one model left out at a time, with the errors on that one. Then
attention's three coefficients are fitted. Nothing is written: copy the printed values into the TOML files by hand. With --paper,
Yi-34B's measured iterations are shown next to the model's.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from stallfree.perf import hardware, shape
from stallfree.perf.hardware import Hardware
from stallfree.perf.profiles import KINDS, LINEAR, Error, Point, by, read
from stallfree.perf.roofline import Roofline

SAMPLE = 400
"""About this many measurements of a device are used in a fit (at most twice as many), spread evenly over all."""

MATMUL = ("compute", "bandwidth", "kernel_s", "wave_s")
ATTENTION = ("attention", "attention_s", "split_s")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("folder", type=Path, help="measured profiles")
    parser.add_argument("--paper", type=Path, metavar="FOLDER", help="where yi34b_figure-2_*.csv are")
    options = parser.parse_args()
    points, _ = read(options.folder)
    rows: list[dict[str, Any]] = []
    for name, linear in by([p for p in points if p.operator in LINEAR], lambda p: p.device.name).items():
        rows.append(fitted(f"{name}, all", linear, linear, MATMUL, options.quick))
        files = by(linear, lambda p: p.file)
        for file, unseen in files.items():
            if len(files) > 1:
                seen = [point for point in linear if point.file != file]
                rows.append(fitted(f"{name}, without {file}", seen, unseen, MATMUL, options.quick))
    for name, measured in by([p for p in points if KINDS[p.operator] == "attention"], lambda p: p.device.name).items():
        rows.append(fitted(f"{name}, attention", measured, measured, ATTENTION, options.quick))
    harness.show("coefficients, and errors on the named file or on all", rows, harness.machine(), options.json)
    if options.paper is not None:
        harness.show("Yi-34B, TP2, A100 PCIe, eager-2024 (ms)", iterations(options.paper), harness.machine(), None)


def fitted(what: str, seen: Sequence[Point], unseen: Sequence[Point], names: Sequence[str], quick: bool) -> dict[str, Any]:
    """The coefficients `names` fitted to `seen`, and the errors on `unseen`: a row of the table."""
    sample = seen[:: max(1, len(seen) // SAMPLE)]
    start = [math.log(getattr(seen[0].device.measured, name)) for name in names]

    def measured(logs: Sequence[float]) -> dict[str, Hardware]:
        values = {name: math.exp(log) for name, log in zip(names, logs, strict=True)}
        return {p.device.name: replace(p.device, measured=replace(p.device.measured, **values)) for p in seen[:1]}

    def loss(logs: Sequence[float]) -> float:
        device = measured(logs)[seen[0].device.name]
        errors = sorted(abs(math.log(p.price(device) / p.seconds)) for p in sample)
        # The mean, in which an outlier counts at most 0.5, plus half the 90th percentile, for the tail.
        return sum(min(error, 0.5) for error in errors) / len(errors) + 0.5 * errors[len(errors) * 9 // 10]

    best = simplex(loss, start, 0.15, 30 if quick else 120)
    device = measured(best)[seen[0].device.name]
    error = Error.of(p._replace(device=device) for p in unseen)
    values = {
        (n.replace("_s", "_us") if n.endswith("_s") else n): math.exp(v) * (1e6 if n.endswith("_s") else 1)
        for n, v in zip(names, best, strict=True)
    }
    return {"fit": what, **values, "points": error.points, "median": error.median, "p90": error.p90}


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
    for kind in ("decode", "prefill"):
        with (folder / f"yi34b_figure-2_{kind}.csv").open() as file:
            for row in csv.DictReader(file):
                tokens, measured = int(row["batch_num_tokens"]), 1000 * float(row["batch_execution_time"])
                cost = 1000 * model.seconds([(1020, 1)] * tokens if kind == "decode" else [(0, tokens)])
                rows.append(
                    {"iteration": f"{kind} {tokens}", "measured": measured, "model": cost, "error": f"{cost / measured - 1:+.1%}"}
                )
    return rows


if __name__ == "__main__":
    main()
