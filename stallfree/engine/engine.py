"""The loop: plan, run, complete, record, and turn the new tokens of an iteration into outputs.

Synchronous and single-threaded: whoever calls `step` owns the engine. It does not know HTTP, threads or what runs the model.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Protocol

from stallfree.core.plan import Plan, StepResult, Work
from stallfree.core.policy import Policy
from stallfree.core.record import Delivered, Fingerprints, StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Limits, Scheduler
from stallfree.engine.detokenizer import Detokenizer, StopStrings
from stallfree.engine.text import Text
from stallfree.executors.base import Executor, Lost
from stallfree.executors.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Output:
    """What one iteration brought to one request: new `text` (may be empty), new `tokens` (ids) with their `details` (the
    executor's: log-probabilities, or None), and on the last one `finish_reason`, with the stop string or id, or the `error`.
    """

    id: str
    text: str
    tokens: tuple[int, ...]
    details: object = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


class Fetch(Protocol):
    """A prompt that another engine computes. Both are called in the engine's thread."""

    def start(self, request: Request) -> None:
        """Its blocks are reserved: have them filled. It ends in `Engine.deliver` or in `Engine.recall`."""

    def cancel(self) -> None:
        """Nobody wants it any more: what still comes must not be written, for the blocks are others'."""


Watch = Callable[[Work], None]
"""Told of each piece of a request's work once it is computed, in the engine's thread, while its blocks still hold it."""


class _Stream:
    """A request's way from tokens to text."""

    __slots__ = ("detokenizer", "include_stop", "request", "stops")

    def __init__(self, request: Request, text: Text, stop: Sequence[str], include_stop: bool, continues: bool):
        self.request = request
        self.include_stop = include_stop
        self.detokenizer = Detokenizer(text.pieces, request.prompt if continues else ())
        self.stops = StopStrings(stop, include=include_stop)


class Engine:
    """Serves requests on `executor` in the order that `policy` plans. `record` is handed a StepRecord after every iteration,
    with fingerprints of KV blocks by `prints`. `sampling` is for requests that leave something of it open.
    """

    def __init__(
        self,
        executor: Executor,
        text: Text,
        policy: Policy,
        limits: Limits | None = None,
        *,
        reuse: bool = True,
        record: Callable[[StepRecord], None] | None = None,
        prints: Fingerprints | None = None,
        restart: bool = False,
        sampling: Sampling | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.executor = executor
        self.text = text
        self.sampling = sampling or Sampling()
        self.scheduler = Scheduler(policy, executor.capacity, limits, reuse=reuse)
        self.clock = clock
        self._record = record
        self._prints = prints
        self._restart = restart
        self._streams: dict[str, _Stream] = {}
        self._outstanding: deque[tuple[Plan, float, str | None]] = deque()
        self._arrived: list[Request] = []
        self._ended: list[Request] = []
        self._last_end = -inf
        self._fetches: dict[str, Fetch] = {}
        self._asked: dict[str, float] = {}
        self._watches: dict[str, Watch] = {}
        self._came: list[Output] = []
        self._delivered: list[Delivered] = []
        self._recalled: list[str] = []
        self.waits = False
        """Whether the last step found nothing to run, for all that is there waits for prompts computed elsewhere."""

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.requests or self._outstanding or self._came)

    def submit(
        self,
        request: Request,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        continues: bool = True,
        fetch: Fetch | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Queue a request whose text ends at any of the strings `stop`. Raises `Refused` for what can never be served.

        Its text `continues` that of the prompt, or is an answer to it, which begins without a space. With `fetch` its prompt comes
        from elsewhere; `watch` sees it computed here, for somebody elsewhere.
        """
        stream = _Stream(request, self.text, stop, include_stop, continues)
        if isinstance(request.sampling, Sampling):
            request.extra_rows = request.sampling.extra_rows
        if fetch is None:
            self.scheduler.submit(request)
        else:
            self.scheduler.expect(request)
            self._fetches[request.id] = fetch
        if watch is not None:
            self._watches[request.id] = watch
        self._arrived.append(request)
        self._streams[request.id] = stream

    def deliver(self, request: Request, token: int, details: object, num_bytes: int, seconds: float) -> None:
        """The blocks of a fetched request are filled, and its first token is `token`: it decodes from now on."""
        now = self.clock()
        del self._fetches[request.id]
        ended = self.scheduler.deliver(request, token, now)
        if ended is not None:
            self._ended.append(ended)
        asked = self._asked.pop(request.id)
        self._delivered.append(Delivered(request.id, asked, now, request.num_cached, num_bytes, seconds))
        self._came.append(self._output(self._streams[request.id], (token,), details))

    def recall(self, request: Request) -> None:
        """Nobody elsewhere computes the prompt of a fetched request: it is computed here."""
        del self._fetches[request.id], self._asked[request.id]
        self.scheduler.recall(request)
        self._recalled.append(request.id)

    def abort(self, id: str) -> None:
        """End a request now, silently; one that has ended already is none of our business. Its KV is free at once."""
        if id in self._streams:
            self._forget(id)
            self._drop(id)
            self._end(id, "abort")

    def step(self) -> list[Output]:
        """Run one iteration; what it brought to each request: nothing, if all of it was prefill or there is nothing to do.

        If the executor loses all KV, running requests end with an error, or, with `restart`, are computed anew.

        Raises RuntimeError if the policy plans nothing though requests wait: they would wait for ever.
        """
        came, self._came = self._came, []
        try:
            return came + self._step()
        except Lost as lost:
            return came + self._after(lost)

    def close(self) -> None:
        self.executor.close()

    def _after(self, lost: Lost) -> list[Output]:
        """What a loss of all KV brings to the requests."""
        log.error("%s; %d requests were running", lost, len(self.scheduler.running))
        self._outstanding.clear()
        for id in list(self._asked):
            self._drop(id)
        ended = self.scheduler.lost(restart=self._restart)
        self._ended += ended
        gone = [request.id for request in ended if request.id in self._streams]
        for id in gone:
            self._forget(id)
        return [Output(id, "", (), finish_reason="error", error=str(lost)) for id in gone]

    def _step(self) -> list[Output]:
        while (request := self.scheduler.reserve()) is not None:
            self._asked[request.id] = self.clock()
            self._start(request)
        capacity, outstanding = self.executor.capacity, self._outstanding
        # Nothing is planned behind an iteration that failed before those whom it fails are known.
        while len(outstanding) < capacity.depth and not (outstanding and outstanding[-1][2]):
            plan = self.scheduler.schedule(self.clock())
            if not plan.work:
                break
            started = self.clock()
            outstanding.append((plan, started, self._try(partial(self.executor.submit, plan))))
        self.waits = not outstanding and bool(self._asked)
        if not outstanding:
            if self.scheduler.requests and not self.waits:
                raise RuntimeError(f"{len(self.scheduler.requests)} requests are there, but the policy plans no work for them")
            return []
        plan, started, error = outstanding.popleft()
        result = self._collect(plan, error)
        ended = self.clock()
        if capacity.overlap:  # it waited for the one before it
            started = max(started, self._last_end)
        self._last_end = ended
        self._ended += self.scheduler.complete(plan, result, ended)
        outputs = self._show(plan, result) if self._watches else []
        outputs += self._outputs(plan, result)
        if self._record is not None:
            self._note(plan, result, (plan.now, started, ended))
        self._arrived, self._ended, self._delivered, self._recalled = [], [], [], []
        return outputs

    def _note(self, plan: Plan, result: StepResult, times: tuple[float, float, float]) -> None:
        """Hand the iteration's record out. Whoever fails over it must not fail the requests."""
        try:
            record = StepRecord.of(
                plan,
                result,
                self.scheduler,
                times,
                self._arrived,
                self._ended,
                self._prints,
                delivered=self._delivered,
                recalled=self._recalled,
            )
            if self._record is not None:
                self._record(record)
        except Exception:
            log.exception("the record of step %d is lost", plan.step)

    def _start(self, request: Request) -> None:
        """Have the prompt of a request that has been given room computed elsewhere; here, if that cannot even be asked for."""
        try:
            self._fetches[request.id].start(request)
        except Exception:
            log.exception("request %s: its prompt cannot be asked for elsewhere and is computed here", request.id)
            if request.id in self._fetches:
                self.recall(request)

    def _show(self, plan: Plan, result: StepResult) -> list[Output]:
        """Tell the watchers what was computed. A request that has ended just now has not been written over yet. Gives the ends of
        requests whose watcher raised."""
        failed = []
        for work in plan.work:
            watch = self._watches.get(work.id)
            if watch is not None and result.error is None and work.id not in result.failed:
                try:
                    watch(work)
                except Exception as error:
                    failed.append(self._fail(work.id, "what was computed could not be passed on", error))
        return failed

    def _collect(self, plan: Plan, error: str | None) -> StepResult:
        results: list[StepResult] = []
        if error is None:
            error = self._try(lambda: results.append(self.executor.collect()))
        return results[0] if error is None else StepResult(plan.step, {}, 0.0, error=error)

    def _try(self, call: Callable[[], None]) -> str | None:
        """The error of an executor's call in words, if it raises: it fails one iteration, not the engine."""
        try:
            call()
        except Lost:
            raise
        except Exception as error:
            log.exception("the executor failed")
            return f"{type(error).__name__}: {error}"
        return None

    def _outputs(self, plan: Plan, result: StepResult) -> list[Output]:
        outputs: list[Output] = []
        for work in plan.work:
            stream = self._streams.get(work.id)
            if stream is None or stream.request.output is not work.output:  # it has ended; the id may be another's by now
                continue
            error = result.error or result.failed.get(work.id)
            if error is not None:
                self._forget(work.id)
                outputs.append(Output(work.id, "", (), finish_reason="error", error=error))
            elif work.samples:
                outputs.append(self._output(stream, tuple(result.tokens[work.id]), result.details.get(work.id)))
        return outputs

    def _output(self, stream: _Stream, tokens: tuple[int, ...], details: object) -> Output:
        """What new tokens brought to a request. Whatever its text raises ends this request, and no other."""
        try:
            return self._text_of(stream, tokens, details)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the tokenizer's library is no Exception
            return self._fail(stream.request.id, "its tokens cannot be made text", error)

    def _fail(self, id: str, what: str, error: BaseException) -> Output:
        """End a request by an error of its own."""
        log.error("request %s: %s", id, what, exc_info=error)
        self._forget(id)
        self._end(id, "error")
        return Output(id, "", (), finish_reason="error", error=f"{what} ({type(error).__name__}: {error})")

    def _text_of(self, stream: _Stream, tokens: tuple[int, ...], details: object) -> Output:
        request = stream.request
        reason = request.finish_reason
        stop: str | int | None = None
        text = ""
        for token in tokens:
            if reason == "stop" and token in request.stop_ids:
                stop = token
                if not stream.include_stop or token in self.text.eos_ids:
                    continue
            text += stream.detokenizer.push(token, special=stop is not None)
        if reason is not None:
            text += stream.detokenizer.flush()
        text, found = stream.stops.push(text, ends=len(request.output) >= request.min_tokens)
        if found is not None:
            stop = found
            if reason is None:
                self._end(request.id, "stop")
            reason = "stop"
        elif reason is not None:
            text += stream.stops.flush()
        if reason is not None:
            self._forget(request.id)
        return Output(request.id, text, tokens, details, reason, stop)

    def _end(self, id: str, reason: str) -> None:
        request = self.scheduler.abort(id, reason)
        if request is not None:
            self._ended.append(request)

    def _forget(self, id: str) -> None:
        del self._streams[id]
        self._watches.pop(id, None)

    def _drop(self, id: str) -> None:
        """What is fetched for a request is not wanted any more."""
        fetch = self._fetches.pop(id, None)
        self._asked.pop(id, None)
        if fetch is not None:
            try:
                fetch.cancel()
            except Exception:
                log.exception("request %s: what is computed for it elsewhere cannot be called off", id)
