"""Searches the capacity, the highest rate at which a server meets its SLO, by trials that may err. It knows no server and no clock.

Near capacity one trial passes and the next fails, by the luck of its arrivals. So a rate is tried with one seed after another,
until one verdict leads by two. A trial passes as in the paper (Sarathi-Serve, OSDI'24, section 5): the SLO is met, and the queue
does not grow without bound.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import floor

from stallfree.metrics.report import Report, Targets, by_class

LEAD = 2
"""Trials by which one verdict must lead before a rate is decided."""
DOUBLINGS = 20
"""At most so many doublings of the first rate: no server is a million times faster than expected."""
MEDIAN_TTFT_S = 2.0
"""Seconds that the median scheduling delay may be at most, without a target for TTFT or TTLT: the paper's limit. A client cannot
see that delay; then the limit is for the median TTFT. A queue that grows without bound exceeds any limit."""
MOST_FAILED = 0.01
"""Share of requests that may end with an error: a server that refuses half of them can be quick with the others."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The result of the trials at one rate. `sure`: one verdict led by `LEAD`; otherwise the majority decided."""

    rate: float
    passed: int
    failed: int

    @property
    def met(self) -> bool:
        return self.passed > self.failed

    @property
    def sure(self) -> bool:
        return abs(self.passed - self.failed) >= LEAD


@dataclass(frozen=True, slots=True)
class Capacity:
    """The result of a search. `rate`: the highest that met the SLO, 0 if none did. `above`: the lowest that missed it, None if none
    did. `decisions`: in the order in which they were made.
    """

    rate: float
    above: float | None
    decisions: tuple[Decision, ...]


def search(
    trial: Callable[[float, int], bool],
    start: float,
    *,
    lowest: float = 1e-6,
    tolerance: float = 0.05,
    most_trials: int = 5,
    seed: int = 0,
    step: float = 2.0,
) -> Capacity:
    """Find the capacity by `trial(rate, seed)`: doubling or halving from `start`, then bisection to a share of `tolerance`. With a
    `step` below 2 the first step from `start` is by this factor, and each later one by its square, up to 2. This is quicker if
    `start` is close, and `lowest` itself is tried then.

    No rate below `lowest` is tried: the lower the rate, the longer a trial. Each rate gets at most `most_trials` trials, with the
    same seeds as every other. Raises ValueError for invalid options.
    """
    if not 0 < start < float("inf"):
        raise ValueError(f"a search cannot start at {start:g} requests per second; give a rate above 0")
    if not 0.001 <= tolerance < 1:
        raise ValueError(f"a tolerance of {tolerance:g} cannot be reached; give a share from 0.001 to below 1, such as 0.05")
    if most_trials < 1 or most_trials % 2 == 0:
        raise ValueError(f"{most_trials} trials may have no majority; give an odd number")
    if not 1 < step <= 2:
        raise ValueError(f"a step of {step:g} times the rate is invalid; give a factor above 1 and at most 2")
    decisions: list[Decision] = []

    def met(rate: float) -> bool:
        decisions.append(decide(rate, trial, most_trials, seed))
        return decisions[-1].met

    low, high = 0.0, start
    if met(start):
        low = start
        for factor in islice(_factors(step), DOUBLINGS):
            high = low * factor
            if not met(high):
                break
            low = high
        else:
            return Capacity(low, None, tuple(decisions))
    else:
        for factor in _factors(step):
            low = max(high / factor, lowest) if step < 2 else high / factor
            if low < lowest or low == high:
                return Capacity(0.0, high, tuple(decisions))
            if met(low):
                break
            high = low
    while high - low > tolerance * low * (1 + 1e-9):
        middle = (low + high) / 2
        if met(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, high, tuple(decisions))


def _factors(step: float) -> Iterator[float]:
    while True:
        yield step
        step = min(2.0, step * step)


def decide(rate: float, trial: Callable[[float, int], bool], most_trials: int, seed: int) -> Decision:
    """Run trials at `rate` with the seeds from `seed` on, until one verdict leads by `LEAD` or `most_trials` have run."""
    passed = failed = 0
    while passed + failed < most_trials and abs(passed - failed) < LEAD:
        if trial(rate, seed + passed + failed):
            passed += 1
        else:
            failed += 1
    return Decision(rate, passed, failed)


def shortfalls(report: Report, slo: Targets) -> list[str]:
    """The reasons why a trial fails, in words; empty if it passes."""
    reasons = [
        f"{_below(target.in_time or 0)} within {name}={target.target}"
        for name, target in report.slo_attainment.items()
        if not target.met
    ]
    name, delay = ("TTFT", report.ttft_s) if report.scheduling_s is None else ("delay of scheduling", report.scheduling_s)
    waits = all(each.ttft is each.ttlt is None for each in by_class(slo).values())
    if waits and (delay is None or delay.p50 > MEDIAN_TTFT_S):
        reasons.append(f"median {name} {'none' if delay is None else f'{delay.p50:.3g} s'}, of at most {MEDIAN_TTFT_S:g} s")
    failed = sum(report.errors.values())
    if failed > MOST_FAILED * (failed + report.completed):
        reasons.append(f"{failed} of {failed + report.completed} requests failed")
    return reasons


def _below(share: float) -> str:
    """A share that is too small, rounded down to a tenth of a per cent, so that it never reads like the target that it missed."""
    return f"{floor(1000 * share) / 10:.1f}%"
