"""Engines that take turns on one model, to compare policies on one machine at the same time: a slow moment affects them all.

Each engine has its own share of the KV blocks, and a clock that runs only during its turns. This module does not know what arrives
or what the policies do.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from stallfree.core.plan import Plan, StepResult
from stallfree.core.policy import Policy
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text
from stallfree.executors.base import Executor


class Share:
    """Share `number` (from 0) of the `of` equal shares of an executor's KV blocks. It takes one plan at a time. Closing it leaves
    the executor open."""

    def __init__(self, executor: Executor, number: int, of: int):
        self._executor = executor
        self.capacity = replace(executor.capacity, num_blocks=executor.capacity.num_blocks // of, depth=1, overlap=False)
        self._first = number * self.capacity.num_blocks

    def submit(self, plan: Plan) -> None:
        moved = (w._replace(blocks=tuple(self._first + block for block in w.blocks)) for w in plan.work)
        self._executor.submit(replace(plan, work=tuple(moved)))

    def collect(self) -> StepResult:
        return self._executor.collect()

    def close(self) -> None:
        pass


class Clock:
    """Counts the seconds of its own turns, by `clock`. It stands still until `go`."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._lag = 0.0
        self._stood_at: float | None = 0.0

    def __call__(self) -> float:
        return self._clock() - self._lag if self._stood_at is None else self._stood_at

    def go(self) -> None:
        self._lag, self._stood_at = self._clock() - self(), None

    def stand(self) -> None:
        self._stood_at = self()

    def jump(self, to: float) -> None:
        """Go to a later time, as if the engine had waited for it."""
        self._lag -= max(0.0, to - self())


class Player:
    """An engine with `policy` on a share of an executor. `requests` come to it in order of arrival (seconds from its start).
    `records`: its iterations so far.
    """

    def __init__(
        self,
        executor: Executor,
        text: Text,
        policy: Policy,
        requests: Iterable[Request],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.clock = Clock(clock)
        self.records: list[StepRecord] = []
        self._requests = deque(requests)
        self._engine = Engine(executor, text, policy, reuse=False, record=self.records.append, clock=self.clock)

    @property
    def done(self) -> bool:
        return not (self._requests or self._engine.busy)

    def turn(self) -> None:
        """Run one iteration. If there is nothing to run, jump to the next arrival first. Raises Refused if a request cannot fit."""
        self.clock.go()
        if not self._engine.busy and self._requests:
            self.clock.jump(self._requests[0].arrival)
        while self._requests and self._requests[0].arrival <= self.clock():
            self._engine.submit(self._requests.popleft())
        self._engine.step()
        self.clock.stand()
