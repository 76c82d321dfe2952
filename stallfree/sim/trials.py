"""Trials of several testbeds in parallel processes, one per core. A testbed travels once, to every process; a trial is a few words
there and a report back.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Self

from stallfree.core.slo import Slo
from stallfree.metrics.report import Report
from stallfree.sim.deployment import Deployment
from stallfree.sim.testbed import Instance, Testbed
from stallfree.workload.traffic import Traffic

_testbeds: dict[str, Testbed] = {}
"""Those of a process that runs trials."""


class Trials:
    """Processes that run trials of `testbeds`, by their names, until this is left; `done` is called after each."""

    def __init__(self, testbeds: Mapping[str, Testbed], done: Callable[[], None] = lambda: None):
        several = {name: (testbed.deployment, testbed.instance) for name, testbed in testbeds.items()}
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(os.cpu_count(), spawn, _begin, (several,))
        self._done = done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, name: str, traffic: Traffic, rate: float | None, seed: int, slo: Slo) -> Future[Report]:
        """See `Testbed.trial`."""
        future = self._pool.submit(_trial, name, traffic, rate, seed, slo)
        future.add_done_callback(lambda _: self._done())
        return future


def _begin(several: Mapping[str, tuple[Deployment, Instance]]) -> None:
    _testbeds.update({name: Testbed(*one) for name, one in several.items()})


def _trial(name: str, traffic: Traffic, rate: float | None, seed: int, slo: Slo) -> Report:
    return _testbeds[name].trial(traffic, rate, seed, slo)
