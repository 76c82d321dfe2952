"""Shared by the capacity benchmarks: a climb from low request rates to saturation, and the rate at which a target is missed.

One run at a rate shows for every TBT target whether it is met, so the same runs judge several targets. A run passes if the target's
percentile of all gaps is within the target, the median TTFT is at most 2 s (the paper's criterion, Sarathi-Serve, OSDI'24, section
5), and at most 1 % of the requests fail.
"""

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stallfree.bench.client import Client
from stallfree.bench.dialect import Dialect
from stallfree.bench.load import Load, load
from stallfree.core.slo import Slo, Target
from stallfree.metrics.capacity import MEDIAN_TTFT_S, MOST_FAILED
from stallfree.metrics.report import report
from stallfree.metrics.timeline import Timeline
from stallfree.workload.workload import Arrival, Workload

WORKLOAD = Workload.parse("poisson", "median=150,p90=500/median=50,p90=120 + 5%:2000/50", 4000)
"""Chats, of which 5 % have long prompts; the same for every server."""
SEED = 11
STEP = 1.25
"""Ratio between two consecutive rates of a climb."""
FEWEST = 20
"""The least requests of a run, on average. At a low rate the run is longer."""


@dataclass(frozen=True)
class Rung:
    """A run at `rate` requests per second. `late`: the target's seconds -> the share of gaps above. Latencies are in seconds."""

    rate: float
    late: dict[float, float]
    ttft_p50: float
    ttft_p90: float
    tbt_p50: float
    tbt_p99: float
    tbt_max: float
    failed: float
    output_tokens_per_s: float

    def stress(self, target: Target) -> float:
        """Above 1 if the run fails `target`, by its worst criterion."""
        return max(self.late[target.seconds] / target.late_share, self.ttft_p50 / MEDIAN_TTFT_S, self.failed / MOST_FAILED)


class Server:
    """A server under load, at `url`. Its requests have only the fields that it accepts. `model`: None for the first that it
    lists."""

    def __init__(self, url: str, workload: Workload = WORKLOAD, model: str | None = None):
        self.workload, self._model = workload, model
        self.client = Client(url, timeout_s=300)
        self.dialect = asyncio.run(self._probe())

    async def _probe(self) -> Dialect:
        async with self.client:
            return await Dialect.probe(self.client, self._model)

    def run(self, arrivals: Sequence[Arrival]) -> Load:
        """Raises RuntimeError if the client could not keep its schedule, because then nothing is measured."""

        async def go() -> Load:
            async with self.client:
                return await load(self.client, self.dialect, arrivals, lambda _: None)

        done = asyncio.run(go())
        if done.behind:
            raise RuntimeError(done.behind)
        return done

    def warm_up(self) -> None:
        """Send a few requests first: a server's first requests are slower and must not be measured."""
        self.run(self.workload.draw(1.0, SEED + 1, requests=6))

    def rung(self, rate: float, seconds: float, targets: Sequence[Target]) -> Rung:
        return rung(self.run(self.workload.draw(rate, SEED, duration_s=max(seconds, FEWEST / rate))).lines, rate, targets)


def rung(lines: Sequence[Timeline], rate: float, targets: Sequence[Target]) -> Rung:
    whole = report(lines)
    late = {}
    for target in targets:
        attained = report(lines, Slo(tbt=target)).slo_attainment["tbt"].in_time
        late[target.seconds] = 1 - (attained if attained is not None else 0.0)
    failed = sum(whole.errors.values())
    ttft, tbt = whole.ttft_s, whole.tbt_s
    return Rung(
        rate,
        late,
        math.inf if ttft is None else ttft.p50,
        math.inf if ttft is None else ttft.p90,
        *((math.inf,) * 3 if tbt is None else (tbt.p50, tbt.p99, tbt.max)),
        failed / (failed + whole.completed),
        whole.output_tokens_per_s,
    )


def climb(server: Server, first: float, seconds: float, targets: Sequence[Target], least: float | None = None) -> list[Rung]:
    """Runs at rates that rise by `STEP` from `first`, until requests queue or every target is missed twice in a row. If a target is
    missed at `first` and `least` is given, lower rates are run too, down to about `least`.

    A run with only a few late tokens too many for some target is repeated, and the better run counts: a shared host is disturbed
    for seconds now and then, and that says nothing about the server.
    """

    def run(rate: float) -> Rung:
        now = server.rung(rate, seconds, targets)
        if now.ttft_p50 < MEDIAN_TTFT_S and any(1 < now.stress(target) < 6 for target in targets):
            now = min(now, server.rung(rate, seconds, targets), key=lambda r: sum(r.late.values()))
        shares = ", ".join(f"{seconds * 1e3:.0f} ms {share:.2%}" for seconds, share in now.late.items())
        print(f"  {rate:.2f}/s: late {shares}; TTFT p50 {now.ttft_p50:.2f} s", file=sys.stderr)
        return now

    rungs = [run(first)]
    while least is not None and rungs[0].rate > least and any(rungs[0].stress(target) > 1 for target in targets):
        rungs.insert(0, run(rungs[0].rate / STEP**2))
    while not all(_over(rungs, target) for target in targets):
        rungs.append(run(rungs[-1].rate * STEP))
    return rungs


def _over(rungs: Sequence[Rung], target: Target) -> bool:
    saturated = rungs[-1].ttft_p50 > 1.5 * MEDIAN_TTFT_S
    return saturated or (len(rungs) > 1 and all(r.stress(target) > 1 for r in rungs[-2:]))


def capacity(rungs: Sequence[Rung], target: Target) -> float:
    """Requests per second at which the stress reaches 1, between the last rung that passes and the next; 0 if none passes."""
    for before, after in reversed(list(pairwise(rungs))):
        a, b = max(before.stress(target), 0.05), after.stress(target)
        if a <= 1 < b:
            return before.rate * (after.rate / before.rate) ** (math.log(1 / a) / math.log(min(b, 20) / a))
    return 0.0
