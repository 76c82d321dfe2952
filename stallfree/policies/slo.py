"""A token budget from a latency target: prefill gets the time that is left until the earliest decode token is due. Who gets it, and
which decodes can wait, is decided by tenants' credits, priorities and deadlines.

It takes times from a cost model and from `now`, and learns from its own lateness. It does not know what runs the plans.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf
from typing import Self

from stallfree.core.draft import Draft
from stallfree.core.plan import Plan
from stallfree.core.policy import CostModel, Reserve, Setup
from stallfree.core.request import Request, Status
from stallfree.core.slo import Slo as Targets
from stallfree.core.slo import Target
from stallfree.perf.fitted import Fitted
from stallfree.perf.margin import Margin
from stallfree.qos import prices
from stallfree.qos.answers import Answers
from stallfree.qos.deadlines import Deadlines, gap
from stallfree.qos.order import Order, Prompt
from stallfree.qos.turns import Turns

STRICT = 5
"""The default target for TBT at P99, in decode iterations of `SMALL_BATCH`: the paper's strict SLO (section 5)."""
SMALL_BATCH = [(512, 1)] * 8
"""The decode iteration that is the unit of `STRICT`: so few streams hardly slow each other."""

FLOOR = 0.25
"""The floor rate of prefill, as a share of the time of the decodes alone. It holds for any margin. It makes a stream at most a
quarter slower, and a lone prompt is computed within five times its own prefill time."""

NOTABLE = 0.05
"""The default target follows the machine's speed only if this changes by more than this share."""

LEAST = 16
"""Tokens of the smallest chunk that is worth its fixed costs."""

FEW, SPARE = 4, 1.05
"""Prefill that takes at most `FEW` iterations is spread evenly over them, with 5 % to spare for wrong prices."""

FILLED = 0.95
"""A request is admitted while the running ones will not hold more than this share of the KV at once, if their answers are as long
as usual. Without this, streams lose their KV and stand still until there is room again."""

HABIT = 0.1
"""The weight of the newest iteration in `share` and `crowding`."""

WORTH, BACKLOG = 1.04, 8
"""While all prompts take less than `BACKLOG` iterations as long as the targets allow, an iteration is so long that longer ones
would not make prefill `WORTH` times as fast (docs/slo.md has what this gains)."""

EFFICIENT = 1.05
"""Without decodes, an iteration is as small as possible while its time per token is at most this times the least possible."""


def usual(cost: CostModel) -> Target:
    """The default target for TBT."""
    return Target(ceil(1000 * STRICT * cost.seconds(SMALL_BATCH)) / 1000, 99.0)


class Slo:
    """`slo`: the targets, in words or parsed, completed by the default TBT. `cost` prices iterations, and learns.

    `follow`: the target for TBT grows while the machine is slower than `cost` says at first. By default, only the default target
    follows: it is a number of decode iterations, not a time that a user chose. `slack`: a stream that is early by its own target
    may sit out an iteration for the sake of others. `options`: with the targets in `slo`, these make the same policy again.

    Raises ValueError for targets that not even a lone request could meet.
    """

    reserve: Reserve = "prompt"
    stall_free = True  # for streams with equal targets
    chunks = True

    def __init__(self, slo: str | Targets = "", cost: CostModel | None = None, follow: bool | None = None, slack: bool = True):
        self.cost = cost or Fitted()
        targets = slo if isinstance(slo, Targets) else Targets.parse(slo) if slo else Targets()
        default = usual(self.cost)
        self.answers = Answers()
        self._deadlines = Deadlines(targets.within(Targets(tbt=default)), self.answers)
        self._order = Order(self.cost, self._deadlines, self.answers)
        self._turns = Turns(self.cost, self._deadlines)
        self.credits = self._order.credits
        self._follows = targets.tbt is targets.tpot is targets.ttlt is None if follow is None else follow
        self._slack = slack
        self.options = ({"follow": True} if self._follows else {}) | ({} if slack else {"slack": False})
        self._least = self.slo.tbt
        possible(self.slo, self.cost)
        between = self.slo.tbt or self.slo.tpot or default
        self.margin = Margin(between.late_share)
        self.share, self.crowding = 1.0, 0.0
        self._patience = ceil(1 / between.late_share)
        self._owed = 0.0
        self._passed = self._kept_out = 0
        self._crowded: tuple[Request, int] | None = None
        self._giving: set[Request] = set()
        self.decoding_s = 0.0

    @classmethod
    def of(cls, setup: Setup, *, follow: bool | None = None, slack: bool = True) -> Self:
        return cls(setup.targets or "", setup.cost, follow, slack)

    @property
    def slo(self) -> Targets:
        return self._deadlines.slo

    def targets(self, request: Request) -> Targets:
        return self._deadlines.targets(request)

    def first_due(self, request: Request) -> float:
        return self._deadlines.first(request)

    def turn(self, request: Request) -> tuple[bool, int, float]:
        return not self.credits.has(request.tenant), request.priority, self.credits.ahead(request.tenant)

    def plan(self, draft: Draft) -> None:
        self._order.settle(draft.running)
        wanted, margin = self._order.prompts(draft, self.share), self.margin.value
        dues = self._deadlines.nexts(draft.decoding)
        sitting: set[Request] = set()
        latest = inf
        if self._slack and dues and max(dues) - min(dues) > margin * self.decoding_s:  # nearly never: most are as urgent
            sitting, latest = self._turns.sitting(draft, dues, sum([prompt.seconds for prompt in wanted]), margin)
        giving, self._giving = self._giving, set()
        draft.decode_all(but=sitting | giving if giving else sitting)
        shape = draft.shape
        if extra := sum([r.extra_rows for r in draft.decoding]):
            shape.append((extra, 0))
        written = len(shape)
        alone = self.decoding_s = self.cost.seconds(shape) if shape or not sitting else 0.0
        if shape or sitting:
            until, first = self._until(draft, dues, alone)
            limit, least, why = self._limit(until, alone, sum([prompt.seconds for prompt in wanted]))
            limit = min(limit, latest)
            draft.limit_s, draft.margin = until, margin
            why = f"{1000 * until:.0f} ms until {first} is due, {why}"
        else:
            limit, least, why = inf, 1, "nobody decodes: as many tokens as use the machine well"
            draft.cap(self._efficient(draft.left), why)
        full, crowd = self._fill(draft, shape, [p for p in wanted if p.request not in giving], limit, least, alone)
        prefill = self.cost.seconds(shape) - alone if len(shape) > written else 0.0
        if sitting and not full:
            self._turns.join(draft, shape, sitting, limit)
        if not draft.empty:  # an empty plan is not recorded, so it must change nothing
            self._account(prefill, alone, full=full, crowded=crowd > 0)
            share = 1.0 if limit == inf else max(1 - alone / limit, FLOOR / (1 + FLOOR))
            self.share += HABIT * (share - self.share)
            kept_out = crowd > 0 or (draft.num_waiting > 0 and not full)
            self.crowding += HABIT * (kept_out - self.crowding)
        if crowd:
            why += f"; one more stream, and decodes alone would take {1000 * crowd:.0f} ms"
        if sitting:
            why += f"; {len(sitting)} streams have time and wait"
        spare = 0 if full else self.cost.room(shape, 0, draft.left, limit)
        draft.cap(draft.budget - draft.left + spare, why)

    def learn(self, plan: Plan, requests: Sequence[Request], now: float) -> None:
        shape, seconds = plan.shape, now - plan.now
        if extra := sum([r.extra_rows for r in requests]):
            shape.append((extra, 0))
        if seconds <= 0:  # the clock stood still
            return
        score = self.cost.learn(shape, seconds)
        if self._follows:
            self._follow()
        self._order.review(plan.step, requests)
        due = self._deadlines.nexts(plan.decoders(requests))
        if not due or plan.limit_s is None:
            return
        late = sum([at < now for at in due]) if min(due) < now else 0
        if late and self.margin.stood_still(score):
            alone = self.cost.seconds(plan.decodes)
            if score * alone > plan.limit_s:  # the decodes alone would have been late: no budget prevents that
                return
        withheld = self._passed > 0 or self._kept_out > 0
        self.margin.learn(now, score, late, len(due), filled=len(due) < len(requests), withheld=withheld)

    def _follow(self) -> None:
        """Set the default target by the present cost of iterations."""
        least, now = self._least, self.slo.tbt
        if least is None or now is None:
            return
        wanted = max(least.seconds, STRICT * self.cost.seconds(SMALL_BATCH))
        if abs(wanted / now.seconds - 1) > NOTABLE or wanted == least.seconds != now.seconds:
            self._deadlines.slo = replace(self.slo, tbt=replace(now, seconds=wanted))

    def _limit(self, until: float, alone: float, wanted: float) -> tuple[float, int, str]:
        """Seconds that the iteration may take by the cost model, tokens of the smallest useful chunk, and the reason. The decodes
        alone take `alone` seconds; the first of their tokens is due in `until` seconds. Prompts `wanted` so many seconds.

        The limit is `until` over the margin, so that as few tokens are late as promised. But prefill must not starve. While the
        target leaves credit, waiting requests get the seconds that they are owed, if the decodes alone are in time. They also get
        them if the decodes alone are late, because then prefill makes no further token late. After `_patience` iterations without
        prefill, a chunk may take as long as the target.

        Unless many prompts wait, no more of the limit is spent than is worth it.
        """
        margin = self.margin.value
        limit = until / margin
        if self._passed >= self._patience:
            return max(limit, alone + gap(self.slo)), 1, f"but nobody got prefill in {self._passed} iterations"
        late_anyway = alone > until or self.margin.broken
        if self._owed and (late_anyway or self.margin.credit > 0):
            most = inf if late_anyway else until
            owed = min(alone + self._owed, most)
            if owed > limit:
                least = LEAST if owed < most and self._owed < gap(self.slo) else 1
                return owed, least, f"margin {margin:.2f}; prefill is owed {1000 * self._owed:.0f} ms"
        worth = _worth(limit, alone) if wanted < BACKLOG * limit else limit
        return worth, 1, f"margin {margin:.2f}" + ("" if worth == limit else f"; more than {1000 * worth:.0f} ms would buy little")

    def _account(self, prefill: float, alone: float, *, full: bool, crowded: bool) -> None:
        """Update the seconds owed to waiting requests, and the iterations without prefill and with requests kept out. This
        iteration had `prefill` seconds of prefill; `full`: there was no time for more."""
        self._passed = 0 if prefill or not full else self._passed + 1
        self._owed = max(0.0, min(self._owed + FLOOR * alone - prefill, gap(self.slo))) if full else 0.0
        self._kept_out = self._kept_out + 1 if crowded else self._kept_out if full else 0

    def _until(self, draft: Draft, dues: Sequence[float], alone: float) -> tuple[float, str]:
        """Seconds until the first token of this iteration's decodes is due, and its request's id. `dues`: of `draft.decoding`. The
        decodes alone take `alone` seconds. If these already miss a request's own target, the server's target counts for it: one
        client's impatience must not keep others out.
        """
        alone *= self.margin.value
        least, first = inf, ""
        streams = draft.decoding
        if len(draft.work) != len(streams):
            streams = [r for r in streams if r in draft.work]
            dues = self._deadlines.nexts(streams)
        earliest = min(dues, default=inf)
        if earliest - draft.now >= alone and max(dues, default=inf) < inf:  # nearly always: nobody is late or without output
            return earliest - draft.now, streams[dues.index(earliest)].id
        for r, due in zip(streams, dues, strict=True):
            slack = due - draft.now if r.output else self._deadlines.gap(r)  # no output: its first token is in flight
            if slack < alone and r.slo is not None:
                slack = self._deadlines.next(r, self.slo) - draft.now if r.output else gap(self.slo)
            if slack < least:
                least, first = slack, r.id
        return least, first

    def _fill(
        self,
        draft: Draft,
        shape: list[tuple[int, int]],
        wanted: Sequence[Prompt],
        limit: float,
        least: int,
        alone: float,
    ) -> tuple[bool, float]:
        """Add prefill to the draft and to `shape`, of `wanted` the most urgent first. The decodes alone take `alone` seconds.

        A new request is kept out if with it the decodes alone would be too slow for the targets, because no budget helps against
        too many decodes. A lone request always comes in.

        Returns whether time or tokens were short, and the seconds that decodes would take with the request kept out (0.0: none).
        """
        streams: list[Request] = []
        admitting, overdue, crowd = True, False, 0.0
        limit = min(limit, alone + _even([prompt.seconds for prompt in wanted], limit - alone))
        rest = list(wanted)
        while rest:
            r = rest.pop(0).request
            waiting = r.status is Status.WAITING
            if waiting and not admitting:
                continue
            if waiting and not streams:  # only once a request wants to join: most iterations have no time left by then
                streams = [*draft.decoding, *draft.prefilling]
                alone += sum(self._stream(other) for other in draft.prefilling)
            if waiting and streams:
                joined = alone + self._stream(r) + self._brought(draft, r)
                patience = self._patience * (1 if self.margin.credit > 0 and joined <= gap(self.slo) else len(streams))
                overdue = self._kept_out >= patience
                if not overdue and self._too_slow(joined * self.margin.value, [*streams, r]):
                    admitting, crowd = False, joined
                    continue
            start, brought = draft.start(r), draft.brings(r)
            wanted_tokens = min(r.num_tokens - start, draft.left)
            count = self.cost.room([*shape, *brought] if brought else shape, start, wanted_tokens, limit)
            if not count and self._passed >= self._patience and not draft.chunks:
                count = min(wanted_tokens, LEAST)
            if count < min(wanted_tokens, least):
                return True, crowd
            taken = self._admit(draft, r, count, shape) if waiting else draft.prefill(r, count)
            if not taken:  # KV is short
                admitting = admitting and not waiting
                continue
            shape += [*brought, (r.num_planned - taken, taken)]
            if waiting:
                streams.append(r)
                alone += self._stream(r)
                rest = self._order.again(draft, rest, r, self.share)
                if overdue:
                    overdue, self._kept_out = False, 0
            if r.remaining and taken == count:
                return True, crowd
        return False, crowd

    def _admit(self, draft: Draft, r: Request, count: int, shape: list[tuple[int, int]]) -> int:
        """Admit a request if there is room for it, or if less important ones make room; then this updates `shape`. vLLM keeps its
        own accounts of KV.
        """
        if not draft.lanes:
            return draft.admit(r, count)
        most, state = FILLED * draft.kv_tokens, (r, len(draft.running))
        crowded = draft.full or self._crowded == state
        if not crowded and draft.running and self._peak([*draft.running, r]) > most:
            self._crowded, crowded = state, True  # until a request has ended, this need not be asked again
        taken = 0 if crowded else draft.admit(r, count)
        if not taken and (victims := self._victims(draft, r, most)):
            taken = draft.displace(r, victims, count)
            if not taken:  # what is in flight can be preempted once it is not planned again
                self._giving = {victim for victim in victims if victim.in_flight}
            else:
                shape[:] = [*draft.shape[:-1], *(piece for piece in shape if not piece[1])]  # without its own chunk
        if taken:
            self._order.bill(r)
        return taken

    def _victims(self, draft: Draft, r: Request, most: float) -> list[Request]:
        """The requests that make room for `r`: prefills before relegated streams before other streams, of these the lowest priority
        first, and of these the last to arrive; never an equal. None if all of them would not do."""
        others = [other for other in draft.running if other.priority > r.priority]
        others.sort(key=lambda other: (bool(other.output), not other.relegated, -other.priority, -other.arrival))
        staying = [*draft.running, r]
        for number, other in enumerate(others, 1):
            staying.remove(other)
            if self._peak(staying) <= most or len(staying) == 1:
                return others[:number]
        return []

    def _peak(self, requests: Sequence[Request]) -> float:
        """Tokens of KV that these requests will hold at most at once, if their answers are as long as usual."""
        left = sorted([(self.answers.left(r), r.num_tokens) for r in requests], reverse=True)
        held = peak = 0.0
        for number, (more, now) in enumerate(left, 1):
            held += now
            peak = max(peak, held + number * more)
        return peak

    def _stream(self, r: Request) -> float:
        """Seconds that the request adds to an iteration as one more decode."""
        return prices.decode(self.cost, r.num_tokens, r.extra_rows)

    def _brought(self, draft: Draft, r: Request) -> float:
        """Seconds that the request's adapter adds to an iteration, if nobody else in the draft uses it."""
        return prices.adapters(self.cost, draft.brings(r))

    def _too_slow(self, seconds: float, streams: Sequence[Request]) -> bool:
        """Whether an iteration of this many seconds is longer than the gap between tokens may be. A request's own target counts
        only if it is longer than the server's; for a shorter one, the others need not make room."""
        return seconds > gap(self.slo) and seconds > min(self._deadlines.gap(r) for r in streams)

    def _efficient(self, most: int) -> int:
        """The smallest efficient number of prefill tokens (see `EFFICIENT`): a power of two, at most `most`."""
        sizes = [1 << k for k in range(4, most.bit_length())] or [most]
        per_token = {size: self.cost.seconds([(0, size)]) / size for size in sizes}
        enough = EFFICIENT * min(per_token.values())
        return min(size for size, seconds in per_token.items() if seconds <= enough)


def _even(prefills: Sequence[float], room: float) -> float:
    """Seconds of prefill for an iteration that has room for `room`, so that no first token comes later and no iteration is longer
    than this takes. `prefills`: seconds of each prompt, in their order. A prompt that takes two iterations anyway is halved.
    """
    if room <= 0 or room == inf or sum(prefills) > FEW * room:
        return room
    total = needed = 0.0
    for seconds in prefills:
        total += seconds
        needed = max(needed, total / ceil(total / room))
    return min(room, SPARE * needed) if needed else room


def _worth(limit: float, alone: float) -> float:
    """How much of `limit` seconds is worth spending on an iteration, if its decodes alone take `alone` seconds. The share of the
    time that prefill gets is 1 - alone / limit. It hardly grows with long iterations, and what a stream waits does. All of the
    limit, if it is less than the decodes take.
    """
    share = (1 - alone / limit) / WORTH
    return alone / (1 - share) if 0 < share < 1 and limit < inf else limit


def possible(slo: Targets, cost: CostModel) -> None:
    """Raises ValueError for a target that not even a lone request could meet. The message names the lowest possible target."""
    token, prompt = cost.seconds([(1, 1)]), cost.seconds([(0, 2)])
    for name, target, least in (("tbt", slo.tbt, token), ("tpot", slo.tpot, token), ("ttft", slo.ttft, prompt)):
        if target is not None and target.seconds < least:
            raise ValueError(
                f"{name}={1000 * target.seconds:g}ms cannot be met: a lone request already takes {1000 * least:.1f} ms; "
                f"ask for at least about {name}={ceil(1200 * least)}ms"
            )
