"""Waits for events that a test causes, never for a fixed time. The limit only ends a test that would hang; a slow or busy machine
must not reach it.
"""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 300.0
"""Seconds after which a wait fails. It only ends a test that would hang, so it is long."""


def until(true: Callable[[], object], what: Callable[[], object] = lambda: "it did not come true") -> None:
    """Return once `true()` holds. `what()` describes what there was instead."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


async def comes(true: Callable[[], object]) -> None:
    """`until` in an event loop."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.005)
