"""An iteration is overdue by its prediction and by its seconds, and is logged once."""

import asyncio
import threading

import pytest

from stallfree import policies
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.policy import Setup
from stallfree.core.request import Request
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.executors.sampling import Sampling
from stallfree.executors.simulated import SimulatedExecutor
from stallfree.perf.fitted import Fitted
from stallfree.server import watchdog
from stallfree.server.watchdog import Watchdog
from tests.waiting import PATIENCE_S, comes

SLOW_S = 2.5
"""Seconds of an iteration by the cost model of these tests."""


class Hanging(SimulatedExecutor):
    """Hangs in `submit` or in `collect` until it is released, while `hangs` is set."""

    def __init__(self, where: str):
        super().__init__(Capacity(16, 100, 512), bytes_as_text().encode("abc", special=False))
        self.sleep = lambda seconds: None
        self._where = where
        self.inside, self.released = threading.Event(), threading.Event()

    def _hang(self, where: str) -> None:
        if where == self._where:
            self.inside.set()
            assert self.released.wait(PATIENCE_S)

    def submit(self, plan) -> None:
        self._hang("submit")
        super().submit(plan)

    def collect(self) -> StepResult:
        self._hang("collect")
        return super().collect()


class Case:
    """An engine whose first iteration hangs in a thread of its own, from time 100 s on its clock `now`."""

    def __init__(self, where: str = "collect", policy: str = "sarathi"):
        self.now = 100.0
        self.executor = Hanging(where)
        cost = Fitted((SLOW_S, 0.0, 0.0, 0.0, 0.0, 0.0))
        self.engine = Engine(self.executor, bytes_as_text(), policies.load(policy, Setup(cost)), clock=lambda: self.now)
        self.watchdog = Watchdog(self.engine)
        self._thread = threading.Thread(target=self.engine.step)

    def __enter__(self):
        self.engine.submit(Request("a", [1, 2, 3], 1, arrival=self.now, sampling=Sampling()))
        self._thread.start()
        assert self.executor.inside.wait(PATIENCE_S)
        return self

    def __exit__(self, *_):
        self.end()
        self.engine.close()

    def end(self) -> None:
        self.executor.released.set()
        self._thread.join(PATIENCE_S)

    def after(self, seconds: float) -> str | None:
        self.now = 100.0 + seconds
        return self.watchdog.look()


@pytest.mark.parametrize("where", ["submit", "collect"])
def test_an_iteration_may_hang_at_either_call_of_the_executor(where):
    with Case(where) as case:
        assert case.after(29.0) is None
        assert "iteration 0 has run for 31 s" == case.after(31.0)


def test_with_a_cost_model_it_may_take_many_times_its_prediction():
    with Case(policy="slo") as case:
        assert case.after(20 * SLOW_S - 1) is None
        assert "iteration 0 has run for 51 s; its prediction is 2.5 s" == case.after(20 * SLOW_S + 1)


def test_it_is_logged_once_and_once_more_when_the_engine_goes_on(caplog):
    with Case() as case:
        for seconds in (31.0, 32.0, 40.0):
            assert case.after(seconds)
        case.end()
        assert case.after(41.0) is None
        assert case.after(90.0) is None
    assert ["iteration 0 has run for 31 s: the executor may hang", "iteration 0 has ended after all"] == caplog.messages


def test_an_engine_without_work_is_never_overdue():
    with Case() as case:
        case.end()
        assert case.after(1e6) is None


def test_nobody_need_ask(caplog, monkeypatch):
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.001)

    async def watch(case: Case) -> None:
        case.watchdog.start()
        case.now += 31.0
        await comes(lambda: caplog.messages)
        case.watchdog.stop()

    with Case() as case:
        asyncio.run(watch(case))
    assert ["iteration 0 has run for 31 s: the executor may hang"] == caplog.messages
