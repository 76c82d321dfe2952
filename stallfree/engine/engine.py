"""The loop: plan, run, complete, record, and turn the new tokens of an iteration into outputs.

It is synchronous and single-threaded: the caller of `step` owns the engine. It does not know HTTP, threads or what runs the model.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import cast

from stallfree.core.ledger import Limits
from stallfree.core.plan import Plan, StepResult, Work
from stallfree.core.policy import Chunks, Policy
from stallfree.core.record import Fingerprints, StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.speculation import Drafter
from stallfree.elastic.policy import Policy as GroupPolicy
from stallfree.elastic.scheduler import GroupScheduler
from stallfree.engine.adapters import Loader
from stallfree.engine.host_tier import HostTier
from stallfree.engine.prefetch import Prefetch, Transfer
from stallfree.engine.streams import AS_IT_COMES, Output, Reading, Streams, Watch
from stallfree.engine.text import Text
from stallfree.executors.base import Executor, Lost, RunsGroups
from stallfree.executors.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Outstanding:
    """A `plan` at the executor since `started` (s). `error`: why its submission failed, in words."""

    plan: Plan
    started: float
    error: str | None = None


class Engine:
    """Serves requests on `executor` as `policy` plans; one that runs groups takes a `GroupPolicy`. `record`, which may be set
    later, is called with a StepRecord after every iteration; `prints` adds fingerprints of KV blocks to it. `sampling`: the values
    for what a request leaves open. `speculation`: adds drafts to iterations; the executor must check them (`base.Verifies`).
    `prefetch` keeps the requests whose first tokens other engines compute.
    """

    def __init__(
        self,
        executor: Executor,
        text: Text,
        policy: Policy | GroupPolicy,
        limits: Limits | None = None,
        *,
        reuse: bool = True,
        record: Callable[[StepRecord], None] | None = None,
        prints: Fingerprints | None = None,
        restart: bool = False,
        sampling: Sampling | None = None,
        speculation: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.executor = executor
        self.text = text
        self.sampling = sampling or Sampling()
        self._groups = executor if isinstance(executor, RunsGroups) else None
        self.scheduler: Scheduler | GroupScheduler
        if self._groups is None:
            own = cast(Policy, policy)
            self.scheduler = Scheduler(own, executor.capacity, limits, reuse=reuse, speculation=speculation)
        else:
            self.scheduler = GroupScheduler(cast(GroupPolicy, policy), self._groups, limits)
        self.clock = clock
        chunks = isinstance(policy, Chunks) and policy.chunks
        self.prefetch = Prefetch(self.scheduler.ledger, clock, self._sampled_elsewhere, self._move, chunks=chunks)
        self.adapters = Loader(self.scheduler.ledger, executor, clock, self._without_adapter, self._move)
        self.host: HostTier | None = None
        """Host memory for evicted KV, if there is any. Whoever sets it does it before the first request."""
        self.closing: Callable[[], object] = lambda: None
        """Called when the engine closes and has not failed, while its KV is still there."""
        self.record = record
        self._prints = prints
        self._restart = restart
        self._streams = Streams(text, self._end)
        self.waits = False
        """Whether the last step found nothing to run, because every request waits for a prompt computed elsewhere or an adapter."""
        self._outstanding: deque[_Outstanding] = deque()
        self._last_end = -inf
        # Requests since the last record, and outputs for the next step.
        self._arrived: list[Request] = []
        self._ended: list[Request] = []
        self._pending: list[Output] = []

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.ledger.requests or self._outstanding or self._pending or self.adapters.due)

    @property
    def running_plan(self) -> tuple[Plan, float] | None:
        """The oldest plan at the executor, and when it began (s, by `clock`); None if there is no plan. For any thread: it answers
        also while an iteration never ends.
        """
        try:
            oldest = self._outstanding[0]
        except IndexError:
            return None
        return oldest.plan, self._began(oldest.started)

    def submit(
        self,
        request: Request,
        reading: Reading = AS_IT_COMES,
        *,
        transfer: Transfer | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Queue a request. Its tokens become text as `reading` says. Raises `Refused` if it can never be served.

        `transfer`: brings the KV of its first tokens from another engine. `watch`: is called for each piece of it computed here for
        another engine.
        """
        if isinstance(request.sampling, Sampling):
            request.extra_rows = request.sampling.extra_rows
            request.constrained = request.sampling.constraint is not None
            request.scored = request.sampling.prompt_logprobs is not None
            if transfer is not None and request.sampling.constraint is not None:
                request.sampling.constraint.begin(request.output)  # the other engine gets what may come first
        stream = self._streams.make(request, reading)
        if transfer is None:
            self.scheduler.submit(request)
        else:
            self.prefetch.expect(request, transfer)
        self._streams.read(stream, watch)
        self._arrived.append(request)

    def abort(self, id: str) -> None:
        """End a request now, without an output; its KV is free at once. Does nothing if it has already ended."""
        if id in self._streams:
            self._streams.forget(id)
            self._end(id, "abort")

    def step(self) -> list[Output]:
        """Run one iteration. Returns its outputs: none if it was all prefill, or if there is nothing to do. Outputs that came from
        elsewhere since the last step are returned at once, without an iteration.

        If the executor loses all KV, running requests end with an error, or, with `restart`, are computed again.

        Raises RuntimeError if the policy plans nothing though requests wait, because they would wait for ever.
        """
        if self._pending:
            outputs, self._pending, self.waits = self._pending, [], False
            return outputs
        try:
            return self._step()
        except Lost as lost:
            return self._recover(lost)

    def wake(self) -> None:
        """For any thread: a step that waits for instances returns without outputs, so that others can begin. Any other goes on."""
        if self._groups is not None:
            self._groups.wake()

    def close(self) -> None:
        self.adapters.close()
        self.closing()
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.close()
        self.executor.close()

    def _step(self) -> list[Output]:
        self.adapters.start()
        self.prefetch.start()
        self._submit_plans()
        if not self._outstanding or (self._groups is not None and not self._outstanding[0].error and not self._groups.wait()):
            return []
        plan, result, times = self._collect()
        done, dropped = self.scheduler.complete(plan, result, times[2])
        self._ended += done
        outputs = self._call_watches(plan, result) + self._outputs(plan, result)
        self._note(plan, result, times, dropped)
        return outputs

    def _submit_plans(self) -> None:
        """Submit plans until the executor has as many as it takes at once."""
        outstanding, requests = self._outstanding, self.scheduler.ledger.requests
        # After a failed iteration, nothing is planned until the requests that it fails have ended.
        while len(outstanding) < self.executor.capacity.depth and not (outstanding and outstanding[-1].error):
            plan = self.scheduler.schedule(self.clock())
            self._move()
            if not plan.work:
                break
            outstanding.append(_Outstanding(plan, self.clock()))  # first, because `submit` of some executors runs the whole plan
            outstanding[-1].error = self._try(partial(self.executor.submit, plan))
        self.waits = not outstanding and (self.prefetch.under_way or self.adapters.under_way)
        if requests and not outstanding and not self.waits:
            raise RuntimeError(f"the policy plans no work for {len(requests)} requests; they would wait for ever")

    def _move(self) -> None:
        """Move the KV between the tiers that is due, before anything else writes to the blocks. Raises Lost if that fails."""
        try:
            if self.host is not None:
                self.host.move()
        except Exception as error:
            wasted: list[StepResult] = []
            for _ in [each for each in self._outstanding if each.error is None]:
                self._try(lambda: wasted.append(self.executor.collect()))
            raise Lost(f"KV could not be moved to or from host memory ({type(error).__name__}: {error})") from error

    def _collect(self) -> tuple[Plan, StepResult, tuple[float, float, float]]:
        """The plan that ended first, its result, and when it was planned, started and ended."""
        first = self._outstanding[0]
        error = first.error
        results: list[StepResult] = []
        if error is None:
            error = self._try(lambda: results.append(self.executor.collect()))
        if results:
            first = next(each for each in self._outstanding if each.plan.step == results[0].step)
        plan = first.plan
        result = results[0] if error is None else StepResult(plan.step, {}, 0.0, error=error)
        started, ended = self._began(first.started), self.clock()
        self._last_end = ended
        self._outstanding.remove(first)
        return plan, result, (plan.now, started, ended)

    def _began(self, started: float) -> float:
        """When a plan began that was submitted at `started` (s). With overlap, it waited for the one before it."""
        return max(started, self._last_end) if self.executor.capacity.overlap else started

    def _try(self, call: Callable[[], None]) -> str | None:
        """Call the executor. If it raises, return the error in words: it fails one iteration, not the engine."""
        try:
            call()
        except Lost:
            raise
        except Exception as error:
            log.exception("the executor failed")
            return f"{type(error).__name__}: {error}"
        return None

    def _call_watches(self, plan: Plan, result: StepResult) -> list[Output]:
        """Call the watches of what was computed, without wrong drafts. The KV of a request that has just ended is not written over
        yet. Returns the last outputs of requests whose watch raised."""
        failed: list[Output] = []
        watches = self._streams.watches
        if not watches or result.error is not None:
            return failed
        for work in plan.work:
            watch = watches.get(work.id)
            if watch is not None and work.id not in result.failed:
                try:
                    watch(work._replace(count=len(result.tokens.get(work.id, ()))) if work.drafts else work)
                except Exception as error:
                    failed.append(self._streams.fail(work.id, "its KV could not be passed on", error))
        return failed

    def _outputs(self, plan: Plan, result: StepResult) -> list[Output]:
        outputs: list[Output] = []
        for id, (start, scores) in result.scores.items():
            self._streams.score(id, start, scores)
        for work in plan.work:
            request = self._streams.request(work.id)
            if request is None or request.output is not work.output:  # it has ended; another request may have its id
                continue
            error = result.error or result.failed.get(work.id)
            if error is not None:
                outputs.append(self._streams.ended(work.id, error))
            elif work.samples and work.id not in result.deferred:
                outputs += self._read(request, work, result)
        return outputs

    def _read(self, request: Request, work: Work, result: StepResult) -> Iterator[Output]:
        """The outputs for the tokens of one piece of work, up to the last of the request."""
        details = result.details.get(work.id)
        first = work.start + (1 if work.decode else work.count) - len(request.prompt) + 1
        for number, token in enumerate(result.tokens[work.id], first):
            output = self._streams.output(work.id, token, details[number - first] if details else None, number)
            yield output
            if output.finish_reason is not None:
                return

    def _note(self, plan: Plan, result: StepResult, times: tuple[float, float, float], dropped: Sequence[str]) -> None:
        """Pass the iteration's record to `record`. If this raises, the requests must not fail."""
        arrived, ended, self._arrived, self._ended = self._arrived, self._ended, [], []
        news = self.prefetch.news()
        if self.record is None:
            return
        try:
            self.record(
                StepRecord.of(
                    plan, result, self.scheduler.ledger, times, arrived, ended, self._prints,
                    dropped=dropped, loaded=self.adapters.news(), **news._asdict(),
                )
            )  # fmt: skip
        except Exception:
            log.exception("the record of step %d is lost", plan.step)

    def _sampled_elsewhere(self, request: Request, token: int, details: object) -> None:
        """Another engine has sampled the next token of a request."""
        if request.finish_reason is not None:
            self._ended.append(request)
        self._pending.append(self._streams.output(request.id, token, details, len(request.output)))

    def _without_adapter(self, requests: Sequence[Request], reason: str) -> None:
        """The adapter of these requests cannot be loaded: they end with this error."""
        for request in requests:
            self._end(request.id, "error")
            self._pending.append(self._streams.ended(request.id, reason))

    def _recover(self, lost: Lost) -> list[Output]:
        """Go on after a loss of all KV. Returns the last outputs of the requests that it ends."""
        log.error("%s; %d requests were running", lost, len(self.scheduler.ledger.running))
        self._outstanding.clear()
        self.prefetch.lost()
        ended = self.scheduler.lost(restart=self._restart)
        self._ended += ended
        return [self._streams.ended(request.id, str(lost)) for request in ended if request.id in self._streams]

    def _end(self, id: str, reason: str) -> None:
        """End a request, and its KV transfer if it has one."""
        self.prefetch.drop(id)
        request = self.scheduler.abort(id, reason)
        if request is not None:
            self._ended.append(request)
