"""The latency target in, the token budget out: every ready decode goes into every iteration, and the rest of the time until the
first of them is due is filled with prefill.

It takes time from a cost model and from `now`, and learns from its own lateness; it does not know what runs the plans.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from math import ceil, inf

from stallfree.core.draft import RUNNING, Draft
from stallfree.core.plan import Plan
from stallfree.core.policy import CostModel, Reserve
from stallfree.core.request import Request, Status
from stallfree.core.slo import Slo as Targets
from stallfree.core.slo import Target
from stallfree.perf.fitted import Fitted

STRICT = 5
"""Without a target, TBT at P99 is to be within this many times a decode iteration: the paper's strict SLO (section 5)."""
SMALL_BATCH = [(512, 1)] * 8
"""The decode iteration that this is counted in: what a few streams take that disturb each other little."""

AIM = 0.75
"""Share of the late tokens allowed that the margin aims at: an aim at all of them would miss it half of the time."""

LOOKAHEAD = 16
"""Waiting requests that compete for the next prefill, the oldest: ordering all would cost more than it gains."""

EFFICIENT = 1.05
"""With nobody decoding, an iteration is as small as costs at most this times the least possible time a token."""


class Slo:
    """`slo`: the targets, in words or parsed; what they leave open is the default. `cost` prices iterations, and learns.

    Raises ValueError for targets that not even a lone request could meet.
    """

    reserve: Reserve = "prompt"
    stall_free = True

    def __init__(self, slo: str | Targets = "", cost: CostModel | None = None):
        self.cost = cost or Fitted()
        given = slo if isinstance(slo, Targets) else Targets.parse(slo) if slo else Targets()
        default = Target(ceil(1000 * STRICT * self.cost.seconds(SMALL_BATCH)) / 1000, 99.0)
        self.slo = given.within(Targets(tbt=default))
        possible(self.slo, self.cost)
        pace = self.slo.tbt or self.slo.tpot or default
        self.margin = Margin(AIM * pace.late_share)
        self._merged = lru_cache(1024)(self._merge)

    def plan(self, draft: Draft) -> None:
        for r in draft.decoding:
            draft.decode(r)
        shape = draft.shape
        alone = self.cost.seconds(shape)
        if shape:
            until, first = self._slack(draft, alone)
            limit = until / self.margin.value
            draft.limit_s, draft.margin = until, self.margin.value
            why = f"{1000 * until:.0f} ms until {first} is due, margin {self.margin.value:.2f}"
        else:
            limit, why = inf, "nobody decodes: as many tokens as use the machine well"
            draft.cap(self._efficient(draft.left), why)
        full, crowd = self._fill(draft, shape, limit, alone)
        if crowd:
            why += f"; one more stream, and decodes alone would take {1000 * crowd:.0f} ms"
        spare = 0 if full else self.cost.room(shape, 0, draft.left, limit)
        draft.cap(draft.budget - draft.left + spare, why)

    def learn(self, plan: Plan, requests: Sequence[Request], now: float) -> None:
        shape, seconds = plan.shape, now - plan.now
        if seconds <= 0:  # a clock that stood still teaches nothing
            return
        score = self.cost.learn(shape, seconds)
        due = [self._due(r) for work, r in zip(plan.work, requests, strict=True) if work.decode]
        if due:
            late = sum([at < now for at in due])
            self.margin.learn(score if len(due) < len(shape) else None, late, len(due))

    def _merge(self, own: Targets) -> Targets:
        return own.within(self.slo)

    def _slack(self, draft: Draft, alone: float) -> tuple[float, str]:
        """Seconds until the first token of this iteration's decodes is due, and whose it is; `alone` is what they take.

        A request whose own target not even the decodes by themselves can meet is held to the server's: one client's impatience
        must not shut the others out.
        """
        alone *= self.margin.value
        least, first = inf, ""
        for r in draft.decoding:
            if r.status is RUNNING:
                slack = self._left(r, draft.now)
                if slack < alone and r.slo is not None:
                    slack = self._left(r, draft.now, self.slo)
                if slack < least:
                    least, first = slack, r.id
        return least, first

    def _left(self, r: Request, now: float, slo: Targets | None = None) -> float:
        """Seconds until the next token of a decode is due; where its first one is still in flight, from when that comes."""
        if r.output:
            return self._due(r, slo) - now
        return self._gap(slo or (self.slo if r.slo is None else self._merged(r.slo)))

    def _due(self, r: Request, slo: Targets | None = None) -> float:
        """When the next token of a request that has one is due."""
        if slo is None:
            slo = self.slo if r.slo is None else self._merged(r.slo)
        tbt = slo.tbt
        if tbt is not None:
            return r.last_token + tbt.seconds
        if slo.tpot is None:
            return inf
        start = r.first_token if slo.ttft is None else max(r.first_token, r.arrival + slo.ttft.seconds)
        return start + len(r.output) * slo.tpot.seconds

    def _fill(self, draft: Draft, shape: list[tuple[int, int]], limit: float, alone: float) -> tuple[bool, float]:
        """Add prefill to the draft and to `shape`, the most urgent first.

        No new request comes in where decodes by themselves, which take `alone` seconds now, would then be too slow for the targets:
        once they are that many, no budget can mend it. A lone request always comes in.

        True if time or tokens were not enough for all; and, if somebody was kept out for that, the seconds that decodes would take.
        """
        streams: list[Request] = []
        admitting, crowd = True, 0.0
        for r in self._by_urgency(draft):
            waiting = r.status is Status.WAITING
            if waiting and not admitting:
                continue
            if waiting and not streams:  # not before somebody wants to join them: most iterations have no time left by then
                streams = [*draft.decoding, *draft.prefilling]
                alone += sum(self._stream(other) for other in draft.prefilling)
            if waiting and streams:
                joined = alone + self._stream(r)
                if self._too_slow(joined * self.margin.value, [*streams, r]):
                    admitting, crowd = False, joined
                    continue
            wanted = min(r.remaining, draft.left)
            count = self.cost.room(shape, r.num_planned, wanted, limit)
            if not count:
                return True, crowd
            taken = draft.admit(r, count) if waiting else draft.prefill(r, count)
            if not taken:  # for want of KV
                admitting = admitting and not waiting
                continue
            shape.append((r.num_planned - taken, taken))
            if waiting:
                streams.append(r)
                alone += self._stream(r)
            if r.remaining and taken == count:
                return True, crowd
        return False, crowd

    def _stream(self, r: Request) -> float:
        """Seconds that the request adds to an iteration as one more decode."""
        decode = (r.num_tokens, 1)
        return self.cost.seconds([decode, decode]) - self.cost.seconds([decode])

    def _too_slow(self, seconds: float, streams: Sequence[Request]) -> bool:
        """Whether an iteration of so many seconds is longer than a gap between tokens may be. A request's own target counts where
        it asks for less than the server's; where it asks for more, the others need not make room for it."""
        return seconds > self._gap(self.slo) and seconds > min(
            self._gap(self.slo if r.slo is None else self._merged(r.slo)) for r in streams
        )

    @staticmethod
    def _gap(slo: Targets) -> float:
        """Seconds between tokens."""
        target = slo.tbt or slo.tpot
        return inf if target is None else target.seconds

    def _by_urgency(self, draft: Draft) -> list[Request]:
        """Prefills by priority, then by relative slack (Medha's LARS, arXiv 2409.17264): the time until the first token is due, in
        prefills of the request. A long prompt does not block short ones, and does not starve: its slack falls as it waits.
        Without a TTFT target, that is by the ratio of waiting to prefill time.
        """
        several = [*draft.prefilling, *islice(draft.waiting, LOOKAHEAD)]
        if len(several) < 2:
            return several

        def urgency(r: Request) -> tuple[int, float]:
            seconds = self.cost.seconds([(r.num_planned, r.remaining)])
            slo = self.slo if r.slo is None else self._merged(r.slo)
            due = self._due(r) if r.output else r.arrival + (0.0 if slo.ttft is None else slo.ttft.seconds)
            return r.priority, (due - draft.now - seconds) / seconds

        return sorted(several, key=urgency)

    def _efficient(self, most: int) -> int:
        """The smallest power of two of prefill tokens whose time a token is near the least there is; at most `most`."""
        sizes = [1 << k for k in range(4, most.bit_length())] or [most]
        per_token = {size: self.cost.seconds([(0, size)]) / size for size in sizes}
        enough = EFFICIENT * min(per_token.values())
        return min(size for size, seconds in per_token.items() if seconds <= enough)


def possible(slo: Targets, cost: CostModel) -> None:
    """Raises ValueError for a target that not even a lone request could meet, saying what the least is that can be asked for."""
    token, prompt = cost.seconds([(1, 1)]), cost.seconds([(0, 2)])
    for name, target, least in (("tbt", slo.tbt, token), ("tpot", slo.tpot, token), ("ttft", slo.ttft, prompt)):
        if target is not None and target.seconds < least:
            raise ValueError(
                f"{name}={1000 * target.seconds:g}ms cannot be met: with nobody else there it takes {1000 * least:.1f} ms; "
                f"the least that can be asked for is about {name}={ceil(1200 * least)}ms"
            )


class Margin:
    """What to multiply an expected time with so that it is exceeded as often as allowed, and no more: adaptive conformal inference
    (Gibbs and Candes, NeurIPS 2021), whatever the cost model's error.

    `value` is the quantile of the recent scores (measured over expected time) at 1 - `_miss`. A late token lowers `_miss`, one on
    time raises it a little, so that in the long run `late_share` of all are late. `_miss` is kept near `late_share`: what was
    saved up in quiet hours is not to be spent at once.
    """

    SCORES, FEW, FIRST, STEP, MOST = 256, 20, 1.25, 0.5, 3.0

    def __init__(self, late_share: float):
        self.late_share = late_share
        self.value = self.FIRST
        self._miss = late_share
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._usual = 1.0

    def learn(self, score: float | None, late: int, tokens: int) -> None:
        """Of an iteration's `tokens` decodes, `late` were; `score` if the margin had a say in it."""
        self._usual += 0.05 * (tokens - self._usual)
        share = self.late_share
        # One late iteration of the usual size moves _miss by half of late_share.
        self._miss += self.STEP * share * (share * tokens - late) / self._usual
        self._miss = min(max(self._miss, -share), self.MOST * share)
        if score is not None:
            insort(self._sorted, score)
            self._recent.append(score)
            if len(self._recent) > self.SCORES:
                del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        size = len(self._sorted)
        if size >= self.FEW:
            quantile = self._sorted[min(size - 1, max(0, ceil((1 - self._miss) * (size + 1)) - 1))]
            self.value = quantile * (1 + max(0.0, -self._miss) / share)
