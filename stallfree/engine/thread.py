"""The engine in its own thread, for use from asyncio: requests go in through a mailbox, and the outputs of an iteration come back
in one wake-up of the event loop. It knows no HTTP.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import ceil
from typing import Self

from stallfree.core.policy import Forecasting
from stallfree.core.request import Refused, Request
from stallfree.engine.engine import Engine
from stallfree.engine.prefetch import Transfer
from stallfree.engine.streams import AS_IT_COMES, Output, Reading, Watch
from stallfree.qos.forecast import Forecast, Late

log = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """The engine takes no new request now. Try again after `retry_after` seconds (None: it is stopping or has failed)."""

    def __init__(self, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class TooLate(Unavailable):
    """The request's first token would come too late, and it is refused instead. `late`: by how much."""

    def __init__(self, late: Late):
        super().__init__(
            f"the first token would come in about {late.predicted:.2f} s, and its target is {late.target:g} s; try again later, or "
            "ask to be served late",
            ceil(late.retry_after),
        )
        self.late = late


class Outputs:
    """The outputs of the requests of one `submit`. Iterate over it: each list holds the outputs since the last one, until all
    requests have ended. `close` ends this and aborts the unfinished requests. Leaving a `with` closes.
    """

    def __init__(self, ids: Iterable[str], abort: Callable[[str], None]):
        self._unfinished = set(ids)
        self._abort = abort
        self._pending: list[Output] = []
        self._news = asyncio.Event()
        self._closed = False

    def put(self, output: Output) -> None:
        """Add an output of the engine. After `close`, it is dropped."""
        if not self._closed:
            self._pending.append(output)
            self._news.set()
            if output.finish_reason is not None:
                self._unfinished.discard(output.id)

    def close(self) -> None:
        """Abort unfinished requests and wake a waiting reader. Call it in the event loop; a second call is harmless."""
        self._closed = True
        self._pending = []
        self._news.set()
        for id in self._unfinished:
            self._abort(id)
        self._unfinished.clear()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Output]:
        if not self._pending and self._unfinished:
            self._news.clear()
            await self._news.wait()
        if not self._pending:
            raise StopAsyncIteration
        outputs, self._pending = self._pending, []
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EngineThread:
    """Owns `engine` from `start` to `close`. At most `max_queue` requests wait for admission; more raise `Unavailable`. `forecast`
    forecasts first tokens, if the policy tells enough for that.
    """

    def __init__(self, engine: Engine, max_queue: int):
        self.engine = engine
        self.max_queue = max_queue
        policy = engine.scheduler.policy
        self.forecast = Forecast(policy) if isinstance(policy, Forecasting) else None
        self.failure: str | None = None
        self._mailbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._streams: dict[str, Outputs] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self._idle = asyncio.Event()
        engine.adapters.wake = partial(self.call, engine.adapters.start)

    def start(self) -> None:
        """Start the thread. Call it in the event loop that will submit requests."""
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        self._thread.start()

    @property
    def num_running(self) -> int:
        return len(self.engine.scheduler.ledger.running)

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted, including those in the mailbox."""
        return max(0, len(self._streams) - self.num_running)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(
        self,
        requests: Sequence[Request],
        reading: Reading = AS_IT_COMES,
        *,
        transfer: Callable[[Request], Transfer | None] = lambda request: None,
        watch: Watch | None = None,
        serve_late: bool = True,
    ) -> Outputs:
        """Queue all `requests` or none. Raises `Unavailable`, or `Refused` if one can never be served. `transfer` makes each
        request's `Transfer`, if another engine computes its first tokens. `reading`, `watch`: see `Engine.submit`. Without
        `serve_late`, raises `TooLate` if a first token would miss its target.

        Nothing is awaited between the check for room and the queueing, so the queue's limit holds.
        """
        if self.failure is not None or self._draining:
            raise Unavailable(self.failure or "the server is shutting down and takes no new requests")
        if len(requests) > self.max_queue:
            raise Refused(f"{len(requests)} completions at once are more than the queue holds ({self.max_queue})", "n")
        for request in requests:
            self.engine.scheduler.ledger.validate(request)
        if self.num_waiting + len(requests) > self.max_queue:
            raise Unavailable(f"the queue is full ({self.num_waiting} requests wait, {self.max_queue} may); try again later", 1)
        transfers = [transfer(request) for request in requests]
        self._foresee(requests, transfers, serve_late=serve_late)
        outputs = Outputs([r.id for r in requests], self._abort)
        self._idle.clear()
        for request, own in zip(requests, transfers, strict=True):
            self._streams[request.id] = outputs
            submit = partial(self.engine.submit, request, reading, transfer=own, watch=watch)
            self.call(partial(self._submit, request.id, submit))
        return outputs

    def _foresee(self, requests: Sequence[Request], transfers: Sequence[Transfer | None], *, serve_late: bool) -> None:
        if self.forecast is None:
            return
        look = self.engine.scheduler.ledger.pool.look  # it only reads, so it may run beside the engine
        found = [(look(request), self.engine.adapters.wait_s(request)) for request in requests]
        for request, (cached, wait_s) in zip(requests, found, strict=True):
            if not serve_late and (late := self.forecast.late(request, cached, wait_s)) is not None:
                raise TooLate(late)
        for request, transfer, (cached, wait_s) in zip(requests, transfers, found, strict=True):
            if transfer is None:
                self.forecast.enter(request, cached, wait_s)
            else:
                self.forecast.expect(request, max(cached, self.engine.prefetch.cut(request, transfer)))

    def _submit(self, id: str, submit: Callable[[], None]) -> None:
        try:
            submit()
        except Exception as error:
            log.exception("request %s cannot be queued", id)
            message = f"the request cannot be queued ({type(error).__name__}: {error})"
            self._wake(self._dispatch, [Output(id, "", (), finish_reason="error", error=message)])

    def call(self, action: Callable[[], object]) -> None:
        """Run `action` in the engine's thread, between two iterations. For any thread. If `action` raises, the engine fails."""
        self._mailbox.put(action)
        self.engine.wake()

    def _abort(self, id: str) -> None:
        self._forget(id)
        self.call(partial(self.engine.abort, id))

    def _forget(self, id: str) -> None:
        self._streams.pop(id, None)
        if self.forecast is not None:
            self.forecast.leave(id)
        if not self._streams:
            self._idle.set()

    async def close(self, drain_timeout_s: float) -> None:
        """Take no more requests, wait up to `drain_timeout_s` for the unfinished ones, and stop the engine. May be called again."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_timeout_s)
        if self._streams:
            log.warning("%d requests unfinished: they end with an error", len(self._streams))
            self._end_all("abort", "the server is shutting down")
        self._mailbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while self._read_mailbox():
                outputs = self.engine.step()
                if outputs:
                    self._wake(self._dispatch, outputs)
                if not self.engine.busy:
                    self.engine.scheduler.ledger.check()
        except Exception as error:
            log.exception("the engine has failed")
            self.failure = f"the engine has failed ({type(error).__name__}: {error}); restart the server"
            self.engine.closing = lambda: None
            self._wake(self._end_all, "error", self.failure)
        finally:
            self.engine.close()

    def _read_mailbox(self) -> bool:
        """Run the actions in the mailbox. If there is nothing else to do, wait for one. Returns False when it is time to stop."""
        block = not self.engine.busy or self.engine.waits
        while True:
            try:
                action = self._mailbox.get(block=block)
            except queue.Empty:
                return True
            if action is None:
                return False
            action()
            block = not self.engine.busy

    def _wake(self, call: Callable[..., None], *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _end_all(self, reason: str, error: str) -> None:
        self._dispatch([Output(id, "", (), finish_reason=reason, error=error) for id in self._streams])

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is not None:
                if self.forecast is not None:
                    self.forecast.leave(output.id)
                stream.put(output)
                if output.finish_reason is not None:
                    self._forget(output.id)
