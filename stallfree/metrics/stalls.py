"""Finds the decode tokens that were stalled or late, in which iteration, why, and whose prefill was the cause.

It takes records one by one, so it serves a file and a live server alike. It knows no clock and draws nothing.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from stallfree.core.record import Arrived, Delivered, StepRecord
from stallfree.core.slo import Slo, Target
from stallfree.metrics.tenants import Tenants

Kind = Literal["left out", "late"]
Cause = Literal["prefill", "decodes", "left out", "preempted", "unexpected"]

NEVER = float("inf")
TARGETS = ("ttft", "tbt", "tpot", "ttlt")
CAUSES: tuple[str, ...] = get_args(Cause)
LONG_WAIT_S = 10.0
"""Seconds from which on a wait for a first token is long, without a target for TTFT or TTLT: a person's attention stays with a
dialogue for so long (Nielsen, Usability Engineering, 1993, section 5.5)."""
FAIR_SHARE = 0.9
"""Share of the time between two tokens that an iteration may take if its policy set no limit; the rest is for all else."""


class Iteration(NamedTuple):
    """An iteration's work: `seconds` on the executor, the number of `decodes`, and (id, tokens) of its prefills, largest first."""

    step: int
    seconds: float
    decodes: int
    prefills: tuple[tuple[str, int], ...]


class Stall(NamedTuple):
    """A ready decode that iteration `step` left out, or a token that came late in it, at `t` (s, the run's).

    `gap_s`: seconds since the request's last token; if that is not in the records, a lower bound. `late_s`: seconds after the token
    was due; 0 for a decode left out, which may still be in time. `blamed`: the iteration at fault, `step` itself or an earlier one.

    `cause` of a decode left out: "prefill" if other prompts were computed instead, else "left out". Of a late token: "preempted" or
    "left out" since the token before; "prefill" or "decodes" if the iteration was too long, by its work; "unexpected" if the time
    passed between two iterations.
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
        """(id, tokens) of the prefills in the blamed iteration, largest first; empty if prefill is not the cause."""
        return () if self.cause in ("decodes", "unexpected", "preempted") else self.blamed.prefills

    def words(self, name: Callable[[str], str] = str) -> str:
        """The cause in words. `name` turns a request's id into its name."""
        step, seconds, decodes, prefills = self.blamed
        work = [f"{decodes} decode{'s' * (decodes != 1)}"] if decodes else []
        if prefills:
            others = f" and {len(prefills) - 1} more" if len(prefills) > 1 else ""
            tokens = sum(count for _, count in prefills)
            work.append(f"{tokens} prefill token{'s' * (tokens != 1)} of {name(prefills[0][0])}{others}")
        took = f"{seconds * 1e3:.0f} ms for {' and '.join(work) or 'nothing'}"
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
    """A first token that came later than the target for TTFT, or without one for TTLT, or without both than `LONG_WAIT_S`. It came
    in iteration `step`, at `t` (s, the run's), `seconds` after the request `id` arrived. Of the `iterations` in between, `unserved`
    held no prefill at all; `reason`: the policy's reason for the last of these.
    """

    step: int
    t: float
    id: str
    seconds: float
    iterations: int
    unserved: int
    reason: str

    def words(self) -> str:
        """The reason of the wait, in words."""
        if not self.unserved:
            return f"in all of the {self.iterations} iterations until then, others or a part of it got prefill"
        return f"{self.unserved} of the {self.iterations} iterations until then held no prefill at all; the last: {self.reason}"


class Ended(NamedTuple):
    """A request that ended at `t`, with the times (s, the run's) of its `arrival`, when it was first `scheduled`, and of its
    `first` and `last` token (None if that never happened). `in_time`: whether it met its targets: the first token was in time, the
    last one too, and no more of the others were late than the target's percentile allows; None without a target. `judged_tokens`:
    those with a deadline, of which `late_tokens` were late. `tenant`, `service_class`: "" for none.
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
    judged_tokens: int = 0
    tenant: str = ""
    service_class: str = ""

    @property
    def tpot(self) -> float | None:
        """Mean seconds between its tokens; None if it has fewer than two."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)


class _Stream:
    """A request: `target_s`, its target for seconds between tokens; when its `last` token came, and when the next one is `due`.
    `met`: how many iterations there had been when it arrived, and how many of them had no prefill."""

    __slots__ = (
        "arrival", "blame", "cached", "due", "envelope", "first", "last", "late", "late_first", "late_share", "long_s", "met",
        "predicted", "preemptions", "prompt_tokens", "scheduled", "service_class", "target_s", "tokens", "ttft", "ttft_s", "ttlt",
        "waited",
    )  # fmt: skip

    def __init__(self, request: Arrived, slo: Slo, met: tuple[int, int]):
        between = slo.tbt or slo.tpot
        self.met = met
        self.arrival = request.arrival
        self.prompt_tokens = request.prompt_tokens
        self.service_class = ""
        self.predicted: float | None = None
        self.ttft, self.ttlt = slo.ttft, slo.ttlt
        wanted = slo.ttft or slo.ttlt
        self.long_s = LONG_WAIT_S if wanted is None else wanted.seconds
        self.late_share = 1.0 if between is None else between.late_share
        self.scheduled: float | None = None
        self.first: float | None = None
        self.cached = self.tokens = self.late = self.preemptions = 0
        self.late_first = False
        self.target_s = NEVER if between is None else between.seconds
        self.envelope = slo.tpot is not None
        self.ttft_s = _seconds(slo.ttft)
        self.last: float | None = None
        self.due = NEVER
        self.waited: tuple[Cause, Iteration] | None = None
        self.blame: tuple[Cause, Iteration] | None = None


class StallAccount:
    """Judges records in their order, by `slo` and by the requests' own targets. Without any target nothing is late.

    Under `tbt` a token is due that long after the one before. Under `tpot` token i is due i times that after the first token was
    due or came, whichever is later. Under `ttlt` only the last token is judged. Ids that did not arrive, such as those of aborted
    requests still in flight, are not judged.

    Of the latest record: `stalls`. `iteration`: its work. `gaps`: the TBT of its decode tokens, and `ttfts`, both in seconds. `due`
    and `late`: by target, how many tokens had a deadline, and missed it. `first_late_s`: the total lateness of first tokens.
    `slack`: seconds from planning until its first decode was due (None if none was). `looked_up`: prompt and output tokens of
    admitted requests, looked up in the prefix cache, and how many were `found`; `lookups`: both, by tenant; "" has those of
    requests without one. `ended`: the requests that ended. `waits`: first tokens with long waits. `forecasts`: of each first token
    that was forecast, actual over predicted seconds. `served`: see `Tenants.served`.

    Of all records so far: `waiting`, the arrivals of requests that have no first token, in order; and `tenants`.
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
        self.looked_up = self.found = 0
        self.lookups: dict[str, tuple[int, int]] = {}
        self.waits: list[Wait] = []
        self.forecasts: list[float] = []
        self.served: dict[str, int] = {}
        self.waiting: dict[str, float] = {}
        self.tenants = Tenants()
        self._counts = 0, 0
        self._unserved = ""
        self._slo = slo or Slo()
        self._streams: dict[str, _Stream] = {}

    @property
    def oldest(self) -> tuple[str, float] | None:
        """The id and arrival of the first request in `waiting`; None if none waits."""
        return next(iter(self.waiting.items()), None)

    def record(self, step: StepRecord) -> list[Stall]:
        """Judge one iteration. Returns its stalls."""
        stalls = self.stalls = []
        self.waits, self.forecasts = [], []
        self._meet(step)
        self.iteration = self._iteration(step)
        self._count(step)
        self.served = self.tenants.served(step)
        gaps = self.gaps = []
        self.ttfts = []
        self.first_late_s = 0.0
        streams, t = self._streams, step.t_end
        self.due, self.late = dict.fromkeys(TARGETS, 0), dict.fromkeys(TARGETS, 0)
        earliest = NEVER
        reached: dict[str, int] = {}
        self.looked_up, self.found, self.lookups = 0, 0, {}
        for id, t_shown in step.sampled_elsewhere:
            if id in streams:
                self._from_elsewhere(id, streams[id], t_shown)
        for transfer in step.delivered:
            if transfer.id in streams:
                self._deliver(transfer, streams[transfer.id])
        for id, cached in step.cached:
            if id in streams:
                admitted = streams[id]
                self._look_up(id, admitted.prompt_tokens + admitted.tokens, cached)
                if admitted.scheduled is None:
                    admitted.scheduled, admitted.cached = step.t_start, cached
        admitted_now = {id for id, _ in step.cached} if step.restored else set()
        for id, tokens in step.restored:
            if id in streams and id not in admitted_now:  # more of its prefix came back
                self._look_up(id, 0, tokens)
                streams[id].cached += tokens
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
                stream.due = (stream.due if stream.envelope else t) + stream.target_s
            stream.last, stream.waited = t, None
        self.slack = None if earliest == NEVER else earliest - step.t_plan
        self.ended = [self._end(id, reason, t) for id, reason, _ in step.finished if id in streams]
        return stalls

    def _meet(self, step: StepRecord) -> None:
        for request in step.arrived:
            slo = Slo.parse(request.slo).within(self._slo) if request.slo else self._slo
            self._streams[request.id] = _Stream(request, slo, self._counts)
            self.waiting[request.id] = request.arrival
        self.tenants.arrive(step)
        for id, service_class in step.classes:
            self._streams[id].service_class = service_class
        for id, predicted in step.predicted:
            self._streams[id].predicted = predicted

    def _count(self, step: StepRecord) -> None:
        iterations, unserved = self._counts
        if not self.iteration.prefills:
            self._unserved = step.reason
        self._counts = iterations + 1, unserved + (not self.iteration.prefills)

    def _iteration(self, step: StepRecord) -> Iteration:
        """A decode is one token after the prompt, perhaps with drafts, or one of a request that has ended. All else is prefill,
        also tokens that are computed again after a preemption."""
        prefills: list[tuple[str, int]] = []
        streams, drafted = self._streams, {id for id, _ in step.drafted}
        for id, start, count in step.work:
            if (count > 1 and id not in drafted) or ((stream := streams.get(id)) is not None and start < stream.prompt_tokens):
                prefills.append((id, count))
        prefills.sort(key=lambda prefill: -prefill[1])
        return Iteration(step.step, step.t_end - step.t_start, len(step.work) - len(prefills), tuple(prefills))

    def _begin(self, id: str, stream: _Stream, t: float, reached: int | None) -> None:
        """The first token in the records, sampled after `reached` tokens; the request's first if these are its whole prompt."""
        stream.first = t
        self.waiting.pop(id, None)
        self.tenants.answer(id)
        if reached == stream.prompt_tokens:
            ttft = t - stream.arrival
            self.ttfts.append(ttft)
            if stream.predicted:
                self.forecasts.append(ttft / stream.predicted)
            if ttft > stream.long_s:
                iterations, unserved = (now - then for now, then in zip(self._counts, stream.met, strict=True))
                self.waits.append(Wait(self.iteration.step, t, id, ttft, iterations, unserved, self._unserved))
            if stream.ttft is not None:
                self.due["ttft"] += 1
                if ttft > stream.ttft.seconds:
                    stream.late_first = True
                    self.late["ttft"] += 1
                    self.first_late_s += ttft - stream.ttft.seconds
        stream.due = (max(stream.arrival + stream.ttft_s, t) if stream.envelope else t) + stream.target_s

    def _deliver(self, transfer: Delivered, stream: _Stream) -> None:
        stream.scheduled, stream.cached = transfer.asked, transfer.cached
        self._look_up(transfer.id, stream.prompt_tokens, transfer.cached)

    def _from_elsewhere(self, id: str, stream: _Stream, t: float) -> None:
        """A token that another engine sampled came at `t`. If it is late, no iteration here is the reason."""
        stream.tokens += 1
        if stream.last is None:
            stream.scheduled = t  # until it is known when it was asked for
            self._begin(id, stream, t, stream.prompt_tokens)
        else:
            pace = "tpot" if stream.envelope else "tbt"
            self.gaps.append(t - stream.last)
            self.due[pace] += stream.due < NEVER
            if t > stream.due:
                stream.late += 1
                self.late[pace] += 1
                late_s = t - stream.due
                self.stalls.append(Stall(self.iteration.step, t, id, "late", "unexpected", t - stream.last, late_s, self.iteration))
            stream.due = (stream.due if stream.envelope else t) + stream.target_s
        stream.last = t

    def _look_up(self, id: str, tokens: int, found: int) -> None:
        """`tokens` of a request were looked up in the prefix cache, and `found` of them were there."""
        self.looked_up += tokens
        self.found += found
        tenant = self.tenants.of(id)
        before = self.lookups.get(tenant, (0, 0))
        self.lookups[tenant] = before[0] + tokens, before[1] + found

    def _end(self, id: str, reason: str, t: float) -> Ended:
        stream = self._streams.pop(id)
        self.waiting.pop(id, None)
        tenant = self.tenants.end(id)
        if reason not in ("abort", "error") and stream.last is not None:
            t = stream.last  # before the iteration's end, if a KV transfer delivered the last token
        in_time, judged = None, max(0, stream.tokens - 1) if stream.target_s < NEVER else 0
        if stream.ttft is not None or stream.target_s < NEVER:
            in_time = not stream.late_first and stream.late <= stream.late_share * max(0, stream.tokens - 1)
        if stream.ttlt is not None and reason != "abort":
            late = reason == "error" or t - stream.arrival > stream.ttlt.seconds
            self.due["ttlt"] += 1
            self.late["ttlt"] += late
            in_time = in_time is not False and not late
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
            judged,
            tenant,
            stream.service_class,
        )

    def _left_out(self, step: StepRecord, id: str, stream: _Stream) -> Stall:
        now = self.iteration
        if stream.waited is None or (stream.waited[0] == "left out" and stream.waited[1].seconds < now.seconds):
            stream.waited = ("left out", now)
        cause: Cause = "prefill" if now.prefills else "left out"
        since = step.t_plan if stream.last is None else stream.last
        return Stall(step.step, step.t_end, id, "left out", cause, step.t_end - since, 0.0, now)

    def _late(self, step: StepRecord, id: str, stream: _Stream, gap_s: float) -> Stall:
        if stream.blame is None or gap_s > stream.target_s:  # else an earlier step made it late for its envelope
            stream.blame = stream.waited or (self._fault(step, stream), self.iteration)
        cause, blamed = stream.blame
        return Stall(step.step, step.t_end, id, "late", cause, gap_s, step.t_end - stream.due, blamed)

    def _fault(self, step: StepRecord, stream: _Stream) -> Cause:
        allowed = FAIR_SHARE * stream.target_s if step.limit_s is None else min(stream.target_s, step.limit_s)
        if self.iteration.seconds <= allowed:
            return "unexpected"
        return "prefill" if self.iteration.prefills else "decodes"


def _seconds(target: Target | None) -> float:
    return 0.0 if target is None else target.seconds
