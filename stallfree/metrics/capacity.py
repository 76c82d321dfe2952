"""Capacity: the highest rate at which a server meets its SLO, found by trials that may err. It knows no server and no clock.

At a rate near capacity one trial passes and the next fails, by the luck of its arrivals. So a rate is tried with one seed after
another until one verdict leads by two, and only then decided. A trial passes as in the paper (Sarathi-Serve, OSDI'24, section 5):
the SLO is met, and requests do not wait ever longer for their turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stallfree.core.slo import Slo
from stallfree.metrics.report import Report

LEAD = 2
"""How many trials more must say the same before a rate is decided."""
DOUBLINGS = 20
"""How often the first rate is doubled before the search ends: no server is that much faster than anybody expects."""
MEDIAN_TTFT_S = 2.0
"""Without a target for TTFT: what the median delay of scheduling may be at most, the paper's limit; or, where only a client looked
and cannot tell it, the median TTFT. In a queue that grows without bound it is beyond any limit."""
MOST_FAILED = 0.01
"""Share of the requests that may end in an error. Whoever refuses half of them can be quick with the others."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the trials at one rate came to. `sure`: one verdict led by `LEAD`; if not, the majority was taken."""

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
    """`rate`: the highest found to meet the SLO, 0 if none did; `above`: the lowest found to miss it, None if none did.
    `decisions` in the order in which they were made.
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
) -> Capacity:
    """The capacity by `trial(rate, seed)`, to a share of `tolerance`: doubling or halving from `start`, then bisection.

    No rate below `lowest` is tried: the lower it is, the longer a trial takes. A rate gets `most_trials` trials at the most, with
    the same seeds as every other. Raises ValueError for options that cannot be.
    """
    if not 0 < start < float("inf"):
        raise ValueError(f"a search cannot start at {start:g} requests per second; give a rate above 0")
    if not 0.001 <= tolerance < 1:
        raise ValueError(f"a tolerance of {tolerance:g} cannot be reached; give a share from 0.001 to below 1, as 0.05")
    if most_trials < 1 or most_trials % 2 == 0:
        raise ValueError(f"of {most_trials} trials there may be no majority; give an odd number")
    decisions: list[Decision] = []

    def met(rate: float) -> bool:
        decisions.append(decide(rate, trial, most_trials, seed))
        return decisions[-1].met

    low, high = 0.0, start
    if met(start):
        low = start
        for _ in range(DOUBLINGS):
            high = low * 2
            if not met(high):
                break
            low = high
        else:
            return Capacity(low, None, tuple(decisions))
    else:
        low = high / 2
        while low >= lowest and not met(low):
            low, high = low / 2, low
        if low < lowest:
            return Capacity(0.0, high, tuple(decisions))
    while high - low > tolerance * low:
        middle = (low + high) / 2
        if met(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, high, tuple(decisions))


def decide(rate: float, trial: Callable[[float, int], bool], most_trials: int, seed: int) -> Decision:
    """Trials at `rate` with the seeds from `seed` on, until one verdict leads by `LEAD` or `most_trials` were made."""
    passed = failed = 0
    while passed + failed < most_trials and abs(passed - failed) < LEAD:
        if trial(rate, seed + passed + failed):
            passed += 1
        else:
            failed += 1
    return Decision(rate, passed, failed)


def shortfalls(report: Report, slo: Slo) -> list[str]:
    """Why a trial fails, in words; nothing if it passes."""
    found = [
        f"{target.in_time or 0:.2%} within {name}={target.target}"
        for name, target in report.slo_attainment.items()
        if not target.met
    ]
    name, delay = ("TTFT", report.ttft_s) if report.scheduling_s is None else ("delay of scheduling", report.scheduling_s)
    if slo.ttft is None and (delay is None or delay.p50 > MEDIAN_TTFT_S):
        found.append(f"median {name} {'none' if delay is None else f'{delay.p50:.3g} s'}, of {MEDIAN_TTFT_S:g} s at the most")
    failed = sum(report.errors.values())
    if failed > MOST_FAILED * (failed + report.completed):
        found.append(f"{failed} of {failed + report.completed} requests failed")
    return found
