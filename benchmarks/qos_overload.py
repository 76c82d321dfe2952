"""What happens at twice the load that a server can bear? Live: the embedded model, targets for TTFT and TBT, 60 s at each load.

First a climb finds the load at which 90 % of the requests just meet their targets without refusing any (1x). Then 1x and 2x are run
with `--on-late refuse`, the default, and 2x with `--on-late serve`. At 2x every fifth request has a high priority (-1). `good`:
requests per second that met all their targets. `refused in`: the time until a refusal arrived, of 99 in 100. `TTFT, high`: of
requests of high priority; `alone`: of the same prompts one at a time on an idle server; `iteration`: the longest gap that a stream
may see, by its target, which is the longest that an iteration takes.

    python benchmarks/qos_overload.py
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from harness import machine, parser, show
from ladder import SEED, Server
from numpy import percentile

from stallfree.bench.server import server
from stallfree.core.slo import Slo
from stallfree.metrics.report import Report, report
from stallfree.metrics.timeline import Timeline
from stallfree.workload.workload import Arrival, Workload

TARGETS = Slo.parse("ttft=2s,tbt=250ms")
WORKLOAD = Workload.parse("poisson", "median=150,p90=500/median=50,p90=120", 2000)
STEPS = (1.5, 1.15)
"""Ratios between two rates of the climb, first a coarse one, then a fine one."""
HIGH = -1


def arrivals(rate: float, seconds: float) -> list[Arrival]:
    rng = random.Random(SEED)
    return [replace(a, priority=HIGH if rng.random() < 0.2 else 0) for a in WORKLOAD.draw(rate, SEED, duration_s=seconds)]


def judged(lines: Sequence[Timeline], seconds: float) -> tuple[Report, float]:
    """The report of all that were admitted, and good requests per second."""
    admitted = [line for line in lines if line.reason != "HTTP 429"]
    result = report(admitted, TARGETS)
    share = result.goodput.share if result.goodput else 0.0
    return result, share * len(admitted) / seconds


def run(on_late: str, rate: float, seconds: float) -> list[Timeline]:
    with server(["--slo", str(TARGETS), "--on-late", on_late]) as url:
        side = Server(url, WORKLOAD)
        side.warm_up()
        return side.run(arrivals(rate, seconds)).lines


def find_load(seconds: float) -> float:
    """The highest rate of a climb at which 90 % of the requests meet all targets."""
    with server(["--slo", str(TARGETS), "--on-late", "serve"]) as url:
        side = Server(url, WORKLOAD)
        side.warm_up()
        rate, steps = 1.5, list(STEPS)
        while steps:
            lines = side.run(WORKLOAD.draw(rate * steps[0], SEED, duration_s=seconds)).lines
            share = judged(lines, seconds)[1] * seconds / len(lines)
            print(f"  {rate * steps[0]:.2f}/s: {share:.1%} of the requests meet all targets", file=sys.stderr)
            if share < 0.9:
                del steps[0]
            else:
                rate *= steps[0]
        return rate


def alone(prompts: Sequence[Arrival]) -> float:
    """Median TTFT of these requests, each on an idle server."""
    with server(["--slo", str(TARGETS)]) as url:
        side = Server(url, WORKLOAD)
        side.warm_up()
        lines = [line for prompt in prompts for line in side.run([replace(prompt, at=0.0, output_tokens=2)]).lines]
    return median(line.tokens[0] - line.arrival for line in lines)


def main() -> None:
    args = parser(__doc__).parse_args()
    seconds = 10.0 if args.quick else 60.0
    rate = find_load(10.0 if args.quick else 30.0)
    rows: list[dict[str, Any]] = []
    high: list[Timeline] = []
    for load, on_late in ((1, "refuse"), (2, "refuse"), (2, "serve")):
        lines = run(on_late, load * rate, seconds)
        result, good = judged(lines, seconds)
        refused = [line.finished - line.arrival for line in lines if line.reason == "HTTP 429" and line.finished is not None]
        important = [line for line in lines if line.priority == HIGH and line.tokens]
        if load == 2 and on_late == "refuse":
            high = important
        if result.tbt_s is None or result.ttft_s is None:
            raise RuntimeError("the server answered nothing")
        rows.append(
            {"load": f"{load}x, {load * rate:.2f}/s", "on late": on_late, "requests": len(lines), "refused": len(refused)}
            | {"TTFT in time, %": 100 * (result.slo_attainment["ttft"].in_time or 0.0), "TBT p99, ms": 1e3 * result.tbt_s.p99}
            | {"good, /s": good, "good / 1x": good / rows[0]["good, /s"] if rows else 1.0}
            | {"refused in, ms": 1e3 * float(percentile(refused, 99)) if refused else None}
            | {"TTFT p50, high, ms": 1e3 * median(line.tokens[0] - line.arrival for line in important)}
        )
    prompts = [Arrival(0.0, line.prompt_tokens, 2) for line in high][:20]
    idle = alone(prompts)
    reached = median(line.tokens[0] - line.arrival for line in high)
    iteration = TARGETS.tbt.seconds if TARGETS.tbt else 0.0
    facts = machine()
    show(f"The embedded model, {TARGETS}", rows, facts, args.json)
    priority = {
        "alone, ms": 1e3 * idle,
        "at 2x, ms": 1e3 * reached,
        "1.2 x alone + an iteration, ms": 1e3 * (1.2 * idle + iteration),
    }
    show("TTFT of high priority, median", [priority], facts, None)


if __name__ == "__main__":
    main()
