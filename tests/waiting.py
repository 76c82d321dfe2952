"""Waiting for what a test makes happen, never for seconds. The limit only ends a test that would hang: a machine that is slow, or
busy with something else, must not reach it.
"""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 300.0
"""Seconds after which what a test waits for is taken never to come."""


def until(true: Callable[[], object], what: Callable[[], object] = lambda: "it did not come true") -> None:
    """Return once `true()` is. `what()` says what there was instead."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


async def comes(true: Callable[[], object]) -> None:
    """`until` in an event loop."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.005)
