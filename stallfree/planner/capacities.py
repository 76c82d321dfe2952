"""The capacities of several simulators under one load, searched in parallel processes. It does not know what they simulate, nor how
processes start.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

from stallfree.metrics.capacity import Capacity
from stallfree.metrics.report import Report, Targets
from stallfree.sim.trials import Trial, Trials, Tried
from stallfree.workload.traffic import Traffic

Open = Callable[[Mapping[str, Tried]], AbstractContextManager[Trials]]
"""Opens processes for trials of the named simulators."""

LOWEST = 1e-3
"""Requests per second below which a capacity counts as none."""
SECONDS = 30.0
"""Minimum seconds of arrivals in a trial."""


class Found(NamedTuple):
    """The result of one capacity search; see `Ranked`."""

    rate: float
    at: Report | None
    above: Report | None
    why: tuple[str, ...]


def capacities(
    cases: Mapping[str, tuple[Tried, Targets, float, int]],
    traffic: Traffic,
    run: Open,
    tolerance: float,
    step: float,
    least: float = 0.0,
) -> dict[str, Found]:
    """The capacity of each case: a simulator, its targets, the first rate, and the seed of the load. It is 0 if the SLO is missed
    at the share `least` of the first rate.
    """
    trials: dict[str, list[Trial]] = {key: [] for key in cases}
    with run({key: simulator for key, (simulator, *_) in cases.items()}) as pool:
        highest: dict[str, Capacity] = pool.capacities(
            {key: (replace(traffic, seed=seed), slo, max(start, LOWEST)) for key, (_, slo, start, seed) in cases.items()},
            lambda key, trial: trials[key].append(trial),
            lowest=LOWEST,
            least=least,
            tolerance=tolerance,
            step=step,
            shortest_s=SECONDS,
        )
    results = {}
    for key, capacity in highest.items():
        reports = {rate: (report, tuple(why)) for rate, _, report, why in trials[key]}
        above, why = reports[capacity.above] if capacity.above is not None else (None, ())
        results[key] = Found(capacity.rate, reports[capacity.rate][0] if capacity.rate else None, above, why)
    return results
