"""A token budget from a latency target: every ready decode is in every iteration, and prefill gets the time that is left until the
earliest decode token is due.

It takes times from a cost model and from `now`, and learns from its own lateness. It does not know what runs the plans.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import ceil, inf
from typing import Self

from stallfree.core.draft import RUNNING, Draft
from stallfree.core.plan import Plan
from stallfree.core.policy import CostModel, Reserve, Setup
from stallfree.core.request import Request, Status
from stallfree.core.slo import Slo as Targets
from stallfree.core.slo import Target
from stallfree.perf.fitted import Fitted
from stallfree.perf.margin import Margin

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

LOOKAHEAD = 16
"""How many waiting requests, the oldest, compete for the next prefill. To order all would cost more than it gains."""

EFFICIENT = 1.05
"""Without decodes, an iteration is as small as possible while its time per token is at most this times the least possible."""


class Slo:
    """`slo`: the targets, in words or parsed, completed by the default TBT. `cost` prices iterations, and learns.

    `follow`: the target for TBT grows while the machine is slower than `cost` says at first. By default, only the default target
    follows: it is a number of decode iterations, not a time that a user chose. `options`: with the targets in `slo`, these make the
    same policy again.

    Raises ValueError for targets that not even a lone request could meet.
    """

    reserve: Reserve = "prompt"
    stall_free = True

    def __init__(self, slo: str | Targets = "", cost: CostModel | None = None, follow: bool | None = None):
        self.cost = cost or Fitted()
        targets = slo if isinstance(slo, Targets) else Targets.parse(slo) if slo else Targets()
        default = Target(ceil(1000 * STRICT * self.cost.seconds(SMALL_BATCH)) / 1000, 99.0)
        self.slo = targets.within(Targets(tbt=default))
        self._follows = targets.tbt is targets.tpot is None if follow is None else follow
        self.options = {"follow": True} if self._follows else {}
        self._least = self.slo.tbt
        possible(self.slo, self.cost)
        between = self.slo.tbt or self.slo.tpot or default
        self.margin = Margin(between.late_share)
        self._patience = ceil(1 / between.late_share)
        self._owed = 0.0
        self._passed = self._kept_out = 0
        self._merged = lru_cache(1024)(self._merge)

    @classmethod
    def of(cls, setup: Setup, *, follow: bool | None = None) -> Self:
        return cls(setup.targets or "", setup.cost, follow)

    def plan(self, draft: Draft) -> None:
        draft.decode_all()
        shape = draft.shape
        if extra := sum([r.extra_rows for r in draft.decoding]):
            shape.append((extra, 0))
        written = len(shape)
        alone = self.cost.seconds(shape)
        if shape:
            until, first = self._slack(draft, alone)
            limit, least, why = self._limit(until, alone)
            draft.limit_s, draft.margin = until, self.margin.value
            why = f"{1000 * until:.0f} ms until {first} is due, {why}"
        else:
            limit, least, why = inf, 1, "nobody decodes: as many tokens as use the machine well"
            draft.cap(self._efficient(draft.left), why)
        full, crowd = self._fill(draft, shape, limit, least, alone)
        if not draft.empty:  # an empty plan is not recorded, so it must change nothing
            prefill = self.cost.seconds(shape) - alone if len(shape) > written else 0.0
            self._account(prefill, alone, full=full, crowded=crowd > 0)
        if crowd:
            why += f"; one more stream, and decodes alone would take {1000 * crowd:.0f} ms"
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
        due = self._dues(plan.decoders(requests))
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
            self.slo = replace(self.slo, tbt=replace(now, seconds=wanted))
            self._merged.cache_clear()

    def _limit(self, until: float, alone: float) -> tuple[float, int, str]:
        """Seconds that the iteration may take by the cost model, tokens of the smallest useful chunk, and the reason. The decodes
        alone take `alone` seconds; the first of their tokens is due in `until` seconds.

        The limit is `until` over the margin, so that as few tokens are late as promised. But prefill must not starve. While the
        target leaves credit, waiting requests get the seconds that they are owed, if the decodes alone are in time. They also get
        them if the decodes alone are late, because then prefill makes no further token late. After `_patience` iterations without
        prefill, a chunk may take as long as the target.
        """
        margin = self.margin.value
        limit = until / margin
        if self._passed >= self._patience:
            return max(limit, alone + self._gap(self.slo)), 1, f"but nobody got prefill in {self._passed} iterations"
        late_anyway = alone > until or self.margin.broken
        if self._owed and (late_anyway or self.margin.credit > 0):
            most = inf if late_anyway else until
            owed = min(alone + self._owed, most)
            if owed > limit:
                least = LEAST if owed < most and self._owed < self._gap(self.slo) else 1
                return owed, least, f"margin {margin:.2f}; prefill is owed {1000 * self._owed:.0f} ms"
        return limit, 1, f"margin {margin:.2f}"

    def _account(self, prefill: float, alone: float, *, full: bool, crowded: bool) -> None:
        """Update the seconds owed to waiting requests, and the iterations without prefill and with requests kept out. This
        iteration had `prefill` seconds of prefill; `full`: there was no time for more."""
        self._passed = 0 if prefill or not full else self._passed + 1
        self._owed = max(0.0, min(self._owed + FLOOR * alone - prefill, self._gap(self.slo))) if full else 0.0
        self._kept_out = self._kept_out + 1 if crowded else self._kept_out if full else 0

    def _merge(self, own: Targets) -> Targets:
        return own.within(self.slo)

    def _slack(self, draft: Draft, alone: float) -> tuple[float, str]:
        """Seconds until the first token of this iteration's decodes is due, and its request's id. The decodes alone take `alone`
        seconds. If these already miss a request's own target, the server's target counts for it: one client's impatience must not
        keep others out.
        """
        alone *= self.margin.value
        least, first = inf, ""
        everybody = len(draft.work) == len(draft.decoding)
        streams = draft.decoding if everybody else [r for r in draft.decoding if r.status is RUNNING]
        dues = self._dues(streams)
        earliest = min(dues, default=inf)
        if earliest - draft.now >= alone and max(dues, default=inf) < inf:  # nearly always: nobody is late or without output
            return earliest - draft.now, streams[dues.index(earliest)].id
        for r, due in zip(streams, dues, strict=True):
            slack = due - draft.now if r.output else self._gap(self._targets(r))  # no output: its first token is in flight
            if slack < alone and r.slo is not None:
                slack = self._due(r, self.slo) - draft.now if r.output else self._gap(self.slo)
            if slack < least:
                least, first = slack, r.id
        return least, first

    def _targets(self, r: Request) -> Targets:
        return self.slo if r.slo is None else self._merged(r.slo)

    def _dues(self, requests: Sequence[Request]) -> list[float]:
        """When the next token of each request is due. For nearly all requests this needs no call."""
        if self.slo.tbt is None:
            return [self._due(r, self._targets(r)) for r in requests]
        gap = self.slo.tbt.seconds
        return [r.last_token + gap if r.slo is None else self._due(r, self._targets(r)) for r in requests]

    def _due(self, r: Request, slo: Targets) -> float:
        """When the next token of a request with output is due by `slo`."""
        tbt = slo.tbt
        if tbt is not None:
            return r.last_token + tbt.seconds
        if slo.tpot is None:
            return inf
        start = r.first_token if slo.ttft is None else max(r.first_token, r.arrival + slo.ttft.seconds)
        # After a standstill, a late request keeps its pace from there. To catch up, it would stall the others.
        return max(start + len(r.output) * slo.tpot.seconds, r.last_token + slo.tpot.seconds)

    def _fill(self, draft: Draft, shape: list[tuple[int, int]], limit: float, least: int, alone: float) -> tuple[bool, float]:
        """Add prefill to the draft and to `shape`, the most urgent first. The decodes alone take `alone` seconds.

        A new request is kept out if with it the decodes alone would be too slow for the targets, because no budget helps against
        too many decodes. A lone request always comes in.

        Returns whether time or tokens were short, and the seconds that decodes would take with the request kept out (0.0: none).
        """
        streams: list[Request] = []
        admitting, overdue, crowd = True, False, 0.0
        for r in self._by_urgency(draft):
            waiting = r.status is Status.WAITING
            if waiting and not admitting:
                continue
            if waiting and not streams:  # only once a request wants to join: most iterations have no time left by then
                streams = [*draft.decoding, *draft.prefilling]
                alone += sum(self._stream(other) for other in draft.prefilling)
            if waiting and streams:
                joined = alone + self._stream(r)
                patience = self._patience * (1 if self.margin.credit > 0 and joined <= self._gap(self.slo) else len(streams))
                overdue = self._kept_out >= patience
                if not overdue and self._too_slow(joined * self.margin.value, [*streams, r]):
                    admitting, crowd = False, joined
                    continue
            start = draft.start(r)
            wanted = min(r.num_tokens - start, draft.left)
            count = self.cost.room(shape, start, wanted, limit)
            if not count and self._passed >= self._patience and not draft.chunks:
                count = min(wanted, LEAST)
            if count < min(wanted, least):
                return True, crowd
            taken = draft.admit(r, count) if waiting else draft.prefill(r, count)
            if not taken:  # KV is short
                admitting = admitting and not waiting
                continue
            shape.append((r.num_planned - taken, taken))
            if waiting:
                streams.append(r)
                alone += self._stream(r)
                if overdue:
                    overdue, self._kept_out = False, 0
            if r.remaining and taken == count:
                return True, crowd
        return False, crowd

    def _stream(self, r: Request) -> float:
        """Seconds that the request adds to an iteration as one more decode."""
        decode = (r.num_tokens, 1)
        extra = [(r.extra_rows, 0)] if r.extra_rows else []
        return self.cost.seconds([decode, decode, *extra]) - self.cost.seconds([decode])

    def _too_slow(self, seconds: float, streams: Sequence[Request]) -> bool:
        """Whether an iteration of this many seconds is longer than the gap between tokens may be. A request's own target counts
        only if it is longer than the server's; for a shorter one, the others need not make room."""
        return seconds > self._gap(self.slo) and seconds > min(self._gap(self._targets(r)) for r in streams)

    @staticmethod
    def _gap(slo: Targets) -> float:
        """Seconds between tokens."""
        target = slo.tbt or slo.tpot
        return inf if target is None else target.seconds

    def _by_urgency(self, draft: Draft) -> list[Request]:
        """Prefills by priority, then by relative slack (Medha's LARS, arXiv 2409.17264): the time until the first token is due,
        over the request's prefill time. A long prompt does not block short ones, and does not starve, because its slack falls as it
        waits. Without a TTFT target, this is the order by waiting time over prefill time.
        """
        requests = [*draft.prefilling, *islice(draft.waiting, LOOKAHEAD)]
        if len(requests) < 2:
            return requests

        def urgency(r: Request) -> tuple[int, float]:
            start = draft.start(r)
            seconds = self.cost.seconds([(start, r.num_tokens - start)])
            slo = self._targets(r)
            due = self._due(r, slo) if r.output else r.arrival + (0.0 if slo.ttft is None else slo.ttft.seconds)
            return r.priority, (due - draft.now - seconds) / seconds

        return sorted(requests, key=urgency)

    def _efficient(self, most: int) -> int:
        """The smallest efficient number of prefill tokens (see `EFFICIENT`): a power of two, at most `most`."""
        sizes = [1 << k for k in range(4, most.bit_length())] or [most]
        per_token = {size: self.cost.seconds([(0, size)]) / size for size in sizes}
        enough = EFFICIENT * min(per_token.values())
        return min(size for size, seconds in per_token.items() if seconds <= enough)


def possible(slo: Targets, cost: CostModel) -> None:
    """Raises ValueError for a target that not even a lone request could meet. The message names the lowest possible target."""
    token, prompt = cost.seconds([(1, 1)]), cost.seconds([(0, 2)])
    for name, target, least in (("tbt", slo.tbt, token), ("tpot", slo.tpot, token), ("ttft", slo.ttft, prompt)):
        if target is not None and target.seconds < least:
            raise ValueError(
                f"{name}={1000 * target.seconds:g}ms cannot be met: a lone request already takes {1000 * least:.1f} ms; "
                f"ask for at least about {name}={ceil(1200 * least)}ms"
            )
