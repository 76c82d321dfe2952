"""When would a request get its first token? From the prefill that is more urgent, the share of the time that decodes leave, and how
wrong earlier forecasts were.

It is asked at a request's arrival, between two iterations or in another thread, so it keeps accounts of its own: requests that wait
for a first token, as they came. It knows nothing of the iterations in between.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import exp
from operator import attrgetter
from typing import NamedTuple

from stallfree.core.policy import Forecasting
from stallfree.core.request import Request
from stallfree.qos import prices

RECENT, FIRST = 64, 8
"""Outcomes that say how wrong forecasts are at present, and how many of them count as right before any is known."""
GRAIN_S = 0.1
"""Seconds that are added to both times of an outcome: a few milliseconds of 5 say nothing about seconds."""
STEP, AIM = 0.05, 0.75
"""How fast `caution` follows late first tokens, and the share of the allowed late ones that it aims at (as in `perf.margin`)."""
MOST_CAUTION = 2.0
"""`caution` is from one over this to this."""
WINDOW_S = 1.0
"""The time for a first token if the server has no target for it."""


class Late(NamedTuple):
    """A request that would miss its target for the first token: the seconds `predicted`, the `target`, and the seconds after which
    another try would meet it."""

    predicted: float
    target: float
    retry_after: float


class _Work(NamedTuple):
    """What a request without a first token asks for: its `place` in the order, the seconds that its prefill and all of it add to
    iterations, and those that its prefill takes if nothing else runs, after its
    adapter has come."""

    tenant: str
    weight: float
    place: tuple[int, float]
    prefill: float
    whole: float
    alone: float


class Outcomes:
    """The last `RECENT` outcomes of forecasts, as ratios of actual over forecast time."""

    def __init__(self) -> None:
        self._recent = deque([1.0] * FIRST)
        self._sorted = [1.0] * FIRST

    def add(self, forecast_s: float, actual_s: float) -> None:
        ratio = (actual_s + GRAIN_S) / (forecast_s + GRAIN_S)
        if len(self._recent) == RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(ratio)
        insort(self._sorted, ratio)

    def corrected(self, forecast_s: float) -> float:
        """A forecast that half of such outcomes exceed."""
        middle = self._sorted[len(self._sorted) // 2]
        return max(forecast_s / 4, (forecast_s + GRAIN_S) * middle - GRAIN_S)


class Forecast:
    """Forecasts for the requests of `policy`. A request enters at its arrival, and leaves with its first token, or when it ends."""

    def __init__(self, policy: Forecasting):
        self.policy = policy
        self.outcomes = Outcomes()
        self.caution = 1.0
        self._waiting: dict[str, tuple[Request, _Work, float | None]] = {}

    @property
    def backlog(self) -> float:
        """Seconds of prefill that wait."""
        return sum([work.prefill for _, work, _ in list(self._waiting.values())])

    @property
    def room(self) -> float:
        """Seconds of prefill that can still be admitted so that all of it is done within the target for a first token."""
        ttft = self.policy.slo.ttft
        return max(0.0, (WINDOW_S if ttft is None else ttft.seconds) * self.policy.share - self.backlog)

    def seconds(self, request: Request, cached: int = 0, wait_s: float = 0.0) -> float:
        """Seconds until a request that arrives now has its first token; half of all take longer. `cached`: tokens of its prompt
        that are in the prefix cache. `wait_s`: seconds until its adapter is here."""
        return self.outcomes.corrected(self._raw(self._work(request, cached, wait_s)))

    def late(self, request: Request, cached: int = 0, wait_s: float = 0.0) -> Late | None:
        """Whether a request that arrives now would miss its target for the first token. `caution` sees to it that of those that are
        served as many are in time as the target's percentile says. None also if nobody but itself is the reason, because another
        try would be no better.
        """
        target, work = self.policy.targets(request).ttft, self._work(request, cached, wait_s)
        if target is None or not self._waiting or work.alone > target.seconds:
            return None
        likely = self.outcomes.corrected(self._raw(work)) * self.caution
        return Late(likely, target.seconds, likely - target.seconds) if likely > target.seconds else None

    def enter(self, request: Request, cached: int = 0, wait_s: float = 0.0) -> None:
        """A request has arrived. Its `predicted` becomes the forecast."""
        work = self._work(request, cached, wait_s)
        raw = self._raw(work)
        request.predicted = self.outcomes.corrected(raw)
        self._waiting[request.id] = request, work, raw

    def expect(self, request: Request, given: int) -> None:
        """A request has arrived that gets the KV of its first tokens, `given` in all, from elsewhere or from the cache. When that
        comes is not forecast; the rest of its prompt counts in the forecasts of others.
        """
        self._waiting[request.id] = request, self._work(request, min(given, len(request.prompt) - 1), 0.0), None

    def leave(self, id: str) -> None:
        """A request has its first token, or has ended without one. A second call does nothing."""
        if id in self._waiting:
            request, _, raw = self._waiting.pop(id)
            if request.output and raw is not None:
                seconds = request.first_token - request.arrival
                self.outcomes.add(raw, seconds)
                if (target := self.policy.targets(request).ttft) is not None:
                    late = seconds > target.seconds
                    caution = self.caution * exp(STEP * (late - AIM * target.late_share))
                    self.caution = min(max(caution, 1 / MOST_CAUTION), MOST_CAUTION)

    def _work(self, r: Request, cached: int, wait_s: float) -> _Work:
        cost, length = self.policy.cost, len(r.prompt)
        prefill = prices.prefill(cost, cached, length)
        whole = prefill + self.policy.answers.left(r) * prices.decode(cost, length, r.extra_rows)
        place = r.priority, self.policy.first_due(r)
        return _Work(r.tenant, r.weight, place, prefill, whole, wait_s + cost.seconds([(cached, length - cached)]))

    def _raw(self, own: _Work) -> float:
        """Seconds until the first token, without experience. While there is no room for one more stream, requests come in only as
        others end, so all of the work ahead counts and not its prefill alone.
        """
        ahead: dict[str, list[_Work]] = {}
        for _, work, _ in list(self._waiting.values()):
            if work.place <= own.place:
                ahead.setdefault(work.tenant, []).append(work)
        policy = self.policy
        prefill = policy.decoding_s + (_before(own, ahead, attrgetter("prefill")) + own.alone) / policy.share
        whole = _before(own, ahead, attrgetter("whole")) + own.alone
        return prefill + policy.crowding * max(0.0, whole - prefill)


def _before(own: _Work, ahead: Mapping[str, Sequence[_Work]], seconds: Callable[[_Work], float]) -> float:
    """Seconds of the work that comes before `own`, of what is `ahead` of it by tenant: of its own tenant all, of each other one at
    most that one's share while its own tenant is served."""
    mine = sum(map(seconds, ahead.get(own.tenant, ())))
    share = (mine + seconds(own)) / own.weight
    others = [works for tenant, works in ahead.items() if tenant != own.tenant]
    return mine + sum([min(sum(map(seconds, works)), share * works[0].weight) for works in others])
