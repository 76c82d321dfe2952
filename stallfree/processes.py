"""Helper processes: they do not hear Ctrl-C, which a terminal sends to them too, and none outlives its parent, however that ended.
This module does not know what they do.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

NICE = 10
"""Steps of priority below the model's threads: on a busy machine a helper gets a tenth of a core, not half of one."""

START_S = 60.0
"""Seconds in which a helper process must start."""


def step_back() -> None:
    """Lower the priority of this process; on Linux, that of this thread alone. For work that may wait."""
    with suppress(OSError):
        os.nice(NICE)


class Helpers(ProcessPoolExecutor):
    """At most `number` processes, each begun by `begin(*arguments)`, if it is given. They are spawned: a fork would copy locks that
    threads hold."""

    def __init__(self, number: int | None, begin: Callable[..., None] | None = None, *arguments: object):
        super().__init__(number, multiprocessing.get_context("spawn"), _begin, (begin, arguments))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with _deaf():  # it may start a process
            return super().submit(fn, *args, **kwargs)


class Died(RuntimeError):
    """A helper process ended in the middle of a call."""


class Helper:
    """One process that answers one call at a time, and is replaced if a call takes too long or ends it. In the process,
    `make(*arguments)` makes the function that is called. Calls come from one thread at a time.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], *arguments: object):
        self._work = pickle.dumps((make, arguments))  # once, though the process may be replaced often
        self._closed = self._ready = False
        self._start()

    def call(self, value: object, limit_s: float) -> Any:
        """The function's answer for `value`. Raises TimeoutError after `limit_s` seconds, which do not include the process's start,
        and Died."""
        try:
            if not self._ready:
                if not self._connection.poll(START_S):
                    raise TimeoutError(f"the helper process does not start within {START_S:g} s")
                self._connection.recv()
                self._ready = True
            self._connection.send(value)
            if not self._connection.poll(limit_s):
                raise TimeoutError(f"no answer within {limit_s:g} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._replace()
            if isinstance(error, TimeoutError):
                raise
            raise Died("the helper process has ended") from None

    def close(self) -> None:
        """End the process, in the middle of a call too."""
        self._closed = True
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        with _deaf():
            self._process.start()
        theirs.close()
        self._ready = False

    def _replace(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        if not self._closed:
            self._start()


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that is started here inherits what this thread blocks: even while it starts, Ctrl-C is its parent's affair."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(connection: Connection, work: bytes) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    make, arguments = pickle.loads(work)  # noqa: S301  # from the parent process
    answer = make(*arguments)
    connection.send(None)
    while True:
        connection.send(answer(connection.recv()))


def _begin(begin: Callable[..., None] | None, arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
