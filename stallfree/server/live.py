"""The live page's data: records reduced to rows, percentiles and stalls, but only while a page is open.

The engine's thread only queues each record with what the account of stalls found. A look reduces the records since the last look, a
bounded amount at a time. It knows neither HTTP nor the engine.
"""

import math
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from stallfree.core.record import StepRecord
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import LONG_WAIT_S, Iteration, Stall, StallAccount, Wait
from stallfree.metrics.tenants import Tenant

KEPT = 512
"""Records kept for the next look: a page that is opened shows that many past iterations."""
PIECES = 4096
"""Gaps and stalls that one look reduces, in about 2 ms: opening a page must not make tokens late."""
ROWS = 2000
"""Rows of iterations kept for another page, or for the same one after a lost answer."""
ROWS_AT_ONCE = 500
STALLS = 20
TENANTS = 20
"""Rows of tenants: those with the largest shares."""
MOST_TENANTS = 1024
"""Tenants whose weight is remembered, those seen last."""
MOST_REFUSALS = 4096
"""Refusals of the last minute that are counted."""
WINDOW_S = 60
"""Percentiles cover this many seconds before a look."""
ID_CHARS = 8
FAULT, GAP = attrgetter("kind", "cause", "blamed"), attrgetter("gap_s")
FINENESS = 50
"""Buckets of the percentiles per factor e. Each is 2 % wide, so a percentile's error is at most 1 %."""


class Judged(NamedTuple):
    """A record, and the account of stalls for its iteration."""

    step: StepRecord
    iteration: Iteration
    gaps: list[float]
    ttfts: list[float]
    stalls: list[Stall]
    waits: list[Wait]
    forecasts: list[float]
    served: dict[str, int]
    lookups: dict[str, tuple[int, int]]


class Live:
    """The engine's thread calls `record`; one other thread calls `look` and `refuse`. `slo`: the target of first tokens. `policy`:
    its name. `ahead`: seconds, over its weight, by which a tenant was served more than the least; None if the policy keeps no such
    account.
    """

    def __init__(self, policy: str, slo: Slo | None = None, ahead: Callable[[str], float] | None = None):
        self.policy = policy
        self.slo = slo or Slo()
        self._ahead = ahead
        self._run = secrets.token_hex(4)
        self._unseen: deque[Judged] = deque(maxlen=KEPT)  # appending and popping need no lock
        self._rows: deque[tuple[Any, ...]] = deque(maxlen=ROWS)
        self._seconds: deque[_Second] = deque(maxlen=WINDOW_S + 1)
        self._stalls: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._waits: deque[Wait] = deque(maxlen=STALLS)
        self._oldest: tuple[str, float] | None = None
        self._here: dict[str, Tenant] = {}
        self._weights: dict[str, float] = {}
        self._refusals: deque[tuple[float, str]] = deque(maxlen=MOST_REFUSALS)

    def record(self, step: StepRecord, account: StallAccount) -> None:
        """Keep one iteration, which `account` has judged. The engine's thread calls it after each."""
        found = account.gaps, account.ttfts, account.stalls, account.waits, account.forecasts, account.served, account.lookups
        self._unseen.append(Judged(step, account.iteration, *found))
        self._oldest = account.oldest
        self._here = account.tenants.here
        for _, tenant, weight in step.tenants:
            self._weights.pop(tenant, None)
            self._weights[tenant] = weight
            if len(self._weights) > MOST_TENANTS:
                del self._weights[next(iter(self._weights))]

    def refuse(self, tenant: str, now: float) -> None:
        """A request of `tenant` was refused at `now` (s, the run's)."""
        self._refusals.append((now, tenant))

    def look(self, now: float, since: int = -1) -> dict[str, Any]:
        """All that is new after step `since` at `now` (s, the run's), as JSON values; times in seconds.

        `run`: another id for each server. `rows`, oldest first: (step, t_start, t_end, decodes, prefill tokens, limit_s, budget,
        margin, running, waiting, free KV blocks). `more`: whether to call again at once. `ttft` and `tbt` of the last minute: null,
        or count, p50, p90, p99 and the late share. `stalls`, the last ones, newest first: one for each iteration at fault, with the
        `count` of tokens and the `id` of the request that waited longest. `waits`: the last long waits for first tokens, newest
        first, with their reasons in `words`. `longest_wait`: the longest that still lasts, as `id` and `seconds`, or null.
        `long_wait_s`: from how many seconds a wait is long. `forecast`: of actual over forecast times to first token, as `ttft`.
        `tenants`, the largest share first, if there are two or more: `name`, `share` of the tokens computed in the last minute,
        `weight`, `ahead_s` (seconds, over its weight, by which it was served more than the least; or null), requests `waiting` for
        a first token, requests `refused` in the last minute, and the share of its tokens that were looked up in the prefix cache
        in the last minute and were there, `cached` (null: none were looked up).
        """
        pieces = 0
        while self._unseen and pieces < PIECES:
            judged = self._unseen.popleft()
            pieces += 1 + len(judged.gaps) + len(judged.stalls) + len(judged.waits)
            self._reduce(judged)
        rows = [row for row in self._rows if row[0] > since]
        oldest = self._oldest
        seconds = [second for second in self._seconds if now - WINDOW_S <= second.at]
        return {
            "run": self._run,
            "rows": rows[:ROWS_AT_ONCE],
            "more": bool(self._unseen) or len(rows) > ROWS_AT_ONCE,
            "ttft": _summary([second.ttft for second in seconds]),
            "tbt": _summary([second.tbt for second in seconds]),
            "stalls": list(self._stalls.values())[::-1],
            "waits": [wait._asdict() | {"words": wait.words()} for wait in reversed(self._waits)],
            "longest_wait": oldest and {"id": oldest[0][:ID_CHARS], "seconds": now - oldest[1]},
            "long_wait_s": LONG_WAIT_S if self.slo.ttft is None else self.slo.ttft.seconds,
            "forecast": _summary([second.forecasts for second in seconds]),
            "tenants": self._tenants(seconds, now),
        }

    def _tenants(self, seconds: Iterable["_Second"], now: float) -> list[dict[str, Any]]:
        served, looked_up, found = Counter[str](), Counter[str](), Counter[str]()
        for second in seconds:
            served.update(second.served)
            looked_up.update(second.looked_up)
            found.update(second.found)
        refused = Counter(tenant for t, tenant in self._refusals if t >= now - WINDOW_S)
        here = {name: tenant.waiting for name, tenant in list(self._here.items())}
        names = {*served, *refused, *here}
        if len(names) < 2:
            return []
        total = max(1, served.total())
        return [
            {
                "name": name,
                "share": served[name] / total,
                "weight": self._weights.get(name, 1.0),
                "ahead_s": None if self._ahead is None else self._ahead(name),
                "waiting": here.get(name, 0),
                "refused": refused[name],
                "cached": found[name] / looked_up[name] if looked_up[name] else None,
            }
            for name in sorted(names, key=lambda name: (-served[name], name))[:TENANTS]
        ]

    def _reduce(self, judged: Judged) -> None:
        step, iteration, gaps, ttfts, stalls, waits, forecasts, served, lookups = judged
        self._rows.append(
            (
                step.step,
                round(step.t_start, 6),
                round(step.t_end, 6),
                iteration.decodes,
                sum(tokens for _, tokens in iteration.prefills),
                step.limit_s,
                step.budget,
                step.margin,
                step.num_running,
                step.num_waiting,
                step.free_blocks,
            )
        )
        if not self._seconds or self._seconds[-1].at != int(step.t_end):
            self._seconds.append(_Second(int(step.t_end)))
        second, ttft = self._seconds[-1], self.slo.ttft
        second.forecasts.add(forecasts, 0)
        second.served.update(served)
        second.looked_up.update({name: tokens for name, (tokens, _) in lookups.items()})
        second.found.update({name: tokens for name, (_, tokens) in lookups.items()})
        second.ttft.add(ttfts, 0 if ttft is None else sum(seconds > ttft.seconds for seconds in ttfts))
        alike: dict[tuple[str, str, int], list[Stall]] = {}
        for (kind, cause, blamed), run in groupby(stalls, key=FAULT):
            alike.setdefault((kind, cause, blamed.step), []).extend(run)
        second.tbt.add(gaps, sum(len(same) for (kind, _, _), same in alike.items() if kind == "late"))
        for key, same in alike.items():
            self._note(key, same)
        self._waits += [wait._replace(id=wait.id[:ID_CHARS]) for wait in waits]

    def _note(self, key: tuple[str, str, int], same: list[Stall]) -> None:
        """Keep one line for all stalls of one cause that one iteration is to blame for: a long one makes all decodes late."""
        worst = max(same, key=GAP)
        line = self._stalls.pop(key, {"count": 0, "gap_s": -1.0})
        if worst.gap_s > line["gap_s"]:
            line |= {"id": worst.id[:ID_CHARS], "gap_s": worst.gap_s, "late_s": worst.late_s}
        line |= {"t": worst.t, "step": worst.step, "kind": worst.kind, "cause": worst.cause, "count": line["count"] + len(same)}
        line["words"] = worst.words(lambda id: id[:ID_CHARS])
        self._stalls[key] = line
        if len(self._stalls) > STALLS:
            del self._stalls[next(iter(self._stalls))]


class _Times:
    """How many latencies, or ratios of two, fall in each bucket, and how many are late."""

    __slots__ = ("buckets", "late")

    def __init__(self) -> None:
        self.buckets: Counter[int] = Counter()
        self.late = 0

    def add(self, seconds: Iterable[float], late: int) -> None:
        for value, number in Counter(seconds).items():  # most tokens of an iteration waited equally long: they share a logarithm
            self.buckets[round(FINENESS * math.log(max(value, 1e-6)))] += number
        self.late += late


class _Second:
    """The latencies of one second of the run, `at`, the ratios of its `forecasts`, and by tenant the tokens `served`, `looked_up`
    in the prefix cache and `found` there."""

    __slots__ = ("at", "forecasts", "found", "looked_up", "served", "tbt", "ttft")

    def __init__(self, at: int):
        self.at = at
        self.ttft, self.tbt, self.forecasts = _Times(), _Times(), _Times()
        self.served, self.looked_up, self.found = Counter[str](), Counter[str](), Counter[str]()


def _summary(times: Iterable[_Times]) -> dict[str, float] | None:
    """Count, late share, percentiles; None without times. A percentile is the least value that so many per cent do not exceed."""
    buckets, late = Counter[int](), 0
    for each in times:
        buckets.update(each.buckets)
        late += each.late
    count = buckets.total()
    if not count:
        return None
    summary: dict[str, float] = {"count": count, "late": late / count}
    left = [50, 90, 99]
    below = 0
    for bucket in sorted(buckets):
        below += buckets[bucket]
        while left and 100 * below >= left[0] * count:
            summary[f"p{left.pop(0)}"] = math.exp(bucket / FINENESS)
    return summary
