"""One engine in virtual time: the server's own scheduler, and iterations that take as long as a cost model says.

Requests reach the scheduler between two iterations, as in the live engine. If the policy is steady, many equal iterations are
simulated at once, up to the next arrival. A replica does not know where requests come from, and knows no other replica.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import inf
from typing import NamedTuple, cast

from stallfree.core import transfer
from stallfree.core.adapters import Resident
from stallfree.core.leap import Stretch
from stallfree.core.plan import Plan, StepResult, Work
from stallfree.core.policy import BatchModel, CostModel, Forecasting
from stallfree.core.record import Loaded, StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.metrics.timeline import Timeline
from stallfree.qos.forecast import Forecast

LEAP = 64
"""The most iterations in one leap. If an arrival cuts a leap short, the rest of its prediction was wasted."""

TOGETHER = 64
"""Requests that a replica takes before it runs on. Many iterations in one go keep its state in the processor's caches."""


class Script(NamedTuple):
    """The course of a request, kept as its `sampling`: the tokens of its `answer`, the last of which ends it (by a stop id or by
    `max_tokens`), and its timeline `line`. `ends`: its tokens at the end, including the prompt.
    """

    answer: Sequence[int]
    line: Timeline
    ends: int


def script(request: Request, answer: Sequence[int], sent: float | None = None) -> Request:
    """`request`, which will get the tokens `answer`. Its client sent it at `sent`, or when it arrives."""
    length = len(request.prompt)
    line = Timeline(
        request.id,
        request.arrival if sent is None else sent,
        length,
        tenant=request.tenant,
        service_class=request.service_class,
        priority=request.priority,
    )
    request.sampling = Script(answer, line, length + len(answer))
    return request


class Span(NamedTuple):
    """An iteration in one stage of the pipeline, from `begin` to `end` (s), with its number of `decodes` and `prefill` tokens."""

    step: int
    stage: int
    begin: float
    end: float
    decodes: int
    prefill: int


class Replica:
    """`scheduler` on a machine with as many stages as its capacity's `depth`. Each stage takes an equal share of an iteration's
    time by `cost`.

    Nothing is planned before `begin`. `between_s` pass from an iteration's end to the next planning. `slowness`: the factor on the
    time of an iteration planned at a given moment. `load_s`: the seconds in which an adapter's weights come, one after another
    (None: there are no adapters). `draft_s`: the seconds in which one more token of each stream is guessed. Without `serve_late`,
    requests are refused whose first token would come too late by the policy's forecast; they end with the reason "refused". `ended`
    is called with each request that ended, `record` with each record, `span` with each iteration in each stage. Without `record`,
    no records are made. `leap`: the most iterations at once; with 1, `launched` is called with each plan, its begin and its end
    before it runs, and `completed` after it has run. `freed` is called at the end of each iteration or leap: there may be more
    room. `loaded` is called with the moment at which adapters have arrived.

    `due`: when it goes on; inf if it waits for requests. `active_s`: seconds in which an iteration ran; `busy_s`: seconds in which
    each stage ran; the difference are bubbles. `iterations`: how many have ended.
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
        freed: Callable[[float], None] = lambda now: None,
        loaded: Callable[[float], None] = lambda now: None,
        begin: float = 0.0,
        between_s: float = 0.0,
        slowness: Callable[[float], float] | None = None,
        load_s: Callable[[Resident], float] | None = None,
        draft_s: float = 0.0,
        leap: int = LEAP,
        serve_late: bool = True,
    ):
        self.scheduler = scheduler
        scheduler.tables = False
        self.due = inf
        self.active_s = 0.0
        self.busy_s = [0.0] * scheduler.ledger.capacity.depth
        self.iterations = 0
        self._cost = cost
        self._batch = cost.batch if isinstance(cost, BatchModel) else None
        self._ended, self._record, self._span = ended, record, span
        self._launched, self._completed, self._freed, self._on_load = launched, completed, freed, loaded
        self._between_s, self._slowness = between_s, slowness
        self._leap = leap
        one = scheduler.ledger.capacity.depth == 1 and load_s is None
        self._steady = leap > 1 and scheduler.steady and one
        # Adapters on their way, with the moments at which they are here, in order.
        self._draft_s = draft_s
        self._load_s = load_s or (lambda adapter: 0.0)
        self._loads = deque[tuple[float, Resident]]()
        self._loaded: list[Loaded] = []
        self._serve_late = serve_late
        self._forecast = None if serve_late else self._forecaster()
        # Requests that were taken and arrive later, and requests that arrived and are not submitted to the scheduler yet.
        self._coming: deque[Request] = deque()
        self._unsubmitted: list[Request] = []
        self._leaving: list[str] = []
        self._arrived: list[Request] = []
        self._gone: list[Request] = []
        self._ready = begin
        # Without leaps: the plans in flight, each with start, end and bubbles (s), and when each stage is free.
        self._out: deque[tuple[Plan, float, float, float]] = deque()
        self._free = [0.0] * scheduler.ledger.capacity.depth
        # With leaps: the stretch under way, when each of its iterations is planned (and the next after it), and when each ends.
        self._stretch: Stretch | None = None
        self._moments: list[float] = []
        self._ends: list[float] = []

    @property
    def num_requests(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self.scheduler.ledger.requests) + len(self._unsubmitted) + len(self._coming)

    @property
    def requests(self) -> Iterator[Request]:
        """The requests that `num_requests` counts."""
        return chain(self.scheduler.ledger.requests.values(), self._unsubmitted, self._coming)

    def pending(self, now: float) -> int:
        """Tokens to be planned until every request here has its first token, or its next one. An expected request counts with its
        prompt until it has room. Counted at each call: a running count would have to follow every change.
        """
        tokens = sum([r.num_tokens - r.num_planned for r in self.scheduler.ledger.requests.values()])
        tokens += sum([len(r.prompt) for r in (*self._unsubmitted, *self._coming)])
        if self._stretch is not None and self._stretch.draft.chunks:
            begun = bisect_left(self._moments, now, 1)
            tokens -= (begun - 1) * sum(self._stretch.draft.chunks.values())
        return tokens

    def forecast(self, request: Request) -> float | None:
        """Seconds until `request`, if it arrived now, would have its first token; None if the policy forecasts nothing. Only
        requests taken after the first call count. One that is taken and has not arrived counts as one more like this one.
        """
        if self._forecast is None:
            self._forecast = self._forecaster()
        if self._forecast is None:
            return None
        before = request.lookup  # of another replica's cache
        request.lookup = (-1, request.root, 0)
        seconds = self._forecast.seconds(request, self.scheduler.ledger.pool.look(request))
        request.lookup = before
        return seconds * (1 + len(self._coming))

    def _forecaster(self) -> Forecast | None:
        policy = self.scheduler.policy
        return Forecast(policy) if isinstance(policy, Forecasting) else None

    def take(self, request: Request) -> None:
        """Take a request with a `Script`; it comes in at its arrival. This must not be before the arrivals of requests taken
        earlier, nor before the moment up to which the replica has run. The replica may run up to it.
        """
        self._coming.append(request)
        if len(self._coming) > TOGETHER:
            self.run(request.arrival)

    def drop(self, id: str, now: float) -> None:
        """The client of a request leaves. Nothing happens if the request has ended, or was never here."""
        self._leaving.append(id)
        self._reschedule(now)

    def hold(self, id: str) -> None:
        """Give a request that goes on elsewhere no more work. It keeps its KV until it is released."""
        transfer.hold(self.scheduler.ledger, id)

    def release(self, id: str, now: float) -> None:
        """A held request goes on elsewhere and leaves its KV."""
        transfer.release(self.scheduler.ledger, id)
        self._reschedule(now)

    def expect(self, request: Request, now: float, cut: int | None = None) -> None:
        """Queue a request whose prompt is computed elsewhere. It goes on here once `admit` has reserved blocks."""
        transfer.expect(self.scheduler.ledger, request, cut)
        if not self.scheduler.ledger.adapters.ready(request):
            self._reschedule(now)

    def num_free(self, now: float) -> int:
        """Free KV blocks at `now`."""
        return self.scheduler.ledger.pool.num_free - self._owed(now)

    def admit(self, now: float, *, ahead: bool = False) -> Request | None:
        """Reserve blocks for the first expected request. None if there is no room, or if none is expected. For `ahead` see
        `core.transfer.admit`."""
        ledger = self.scheduler.ledger
        request = transfer.admit(ledger, ahead=ahead, owed=self._owed(now)) if ledger.expected else None
        if request is not None and self._stretch is not None:  # less room for what was foreseen
            steps = bisect_left(self._moments, self.due, 1)
            self.due = self._moments[bisect_right(range(1, steps + 1), ledger.pool.num_free, key=self._stretch.taken)]
        return request

    def _owed(self, now: float) -> int:
        """Free KV blocks that iterations which were planned by `now` have taken, but for the leap that they are part of."""
        return 0 if self._stretch is None else self._stretch.taken(bisect_left(self._moments, now, 1))

    def forgo(self, id: str, now: float) -> None:
        """An expected request will not come. Free its blocks."""
        self.scheduler.abort(id)
        self._reschedule(now)

    def deliver(self, request: Request, token: int, now: float) -> None:
        """The KV of an admitted request is here, and its first token."""
        self._arrived.append(request)
        if transfer.deliver(self.scheduler.ledger, request, token, now) is not None:
            self._gone.append(request)
            self._end(request, now)
        self._reschedule(now)

    def resume(self, request: Request, computed: int, stream: Request | None, now: float) -> None:
        """The KV of the first `computed` tokens of an admitted request is here. `stream`: as in `core.transfer.resume`."""
        transfer.resume(self.scheduler.ledger, request, computed, stream)
        self._reschedule(now)

    def enter(self, request: Request, now: float) -> None:
        """Take a request that arrived earlier, and comes in now."""
        self._unsubmitted.append(request)
        self._reschedule(now)

    def run(self, until: float) -> None:
        """Go on to just before `until`."""
        coming = self._coming
        while coming and coming[0].arrival < until:
            request = coming.popleft()
            while self.due < request.arrival:
                self._wake()
            self._arrive(request)
        while self.due < until:
            self._wake()

    def _arrive(self, request: Request) -> None:
        """Forecast its first token, as a server does at once. Refuse it for that, or let the scheduler have it at its next plan."""
        if self._forecast is not None:
            cached = self.scheduler.ledger.pool.look(request)
            if not self._serve_late and self._forecast.late(request, cached) is not None:
                request.finish_reason = "refused"
                self._end(request, request.arrival)
                return
            self._forecast.enter(request, cached)
        self._unsubmitted.append(request)
        self._reschedule(request.arrival)

    def _wake(self) -> None:
        """Go on at `due`: complete the iterations that have ended, submit arrivals, abort departures, and begin iterations."""
        now = self.due
        if self._stretch is not None:
            self._land(self._stretch)
        elif self._out:
            self._complete()
        for request in self._unsubmitted:
            self.scheduler.submit(request)
        self._arrived += self._unsubmitted
        self._unsubmitted = []
        for id in self._leaving:
            gone = self.scheduler.abort(id)
            if gone is not None:
                self._end(gone, now)
                self._gone.append(gone)
        self._leaving.clear()
        self._load(now)
        if self._steady:
            self._plan_stretch(now)
        else:
            self._plan(now)

    def _reschedule(self, now: float) -> None:
        """Set `due` after an event: to the end of the iteration that runs, or to `now` if none does."""
        if self._stretch is not None:
            self.due = self._moments[bisect_left(self._moments, now, 1)]
        elif not self._out:
            self.due = max(now, self._ready)

    def _plan(self, now: float) -> None:
        scheduler = self.scheduler
        while len(self._out) < scheduler.ledger.capacity.depth and (plan := scheduler.schedule(now)).work:
            self._launch(plan)
        coming = max(self._loads[0][0], self._ready) if self._loads else inf
        self.due = self._out[0][2] + self._between_s if self._out else coming

    def _load(self, now: float) -> None:
        """Use the adapters that are here by now, and let others come that find room."""
        ledger, loads = self.scheduler.ledger, self._loads
        before = len(self._loaded)
        while loads and loads[0][0] <= now:
            t, adapter = loads.popleft()
            ledger.adapters.loaded(adapter.key)
            self._loaded.append(Loaded(adapter.key, adapter.rank, len(adapter.blocks), t - self._load_s(adapter), now))
        while (wanted := ledger.adapters.next(ledger.spare)) is not None:
            loads.append((max(now, loads[-1][0] if loads else now) + self._load_s(wanted), wanted))
        ledger.adapters.evicted.clear()
        if len(self._loaded) > before:
            self._on_load(now)

    def _launch(self, plan: Plan) -> None:
        """Run a plan through the stages. Each begins when the stage before it has ended this plan, and itself its last plan."""
        seconds = self._cost.seconds(plan.shape)
        if self._draft_s:
            seconds += self._draft_s * max([w.count - 1 for w in plan.work if w.decode], default=0)
        if self._slowness is not None:
            seconds *= self._slowness(plan.now)
        share = seconds / len(self._free)
        start = end = max(plan.now, self._free[0])
        idle = 0.0 if self._out else max(0.0, plan.now - self._free[-1])  # there was nothing to do
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
            id = w.id
            request = requests.get(id)
            if request is not None:  # else its client has left
                script: Script = request.sampling  # type: ignore[assignment]
                answer, line, _ = script
                if line.scheduled is None:
                    line.scheduled = start
                if w.samples:
                    position = len(request.output)
                    if w.count == 1 or not w.decode:
                        tokens[id] = (answer[position],)
                        line.tokens.append(end)
                    else:
                        tokens[id] = w.verified(answer[position : position + w.count])
                        line.tokens += [end] * len(tokens[id])
        result = StepResult(plan.step, tokens, end - start, bubble_s=bubble_s)
        done, dropped = scheduler.complete(plan, result, end)
        if self._forecast is not None:
            for id in tokens:
                self._forecast.leave(id)
        self.iterations += 1
        self._ready = end + self._between_s
        for request in done:
            self._end(request, end)
        self._completed(plan, end)
        self._freed(end)
        if self._record is not None:
            times = (plan.now, start, end)
            gone, loaded = [*self._gone, *done], self._loaded
            self._record(StepRecord.of(plan, result, scheduler.ledger, times, self._arrived, gone, dropped=dropped, loaded=loaded))
        self._arrived, self._gone, self._loaded = [], [], []

    def _plan_stretch(self, now: float) -> None:
        stretch = Stretch(self.scheduler, now, self._leap)
        self.due = inf
        if not stretch.draft.work:
            return
        # Who was first in the queue kept expected requests out; at the end of this iteration, they may have room.
        steps = 1 if stretch.draft.admitted and self.scheduler.ledger.expected else stretch.most
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
        """Seconds of each iteration of the stretch, and of iterations after it without end."""
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
        """Complete the iterations of the stretch that were planned before `due`."""
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
            script: Script = request.sampling  # type: ignore[assignment]  # no call: this runs for every stream of every leap
            answer, line, _ = script
            position = len(request.output)
            tokens.append(answer[position : position + steps])
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
        self._freed(ends[-1])
        if self._record is not None:
            self._write(stretch, moments, ends, before, done)
        self._arrived, self._gone = [], []

    def _write(
        self, stretch: Stretch, moments: Sequence[float], ends: Sequence[float], before: tuple[int, int], done: Sequence[Request]
    ) -> None:
        """Write the records of the stretch's iterations. `before`: the running requests and free KV blocks before the leap."""
        draft, chunks, steps = stretch.draft, stretch.draft.chunks, len(ends)
        running, free = before
        sampling = set(stretch.sampling)
        for number, (begin, end) in enumerate(zip(moments, ends, strict=True)):
            first, last = number == 0, number == steps - 1
            free -= 0 if first else stretch.grown[number]
            later = steps - number
            work = tuple(
                Work(r.id, r.num_computed - later * count, count, r in sampling, r not in chunks, (), (), None, "", (), ())
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
        if self._forecast is not None:
            self._forecast.leave(request.id)
        line = _script(request).line
        line.finished, line.reason = t, request.finish_reason
        if line.scheduled is not None:
            line.cached = min(request.num_cached, len(request.prompt))
        self._ended(request)


def _script(request: Request) -> Script:
    return cast(Script, request.sampling)
