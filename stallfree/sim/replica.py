"""One engine in virtual time: the scheduler that serves, and iterations that take what a cost model says.

Requests reach the scheduler between two iterations, as in the live engine. Where the policy is steady, iterations alike are taken
in one leap, which an arrival cuts short. It does not know where requests come from, nor of other replicas.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple, cast

from stallfree.core import transfer
from stallfree.core.leap import Stretch, steady
from stallfree.core.plan import Plan, StepResult, Work
from stallfree.core.policy import CostModel
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.metrics.timeline import Timeline

LEAP = 64
"""Iterations that are looked ahead at once: a leap that an arrival cuts short was looked at in vain from there on."""


TOGETHER = 64
"""Requests that are taken before it goes on: while it does, its state is in the processor's caches, and that of others is not."""


class Script(NamedTuple):
    """What becomes of a request, as its `sampling`: the tokens of its `answer`, which ends with the last of them by a stop id or by
    `max_tokens`, and the `line` that is written meanwhile. `ends`: its tokens by then, those of the prompt included.
    """

    answer: Sequence[int]
    line: Timeline
    ends: int


def script(request: Request, answer: Sequence[int]) -> Request:
    """`request`, to be answered with `answer`."""
    length = len(request.prompt)
    request.sampling = Script(answer, Timeline(request.id, request.arrival, length), length + len(answer))
    return request


class Span(NamedTuple):
    """An iteration in one stage of the pipeline, from `begin` to `end` (s): how many `decodes`, and tokens of `prefill`."""

    step: int
    stage: int
    begin: float
    end: float
    decodes: int
    prefill: int


class Replica:
    """`scheduler` on a machine of as many stages as its plans are deep, each of which takes an equal share of an iteration's time
    by `cost`.

    Nothing is planned before `begin`; `between_s` pass from an iteration's end to the next one's planning; `slowness`: what to
    multiply the time of an iteration with that is planned at a given moment. `ended` is called with each request that ended,
    `record` with each record, `span` with each iteration in each stage; without `record` none are made. `leap`: the most
    iterations at once; 1 is step by step. Step by step, `launched` is called with each plan, its begin and its end before it runs,
    and `completed` after it has run.

    `due`: when it goes on, inf if it waits for requests. `active_s`: how long any iteration was running; `busy_s`: how
    long each stage was; what they lack to `active_s` are bubbles. `iterations`: how many have ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cost: CostModel,
        *,
        ended: Callable[[Request], None] = lambda request: None,
        record: Callable[[StepRecord], None] | None = None,
        span: Callable[[Span], None] | None = None,
        launched: Callable[[Plan, float, float], None] = lambda plan, begin, end: None,
        completed: Callable[[Plan, float], None] = lambda plan, end: None,
        begin: float = 0.0,
        between_s: float = 0.0,
        slowness: Callable[[float], float] | None = None,
        leap: int = LEAP,
    ):
        self.scheduler = scheduler
        self.due = inf
        self.active_s = 0.0
        self.busy_s = [0.0] * scheduler.ledger.capacity.depth
        self.iterations = 0
        self._cost = cost
        self._batch: Callable[[int, int, Sequence[tuple[int, int]]], float] | None = getattr(cost, "batch", None)
        self._ended, self._record, self._span = ended, record, span
        self._launched, self._completed = launched, completed
        self._between_s, self._slowness = between_s, slowness
        self._leap = leap
        self._steady = leap > 1 and steady(scheduler.policy) and scheduler.ledger.capacity.depth == 1
        # Those taken that are still to come, and those that have come and that the scheduler has not heard of.
        self._coming: deque[Request] = deque()
        self._came: list[Request] = []
        self._leaving: list[str] = []
        self._arrived: list[Request] = []
        self._gone: list[Request] = []
        self._ready = begin
        # Step by step: plans in flight, with start, end and bubbles of each, and when each stage is free.
        self._out: deque[tuple[Plan, float, float, float]] = deque()
        self._free = [0.0] * scheduler.ledger.capacity.depth
        # In leaps: the stretch that is under way, its iterations' planning and end; one moment more is the next planning.
        self._stretch: Stretch | None = None
        self._moments: list[float] = []
        self._ends: list[float] = []

    @property
    def num_requests(self) -> int:
        """Requests that are here and have not ended."""
        return len(self.scheduler.ledger.requests) + len(self._came) + len(self._coming)

    def pending(self, now: float) -> int:
        """Tokens to be planned before everybody here has a first token, or its next one; a request that is expected counts with its
        prompt until there is room for it. Counted anew each time: whoever keeps it has to hear of every move.
        """
        tokens = sum([r.num_tokens - r.num_planned for r in self.scheduler.ledger.requests.values()])
        tokens += sum([len(r.prompt) for r in (*self._came, *self._coming)])
        if self._stretch is not None and self._stretch.draft.chunks:
            begun = bisect_left(self._moments, now, 1)
            tokens -= (begun - 1) * sum(self._stretch.draft.chunks.values())
        return tokens

    def take(self, request: Request) -> None:
        """A request with a `Script` is to come in at its arrival, which is not before that of others taken, nor before the moment
        to which the replica has run. It may run up to it.
        """
        self._coming.append(request)
        if len(self._coming) > TOGETHER:
            self.run(request.arrival)

    def drop(self, id: str, now: float) -> None:
        """A request's client leaves; nothing happens if it has ended, or was never here."""
        self._leaving.append(id)
        self._look(now)

    def hold(self, id: str) -> None:
        """A request that goes on elsewhere gets no more work here, and keeps its KV until it is let go."""
        transfer.hold(self.scheduler.ledger, id)

    def let_go(self, id: str, now: float) -> None:
        """A request that was held here goes on elsewhere, and leaves its KV."""
        transfer.release(self.scheduler.ledger, id)
        self._look(now)

    def expect(self, request: Request) -> None:
        """A request whose prompt is computed elsewhere goes on here, once `admit` has given it room."""
        transfer.expect(self.scheduler.ledger, request)

    def admit(self) -> Request | None:
        """The first of the expected, if there is room for it from now on; None if there is none, or nobody is expected."""
        return transfer.admit(self.scheduler.ledger)

    def forgo(self, id: str, now: float) -> None:
        """A request that was expected here does not come: its room is free."""
        self.scheduler.abort(id)
        self._look(now)

    def deliver(self, request: Request, token: int, now: float) -> None:
        """The KV of an admitted request is here, and its first token."""
        self._arrived.append(request)
        if transfer.deliver(self.scheduler.ledger, request, token, now) is not None:
            self._gone.append(request)
            self._end(request, now)
        self._look(now)

    def run(self, until: float) -> None:
        """Go on to just before `until`."""
        coming = self._coming
        while coming and coming[0].arrival < until:
            request = coming.popleft()
            while self.due < request.arrival:
                self._wake()
            self._came.append(request)
            self._look(request.arrival)
        while self.due < until:
            self._wake()

    def _wake(self) -> None:
        """Go on at `due`: what has ended is completed, who came or went is taken in or let go, and the next iterations begin."""
        now = self.due
        if self._stretch is not None:
            self._land(self._stretch)
        elif self._out:
            self._complete()
        for request in self._came:
            self.scheduler.submit(request)
        self._arrived += self._came
        self._came = []
        for id in self._leaving:
            gone = self.scheduler.abort(id)
            if gone is not None:
                self._end(gone, now)
                self._gone.append(gone)
        self._leaving.clear()
        if self._steady:
            self._look_ahead(now)
        else:
            self._plan(now)

    def _look(self, now: float) -> None:
        """Something happened, of which the scheduler is to hear when the iteration that runs has ended."""
        if self._stretch is not None:
            self.due = self._moments[bisect_left(self._moments, now, 1)]
        elif not self._out:
            self.due = max(now, self._ready)

    def _plan(self, now: float) -> None:
        scheduler = self.scheduler
        while len(self._out) < scheduler.ledger.capacity.depth and (plan := scheduler.schedule(now)).work:
            self._launch(plan)
        self.due = self._out[0][2] + self._between_s if self._out else inf

    def _launch(self, plan: Plan) -> None:
        """Through the stages one after the other: each begins when the one before it is through and its own last plan is."""
        seconds = self._cost.seconds(plan.shape)
        if self._slowness is not None:
            seconds *= self._slowness(plan.now)
        share = seconds / len(self._free)
        start = end = max(plan.now, self._free[0])
        idle = 0.0 if self._out else max(0.0, plan.now - self._free[-1])  # in which nobody wanted anything
        waited = -len(self._free) * idle
        for stage, free in enumerate(self._free):
            begin = max(end, free)
            waited += begin - free
            end = begin + share
            self._free[stage] = end
            self.busy_s[stage] += end - begin
            if self._span is not None:
                decodes = sum(w.decode for w in plan.work)
                self._span(Span(plan.step, stage, begin, end, decodes, plan.num_tokens - decodes))
        self.active_s += end - max(start, self._out[-1][2] if self._out else start)
        self._out.append((plan, start, end, max(0.0, waited)))
        self._launched(plan, start, end)

    def _complete(self) -> None:
        plan, start, end, bubble_s = self._out.popleft()
        scheduler, requests = self.scheduler, self.scheduler.ledger.requests
        for id in plan.stalled:
            if id in requests:
                _script(requests[id]).line.stalls += 1
        tokens: dict[str, Sequence[int]] = {}
        for w in plan.work:
            request = requests.get(w.id)
            if request is not None:  # else its client has left
                told: Script = request.sampling  # type: ignore[assignment]
                answer, line, _ = told
                if line.scheduled is None:
                    line.scheduled = start
                if w.samples:
                    had = len(request.output)
                    tokens[w.id] = answer[had : had + 1]
                    line.tokens.append(end)
        result = StepResult(plan.step, tokens, end - start, bubble_s=bubble_s)
        done, dropped = scheduler.complete(plan, result, end)
        self.iterations += 1
        self._ready = end + self._between_s
        for request in done:
            self._end(request, end)
        self._completed(plan, end)
        if self._record is not None:
            times = (plan.now, start, end)
            self._record(StepRecord.of(plan, result, scheduler.ledger, times, self._arrived, [*self._gone, *done], dropped=dropped))
        self._arrived, self._gone = [], []

    def _look_ahead(self, now: float) -> None:
        stretch = Stretch(self.scheduler, now, self._leap)
        self.due = inf
        if not stretch.draft.work:
            return
        steps = stretch.most
        if steps > 1 and stretch.sampling:
            steps = min(steps, min([r.sampling.ends - r.num_tokens for r in stretch.sampling]))  # type: ignore[attr-defined]
        self._moments, self._ends = moments, ends = [now], []
        between, slowness = self._between_s, self._slowness
        for _, seconds in zip(range(steps), self._seconds(stretch), strict=False):
            if slowness is not None:
                seconds *= slowness(now)
            end = now + seconds
            ends.append(end)
            now = end + between
            moments.append(now)
        self.due = now
        self._stretch = stretch

    def _seconds(self, stretch: Stretch) -> Iterator[float]:
        """What each iteration of the stretch takes, and those after it."""
        work = stretch.draft.work
        batch = self._batch
        if batch is None:
            pieces = [(r.num_planned - count, count) for r, count in work.items()]
            while True:
                yield self._cost.seconds(pieces)
                pieces = [(start + count, count) for start, count in pieces]
        chunks = [(r.num_planned - count, count) for r, count in stretch.draft.chunks.items() if count > 1]
        decodes = len(work) - len(chunks)
        context = sum([r.num_planned for r in work]) - sum([start + count for start, count in chunks]) - decodes
        while True:
            yield batch(decodes, context, chunks)
            context += decodes
            chunks = [(start + count, count) for start, count in chunks]

    def _land(self, stretch: Stretch) -> None:
        """The iterations of the stretch that were planned before `due` are over."""
        scheduler, draft = self.scheduler, stretch.draft
        steps = bisect_left(self._moments, self.due, 1)
        moments, ends = self._moments[:steps], self._ends[:steps]
        self._stretch = None
        for request in draft.chunks:
            line = _script(request).line
            if line.scheduled is None:
                line.scheduled = moments[0]
        for id in draft.stalled:
            _script(scheduler.ledger.requests[id]).line.stalls += steps
        tokens = []
        for request in stretch.sampling:
            told: Script = request.sampling  # type: ignore[assignment]
            answer, line, _ = told
            had = len(request.output)
            tokens.append(answer[had : had + steps])
            line.tokens += ends
        before = len(scheduler.ledger.running), scheduler.ledger.pool.num_free
        done = stretch.leap(steps, tokens, ends[-1])
        self._ready = self.due
        self.iterations += steps
        for begin, end in zip(moments, ends, strict=True):
            self.busy_s[0] += end - begin
            self.active_s += end - begin
        if self._span is not None:
            prefill = sum(draft.chunks.values())
            for number, (begin, end) in enumerate(zip(moments, ends, strict=True), stretch.step):
                self._span(Span(number, 0, begin, end, len(draft.work) - len(draft.chunks), prefill))
        for request in done:
            self._end(request, ends[-1])
        if self._record is not None:
            self._write(stretch, moments, ends, before, done)
        self._arrived, self._gone = [], []

    def _write(
        self, stretch: Stretch, moments: Sequence[float], ends: Sequence[float], before: tuple[int, int], done: Sequence[Request]
    ) -> None:
        """The records of the stretch's iterations; `before` the leap so many requests were running, and KV blocks free."""
        draft, chunks, steps = stretch.draft, stretch.draft.chunks, len(ends)
        running, free = before
        sampling = set(stretch.sampling)
        for number, (begin, end) in enumerate(zip(moments, ends, strict=True)):
            first, last = number == 0, number == steps - 1
            free -= 0 if first else stretch.grown[number]
            behind = steps - number
            work = tuple(
                Work(r.id, r.num_computed - behind * count, count, r in sampling, r not in chunks, (), (), None, "", (), ())
                for r, count in draft.work.items()
            )
            plan = Plan(
                stretch.step + number, begin, work, stretch.preempted if first else (), draft.stalled,
                draft.cached if first else (), draft.budget, draft.reason, draft.limit_s, draft.margin,
            )  # fmt: skip
            arrived = self._arrived if first else []
            ended = [*(self._gone if first else []), *(done if last else [])]
            times, result = (begin, begin, end), StepResult(plan.step, {}, end - begin)
            record = StepRecord.of(plan, result, self.scheduler.ledger, times, arrived, ended)
            self._record(record if last else replace(record, num_running=running, free_blocks=free))  # type: ignore[misc]

    def _end(self, request: Request, t: float) -> None:
        line = _script(request).line
        line.finished, line.reason = t, request.finish_reason
        self._ended(request)


def _script(request: Request) -> Script:
    return cast(Script, request.sampling)
