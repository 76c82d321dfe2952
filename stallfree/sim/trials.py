"""Trials of several simulators in parallel processes, one per core, and the search for capacities. A trial sends a simulator, some
kilobytes that a process keeps, and a few values, and gets a report back. It does not know how a trial is run.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from stallfree.metrics.capacity import Capacity, search, shortfalls
from stallfree.metrics.report import Report, Targets
from stallfree.processes import Helpers
from stallfree.workload.traffic import SHORTEST_S, Traffic

Trial = tuple[float, int, Report, list[str]]
"""The rate, the seed, the report, and why it misses the SLO (empty: it meets the SLO)."""
Key = TypeVar("Key")
Result = TypeVar("Result")
TICK_S = 0.2
"""Seconds after which a waiting thread checks again, because a signal that comes just before it waits does not wake it."""


class Tried(Protocol):
    """A simulator that can run trials. It is sent to other processes."""

    def trial(self, traffic: Traffic, rate: float | None, seed: int, slo: Targets) -> Report:
        """Serve `traffic` at `rate`, drawn with `seed`. Returns the report against `slo`."""


KEPT = 64
"""Simulators that a process keeps."""


class Trials:
    """Processes that run trials of `simulators`, by their names, until the `with` is left. `done` is called after each trial. An
    exception, such as Ctrl-C, ends the trials that run.
    """

    def __init__(self, simulators: Mapping[str, Tried], done: Callable[[], None] = lambda: None):
        self._others = multiprocessing.active_children()
        self._pool = Helpers(os.cpu_count())
        self._pickled: dict[str, bytes] = {}
        self.know(simulators)
        self._done = done
        self._submitting = threading.Lock()
        self._stopped = self._interrupted = self._held = False
        self._handler: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._stop()
        self._pool.shutdown(cancel_futures=True)
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, *_: object) -> None:
        """Raise KeyboardInterrupt once, and not while processes are being started, because their shared resources would leak."""
        if not self._interrupted:
            self._interrupted = True
            if not self._held:
                raise KeyboardInterrupt

    def _stop(self) -> None:
        """End the processes, so that no thread waits for a trial any more."""
        with self._submitting:
            self._stopped = True
        for process in multiprocessing.active_children():
            if process not in self._others:
                process.terminate()

    def know(self, simulators: Mapping[str, Tried]) -> None:
        """More simulators for trials. They take the places of others with the same names."""
        self._pickled |= {name: pickle.dumps(simulator) for name, simulator in simulators.items()}

    def reports(self, cases: Mapping[Key, tuple[str, Traffic, float | None, int, Targets]]) -> dict[Key, Report]:
        """Run a trial for each case: a simulator's name, and the arguments of `Tried.trial`."""
        return _results({key: self._submit(*case) for key, case in cases.items()})

    def _submit(self, name: str, traffic: Traffic, rate: float | None, seed: int, slo: Targets) -> Future[Report]:
        main = threading.current_thread() is threading.main_thread()
        with self._submitting:
            if self._stopped:
                raise RuntimeError("the trials have been stopped; start new ones in a new `Trials`")
            self._held |= main
            try:
                future = self._pool.submit(_trial, self._pickled[name], traffic, rate, seed, slo)
            finally:
                self._held &= not main
        if main and self._interrupted:
            raise KeyboardInterrupt
        future.add_done_callback(lambda _: self._done())
        return future

    def capacities(
        self,
        cases: Mapping[str, tuple[Traffic, Targets, float]],
        tell: Callable[[str, Trial], None] = lambda name, trial: None,
        *,
        lowest: float = 1e-6,
        least: float = 0.0,
        tolerance: float = 0.05,
        most_trials: int = 1,
        step: float = 2.0,
        shortest_s: float = SHORTEST_S,
    ) -> dict[str, Capacity]:
        """The capacity of each case, searched in parallel. `cases`: by a simulator's name, its traffic, its targets and the rate to
        try first. The first seed is the traffic's own. No rate below the share `least` of a case's first rate is tried. Drawn
        arrivals last at least `shortest_s`, even if fewer were wanted. `tell` is called with each trial. For the other arguments
        and the errors see `metrics.capacity.search`.
        """

        def find(name: str) -> Capacity:
            traffic, slo, start = cases[name]

            def passes(rate: float, seed: int) -> bool:
                report = self._submit(name, traffic.lasting(shortest_s, rate), rate, seed, slo).result()
                why = shortfalls(report, slo)
                tell(name, (rate, seed, report, why))
                return not why

            bounds = {"lowest": max(lowest, least * start), "tolerance": tolerance, "step": step}
            return search(passes, start, most_trials=most_trials, seed=traffic.seed, **bounds)

        with ThreadPoolExecutor(len(cases)) as threads:
            try:
                return _results({name: threads.submit(find, name) for name in cases})
            except BaseException:
                self._stop()
                raise


def _results(futures: Mapping[Key, Future[Result]]) -> dict[Key, Result]:
    for future in futures.values():
        while not future.done():
            wait([future], TICK_S)
        future.result()
    return {key: future.result() for key, future in futures.items()}


@lru_cache(KEPT)
def _simulator(pickled: bytes) -> Tried:
    simulator: Tried = pickle.loads(pickled)  # noqa: S301  # from the parent process
    return simulator


def _trial(pickled: bytes, traffic: Traffic, rate: float | None, seed: int, slo: Targets) -> Report:
    return _simulator(pickled).trial(traffic, rate, seed, slo)
