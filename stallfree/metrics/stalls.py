"""Which decode tokens were stalled or late, in which iteration, why, and whose prefill was in the way.

It is fed records one by one, so it serves a file and a live server alike. It knows no clock and draws nothing.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

from stallfree.core.record import Arrived, Delivered, StepRecord
from stallfree.core.slo import Slo, Target

Kind = Literal["left out", "late"]
Cause = Literal["prefill", "decodes", "left out", "preempted", "unexpected"]

NEVER = float("inf")
TARGETS = ("ttft", "tbt", "tpot")
CAUSES: tuple[str, ...] = get_args(Cause)
LONG_WAIT_S = 10.0
"""Without a target for TTFT a first token is waited for long from so many seconds on: as long as a person's attention stays with a
dialogue (Nielsen, Usability Engineering, 1993, section 5.5)."""
FAIR_SHARE = 0.9
"""Of the time between two tokens, what an iteration may take whose policy set it no limit; the rest is for all else."""


class Iteration(NamedTuple):
    """What an iteration did: its `seconds` on the executor, how many `decodes`, and (id, tokens) of its prefills, largest first."""

    step: int
    seconds: float
    decodes: int
    prefills: tuple[tuple[str, int], ...]


class Stall(NamedTuple):
    """A ready decode that iteration `step` left out, or a token that came late in it, at `t` (s, the run's).

    `gap_s`: since the request's token before, or at least that if its time is not in the records. `late_s`: after the token was
    due; 0 for one left out, which may still be in time. `blamed`: the iteration at fault, `step` itself or one before it.

    `cause` of one left out: "prefill" if others' prompts were computed instead, else "left out". Of one late: "preempted" or
    "left out" since the token before; "prefill" or "decodes" if the iteration was too long, by what it held; "unexpected" if
    it was not, and the time went by between two iterations.
    """

    step: int
    t: float
    id: str
    kind: Kind
    cause: Cause
    gap_s: float
    late_s: float
    blamed: Iteration

    @property
    def culprits(self) -> tuple[tuple[str, int], ...]:
        """(id, tokens) of the prefills in the blamed iteration, the largest first; none where no prefill is the cause."""
        return () if self.cause in ("decodes", "unexpected", "preempted") else self.blamed.prefills

    def words(self, name: Callable[[str], str] = str) -> str:
        """The cause in words; `name` makes a request's name of its id."""
        step, seconds, decodes, prefills = self.blamed
        held = [f"{decodes} decode{'s' * (decodes != 1)}"] if decodes else []
        if prefills:
            others = f" and {len(prefills) - 1} more" if len(prefills) > 1 else ""
            tokens = sum(count for _, count in prefills)
            held.append(f"{tokens} prefill token{'s' * (tokens != 1)} of {name(prefills[0][0])}{others}")
        took = f"{seconds * 1e3:.0f} ms for {' and '.join(held) or 'nothing'}"
        match self.cause:
            case "preempted":
                return f"preempted in step {step}; its KV was computed again"
            case "unexpected":
                return f"step {step} took only {took}; the rest of the time passed between iterations"
            case "prefill" | "decodes" if self.kind == "late":
                return f"step {step} took {took}"
            case _:
                return f"left out of step {step}, which took {took}"


class Wait(NamedTuple):
    """A first token that was waited for longer than the target for TTFT, or than `LONG_WAIT_S` without one. It came in iteration
    `step`, at `t` (s, the run's), `seconds` after the request `id` had arrived. Of the `iterations` in between, `unserved` held no
    prefill of anybody; `reason`: what the policy said of the last one of these.
    """

    step: int
    t: float
    id: str
    seconds: float
    iterations: int
    unserved: int
    reason: str

    def words(self) -> str:
        """What kept it waiting."""
        if not self.unserved:
            return f"in all of the {self.iterations} iterations until then, others or a part of it got prefill"
        return f"{self.unserved} of the {self.iterations} iterations until then held no prefill at all; the last: {self.reason}"


class Ended(NamedTuple):
    """A request that ended at `t`, in the run's seconds: its `arrival`, when it was first `scheduled`, when its `first` and its
    `last` token came (None for what never did). `in_time`: whether it met its targets: the first token came in time, and of the
    others no greater share was late than the target's percentile leaves; None without a target.
    """

    id: str
    reason: str
    t: float
    arrival: float
    scheduled: float | None
    first: float | None
    last: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    late_tokens: int
    preemptions: int
    in_time: bool | None

    @property
    def tpot(self) -> float | None:
        """Mean seconds between its tokens; None if it has fewer than two."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)


class _Stream:
    """A request: the `pace` (s) it was promised, when its `last` token came, and when its next one is `due`. `met`: how many
    iterations there had been when it arrived, and how many of these without prefill."""

    __slots__ = (
        "arrival", "blame", "cached", "due", "envelope", "first", "last", "late", "late_first", "late_share", "met", "pace",
        "preemptions", "prompt_tokens", "scheduled", "tokens", "ttft", "ttft_s", "waited",
    )  # fmt: skip

    def __init__(self, request: Arrived, slo: Slo, met: tuple[int, int]):
        pace = slo.tbt or slo.tpot
        self.met = met
        self.arrival = request.arrival
        self.prompt_tokens = request.prompt_tokens
        self.ttft = slo.ttft
        self.late_share = 1.0 if pace is None else pace.late_share
        self.scheduled: float | None = None
        self.first: float | None = None
        self.cached = self.tokens = self.late = self.preemptions = 0
        self.late_first = False
        self.pace = NEVER if pace is None else pace.seconds
        self.envelope = slo.tpot is not None
        self.ttft_s = _seconds(slo.ttft)
        self.last: float | None = None
        self.due = NEVER
        self.waited: tuple[Cause, Iteration] | None = None
        self.blame: tuple[Cause, Iteration] | None = None


class StallAccount:
    """Judges records in their order by `slo`, and by what requests asked for themselves; with neither, nothing is late.

    Under `tbt` a token is due that long after the one before; under `tpot` token i is due i times that after the first one was
    due or came, whichever is later. Ids that did not arrive, such as those of aborted requests still in flight, are not judged.

    Of the latest record: `stalls`; `iteration`, what it did; `gaps`, the TBT of the decode tokens in it, and `ttfts`, both in
    seconds; `due` and `late`, how many tokens had a deadline by each of the targets, and missed it; `first_late_s`, the lateness
    of the first tokens among those, all together; `slack`, seconds from planning until the first of its decodes was due (None if
    none was); `looked_up`, tokens of the requests admitted, looked for in the prefix cache; `ended`, the requests that ended;
    `waits`, the first tokens in it that were waited for long; `waiting`, the arrivals of requests without a first token, in the
    order in which they came.
    """

    def __init__(self, slo: Slo | None = None):
        self.iteration = Iteration(-1, 0.0, 0, ())
        self.gaps: list[float] = []
        self.ttfts: list[float] = []
        self.due = self.late = dict.fromkeys(TARGETS, 0)
        self.first_late_s = 0.0
        self.slack: float | None = None
        self.stalls: list[Stall] = []
        self.ended: list[Ended] = []
        self.looked_up = 0
        self.waits: list[Wait] = []
        self.waiting: dict[str, float] = {}
        self._counts = 0, 0
        self._unserved = ""
        self._slo = slo or Slo()
        self._streams: dict[str, _Stream] = {}

    @property
    def oldest(self) -> tuple[str, float] | None:
        """The id and the arrival of the first request in `waiting`."""
        return next(iter(self.waiting.items()), None)

    def record(self, step: StepRecord) -> list[Stall]:
        """The stalls of one iteration."""
        stalls = self.stalls = []
        self.waits = []
        self._meet(step.arrived)
        self.iteration = self._iteration(step)
        self._count(step)
        gaps = self.gaps = []
        self.ttfts = []
        self.first_late_s = 0.0
        streams, t = self._streams, step.t_end
        self.due, self.late = dict.fromkeys(TARGETS, 0), dict.fromkeys(TARGETS, 0)
        earliest = NEVER
        reached: dict[str, int] = {}
        self.looked_up = 0
        for came in step.delivered:
            if came.id in streams:
                self._deliver(came, streams[came.id])
        for id, found in step.cached:
            if id in streams:
                admitted = streams[id]
                self.looked_up += admitted.prompt_tokens + admitted.tokens
                if admitted.scheduled is None:
                    admitted.scheduled, admitted.cached = step.t_start, found
        for id in step.preempted:
            if id in streams:
                streams[id].waited = ("preempted", self.iteration)
                streams[id].preemptions += 1
        for id in step.stalled:
            if id in streams:
                earliest = min(earliest, streams[id].due)
                stalls.append(self._left_out(step, id, streams[id]))
        for id in step.emitted:
            stream = streams.get(id)
            if stream is None:
                continue
            stream.tokens += 1
            if stream.last is None:
                reached = reached or {id: start + count for id, start, count in step.work}
                self._begin(id, stream, t, reached.get(id))
            else:
                gaps.append(t - stream.last)
                due = stream.due
                if due < NEVER:
                    self.due["tpot" if stream.envelope else "tbt"] += 1
                    if due < earliest:
                        earliest = due
                if t > due:
                    stream.late += 1
                    self.late["tpot" if stream.envelope else "tbt"] += 1
                    stalls.append(self._late(step, id, stream, t - stream.last))
                stream.due = (stream.due if stream.envelope else t) + stream.pace
            stream.last, stream.waited = t, None
        self.slack = None if earliest == NEVER else earliest - step.t_plan
        self.ended = [self._end(id, reason, t) for id, reason, _ in step.finished if id in streams]
        return stalls

    def _meet(self, requests: Iterable[Arrived]) -> None:
        for request in requests:
            slo = Slo.parse(request.slo).within(self._slo) if request.slo else self._slo
            self._streams[request.id] = _Stream(request, slo, self._counts)
            self.waiting[request.id] = request.arrival

    def _count(self, step: StepRecord) -> None:
        iterations, unserved = self._counts
        if not self.iteration.prefills:
            self._unserved = step.reason
        self._counts = iterations + 1, unserved + (not self.iteration.prefills)

    def _iteration(self, step: StepRecord) -> Iteration:
        """A decode is one token behind the prompt, or of one that had ended meanwhile; all else is prefill, what is computed again
        after a preemption included."""
        prefills: list[tuple[str, int]] = []
        streams = self._streams
        for id, start, count in step.work:
            if count > 1 or ((stream := streams.get(id)) is not None and start < stream.prompt_tokens):
                prefills.append((id, count))
        prefills.sort(key=lambda prefill: -prefill[1])
        return Iteration(step.step, step.t_end - step.t_start, len(step.work) - len(prefills), tuple(prefills))

    def _begin(self, id: str, stream: _Stream, t: float, reached: int | None) -> None:
        """The first token seen, sampled behind the token `reached`; the request's first if that was the prompt's last."""
        stream.first = t
        self.waiting.pop(id, None)
        if reached == stream.prompt_tokens:
            ttft = t - stream.arrival
            self.ttfts.append(ttft)
            if ttft > (LONG_WAIT_S if stream.ttft is None else stream.ttft.seconds):
                iterations, unserved = (now - then for now, then in zip(self._counts, stream.met, strict=True))
                self.waits.append(Wait(self.iteration.step, t, id, ttft, iterations, unserved, self._unserved))
            if stream.ttft is not None:
                self.due["ttft"] += 1
                if ttft > stream.ttft.seconds:
                    stream.late_first = True
                    self.late["ttft"] += 1
                    self.first_late_s += ttft - stream.ttft.seconds
        stream.due = (max(stream.arrival + stream.ttft_s, t) if stream.envelope else t) + stream.pace

    def _deliver(self, came: Delivered, stream: _Stream) -> None:
        stream.scheduled, stream.cached, stream.tokens = came.asked, came.cached, 1
        self.looked_up += stream.prompt_tokens
        self._begin(came.id, stream, came.t, stream.prompt_tokens)
        stream.last = came.t

    def _end(self, id: str, reason: str, t: float) -> Ended:
        stream = self._streams.pop(id)
        self.waiting.pop(id, None)
        if reason not in ("abort", "error") and stream.last is not None:
            t = stream.last  # an earlier one than the iteration's, if a token that was delivered was the last
        in_time = None
        if stream.ttft is not None or stream.pace < NEVER:
            in_time = not stream.late_first and stream.late <= stream.late_share * max(0, stream.tokens - 1)
        return Ended(
            id,
            reason,
            t,
            stream.arrival,
            stream.scheduled,
            stream.first,
            stream.last,
            stream.prompt_tokens,
            stream.cached,
            stream.tokens,
            stream.late,
            stream.preemptions,
            in_time,
        )

    def _left_out(self, step: StepRecord, id: str, stream: _Stream) -> Stall:
        now = self.iteration
        if stream.waited is None or (stream.waited[0] == "left out" and stream.waited[1].seconds < now.seconds):
            stream.waited = ("left out", now)
        cause: Cause = "prefill" if now.prefills else "left out"
        since = step.t_plan if stream.last is None else stream.last
        return Stall(step.step, step.t_end, id, "left out", cause, step.t_end - since, 0.0, now)

    def _late(self, step: StepRecord, id: str, stream: _Stream, gap_s: float) -> Stall:
        if stream.blame is None or gap_s > stream.pace:  # else it is behind its envelope since before, by no fault of this step
            stream.blame = stream.waited or (self._fault(step, stream), self.iteration)
        cause, blamed = stream.blame
        return Stall(step.step, step.t_end, id, "late", cause, gap_s, step.t_end - stream.due, blamed)

    def _fault(self, step: StepRecord, stream: _Stream) -> Cause:
        allowed = FAIR_SHARE * stream.pace if step.limit_s is None else min(stream.pace, step.limit_s)
        if self.iteration.seconds <= allowed:
            return "unexpected"
        return "prefill" if self.iteration.prefills else "decodes"


def _seconds(target: Target | None) -> float:
    return 0.0 if target is None else target.seconds
