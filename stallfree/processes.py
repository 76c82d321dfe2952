"""Helper processes: they do not hear Ctrl-C, which a terminal sends to them too, and none outlives its parent, however that ended.
This module does not know what they do.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


class Helpers(ProcessPoolExecutor):
    """At most `number` processes, each begun by `begin(*arguments)`. They are spawned: a fork would copy locks that threads
    hold."""

    def __init__(self, number: int | None, begin: Callable[..., None], *arguments: object):
        super().__init__(number, multiprocessing.get_context("spawn"), _begin, (begin, arguments))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # It may start a process, which inherits what this thread blocks: even while it starts, Ctrl-C is its parent's affair.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin(begin: Callable[..., None], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
