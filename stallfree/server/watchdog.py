"""Notices an iteration that takes far too long: a hung device, a lost network, a deadlock. It reads the engine and changes nothing.

It runs in the event loop, so it works while the engine's thread hangs in the executor. It does not know why an iteration hangs.
"""

import asyncio
import logging

from stallfree.core.policy import Priced
from stallfree.engine.engine import Engine

log = logging.getLogger(__name__)

LEAST_S = 30.0
"""Seconds that every iteration may take, however short its prediction: first iterations compile, and machines are busy."""
FACTOR = 20.0
"""How many times its prediction an iteration may take. Predictions err by 69 % at most (docs/fidelity.md), so this is a fault."""
PERIOD_S = 1.0
"""Seconds between two looks, if nobody asks."""


class Watchdog:
    """Watches the iterations of `engine`. One is overdue after `LEAST_S` seconds and `FACTOR` times the prediction of the policy's
    cost model. A policy without a cost model has the seconds alone.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._overdue: int | None = None
        self._watching: asyncio.Task[None] | None = None

    def look(self) -> str | None:
        """What is overdue now, in words for an operator; None if all is well. It logs an iteration the first time it is overdue,
        and once more when the engine goes on.
        """
        running = self._engine.running_plan
        fault, step = None, None
        if running is not None:
            plan, began = running
            seconds = self._engine.clock() - began
            if seconds > LEAST_S:  # only then, because a prediction costs time
                policy = self._engine.scheduler.policy
                expected = policy.cost.seconds(plan.shape) if isinstance(policy, Priced) else None
                if expected is None or seconds > FACTOR * expected:
                    prediction = "" if expected is None else f"; its prediction is {expected:.3g} s"
                    fault, step = f"iteration {plan.step} has run for {seconds:.0f} s{prediction}", plan.step
        if step is not None and step != self._overdue:
            log.error("%s: the executor may hang", fault)
        if step is None and self._overdue is not None:
            log.warning("iteration %d has ended after all", self._overdue)
        self._overdue = step
        return fault

    def start(self) -> None:
        """Look every `PERIOD_S` seconds. Call it in the event loop that serves."""
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(PERIOD_S)
