"""Reduces timelines to a report: latencies, rates, stalls, and the share of an SLO that was met. The numbers that users feel.

It needs each request's arrival and the times of its tokens. It does not know who measured them: a client over HTTP, the engine's
records, or a simulator. Times are in seconds.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from stallfree.core.slo import Slo, Target
from stallfree.metrics.stalls import LONG_WAIT_S
from stallfree.metrics.timeline import Timeline

COMPLETED = ("stop", "length")
"""Reasons of requests that ended with their whole output; any other reason is an error."""
STALL = 5.0
"""Median gaps from which on a gap is a stall, without a target for TBT: the paper's strict SLO, in decode iterations."""

QUANTILES = (50, 90, 99, 100)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Quantiles:
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Stalls:
    """Gaps of more than `after_s` seconds between two tokens of a request: their number, and their share of all gaps."""

    after_s: float
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class LongWaits:
    """Requests that waited more than `after_s` seconds for a first token, even in vain: their number, and the longest wait."""

    after_s: float
    count: int
    longest_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests per second: `nominal`, the rate that was set, and `actual`, as they arrived. None if unknown, or for one request."""

    nominal: float | None
    actual: float | None


@dataclass(frozen=True, slots=True)
class Attainment:
    """How a target was met. `in_time`: the share of cases within it; None, and not met, without a case."""

    target: str
    in_time: float | None
    met: bool


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that each meet every target: their `share` of all that ended, and their `requests_per_s`, from the first arrival to
    the last token. As many of a request's tokens may be late as the target's percentile allows, rounded up.
    """

    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """A run in numbers. `completed`: requests with their whole output. `errors`: how many ended otherwise, by kind. `unfinished`:
    how many had not ended. `seconds`: from the first arrival to the last token; `output_tokens_per_s` is over these seconds.
    `cached_tokens`: how many of `prompt_tokens` were found in the prefix cache; None if it is not known.

    Over requests: `ttft_s` (with a first token), `tpot_s` (mean gap, with two tokens), `e2e_s` (arrival to last token, completed
    only), `scheduling_s` (arrival to first scheduling, which a client cannot see). `tbt_s`: over the gaps of all requests, pooled.
    `long_waits`: by the target for TTFT, or `LONG_WAIT_S` without one. `slo_attainment`: by the target's name; `goodput`: by all
    targets together. None: there was no case, or no target.
    """

    completed: int
    errors: dict[str, int]
    unfinished: int
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    request_rate: Rate
    ttft_s: Quantiles | None
    tbt_s: Quantiles | None
    tpot_s: Quantiles | None
    e2e_s: Quantiles | None
    scheduling_s: Quantiles | None
    stalls: Stalls | None
    long_waits: LongWaits
    slo_attainment: dict[str, Attainment]
    goodput: Goodput | None


class Tally:
    """Adds timelines to a report one by one and keeps none, so that a million of them need little memory."""

    def __init__(self, slo: Slo | None = None):
        self._slo = slo or Slo()
        self._arrivals, self._firsts, self._paces, self._whole = array("d"), array("d"), array("d"), array("d")
        self._delays, self._in_vain = array("d"), array("d")
        self._gaps = _Pool()
        self._reasons: Counter[str] = Counter()
        self._lines = self._prompt_tokens = self._output_tokens = self._lost = 0
        self._cached_tokens: int | None = None
        self._last = 0.0
        self._due = self._late = self._good = self._whole_late = 0

    def add(self, line: Timeline) -> None:
        tokens, slo = np.array(line.tokens), self._slo
        self._lines += 1
        self._arrivals.append(line.arrival)
        self._prompt_tokens += line.prompt_tokens
        if line.cached is not None:
            self._cached_tokens = (self._cached_tokens or 0) + line.cached
        self._output_tokens += len(tokens)
        if line.scheduled is not None:
            self._delays.append(line.scheduled - line.arrival)
        if line.reason is not None:
            self._reasons[line.reason] += 1
            self._lost += not len(tokens)
            if not len(tokens) and line.finished is not None:
                self._in_vain.append(line.finished - line.arrival)
        good = len(tokens) > 0 and line.reason in COMPLETED
        if len(tokens):
            good = good and (slo.ttft is None or line.tokens[0] - line.arrival <= slo.ttft.seconds)
            self._last = max(self._last, line.tokens[-1])
            self._firsts.append(line.tokens[0] - line.arrival)
            if line.reason in COMPLETED:
                self._whole.append(line.tokens[-1] - line.arrival)
        if len(tokens) > 1:
            gaps = tokens[1:] - tokens[:-1]
            self._gaps.add(gaps)
            self._paces.append(float(gaps.mean()))
            if slo.tpot:
                due = line.arrival + slo.ttft.seconds if slo.ttft else line.tokens[0]
                late_s = tokens[1:] - due - slo.tpot.seconds * np.arange(1, len(tokens))
                late = int((late_s + slo.tpot.seconds > slo.tpot.seconds).sum())
                self._due += len(gaps)
                self._late += late
                good = good and late <= _may_be_late(slo.tpot, len(gaps))
            if slo.tbt:
                good = good and int((gaps > slo.tbt.seconds).sum()) <= _may_be_late(slo.tbt, len(gaps))
        if slo.ttlt and line.reason is not None:
            late = line.reason not in COMPLETED or not len(tokens) or line.tokens[-1] - line.arrival > slo.ttlt.seconds
            self._whole_late += late
            good = good and not late
        self._good += good

    def report(self, nominal_rate: float | None = None) -> Report:
        """The report of all timelines so far."""
        slo, gaps, firsts = self._slo, self._gaps, np.array(self._firsts)
        arrivals = np.sort(self._arrivals)
        seconds = self._last - float(arrivals[0]) if self._output_tokens else 0.0
        ended = self._reasons.total()
        attainment = {}
        if slo.ttft:
            late = self._lost + int((firsts > slo.ttft.seconds).sum())
            attainment["ttft"] = _attainment(slo.ttft, late, len(firsts) + self._lost)
        if slo.tbt:
            attainment["tbt"] = _attainment(slo.tbt, gaps.above(slo.tbt.seconds), gaps.size)
        if slo.tpot:
            attainment["tpot"] = _attainment(slo.tpot, self._late, self._due)
        if slo.ttlt:
            attainment["ttlt"] = _attainment(slo.ttlt, self._whole_late, ended)
        return Report(
            completed=sum(self._reasons[reason] for reason in COMPLETED),
            errors={reason: n for reason, n in self._reasons.most_common() if reason not in COMPLETED},
            unfinished=self._lines - ended,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            seconds=seconds,
            output_tokens_per_s=self._output_tokens / seconds if seconds else 0.0,
            request_rate=Rate(nominal_rate, _rate(arrivals)),
            ttft_s=_quantiles(firsts),
            tbt_s=Quantiles(*gaps.percentiles(QUANTILES)) if gaps.size else None,
            tpot_s=_quantiles(np.array(self._paces)),
            e2e_s=_quantiles(np.array(self._whole)),
            scheduling_s=_quantiles(np.array(self._delays)),
            stalls=_stalls(gaps, slo.tbt),
            long_waits=_long_waits(np.concatenate([firsts, self._in_vain]), slo.ttft),
            slo_attainment=attainment,
            goodput=Goodput(self._good / ended, self._good / seconds) if attainment and ended and seconds else None,
        )


def report(lines: Iterable[Timeline], slo: Slo | None = None, nominal_rate: float | None = None) -> Report:
    """The report of `lines`. A request that ended before its first token is late for `ttft`, however soon it ended. Under `tpot`
    the token after i others is due i times the target after the first one was due by `ttft`; without `ttft`, after it came.
    """
    tally = Tally(slo)
    for line in lines:
        tally.add(line)
    return tally.report(nominal_rate)


def table(reports: Mapping[str, Report]) -> list[list[str]]:
    """Reports side by side as text: a row of their names, then a row for each figure. Times are in milliseconds."""
    each = list(reports.values())
    rows = [
        ["", *reports],
        ["completed", *(str(r.completed) for r in each)],
        ["errors", *(", ".join(f"{n} {kind}" for kind, n in r.errors.items()) or "0" for r in each)],
        ["unfinished", *(str(r.unfinished) for r in each)],
        ["requests/s, nominal", *(_number(r.request_rate.nominal) for r in each)],
        ["requests/s, actual", *(_number(r.request_rate.actual) for r in each)],
        ["output tokens/s", *(_number(r.output_tokens_per_s) for r in each)],
    ]
    if any(r.cached_tokens for r in each):
        rows.append(["prompt tokens from the prefix cache", *(cached_share(r) for r in each)])
    for name in ("ttft", "tbt", "tpot", "e2e"):
        quantiles = [getattr(r, f"{name}_s") for r in each]
        for f in fields(Quantiles):
            values = (None if q is None else getattr(q, f.name) * 1e3 for q in quantiles)
            rows.append([f"{name.upper()} {f.name}, ms", *map(_number, values)])
    rows.append(["stalls", *("-" if r.stalls is None else f"{r.stalls.count} (> {r.stalls.after_s * 1e3:.4g} ms)" for r in each)])
    waits = (r.long_waits for r in each)
    rows.append(["waits for a first token", *(f"{w.count} (> {w.after_s:.4g} s), longest {w.longest_s:.3g} s" for w in waits)])
    for name, target in dict.fromkeys((name, attained.target) for r in each for name, attained in r.slo_attainment.items()):
        rows.append([f"within {name}={target}", *(_in_time(r.slo_attainment.get(name)) for r in each)])
    if any(r.goodput for r in each):
        rows.append(["requests within all targets", *("-" if r.goodput is None else f"{r.goodput.share:.2%}" for r in each)])
        rows.append(["goodput, requests/s", *(_number(None if r.goodput is None else r.goodput.requests_per_s) for r in each)])
    return rows


def cached_share(report: Report) -> str:
    """The share of the prompt tokens that were found in the prefix cache, in words."""
    return "-" if report.cached_tokens is None else f"{report.cached_tokens / max(1, report.prompt_tokens):.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _in_time(attained: Attainment | None) -> str:
    if attained is None or attained.in_time is None:
        return "-"
    return f"{attained.in_time:.2%} {'met' if attained.met else 'MISSED'}"


def _rate(arrivals: Floats) -> float | None:
    return (len(arrivals) - 1) / float(arrivals[-1] - arrivals[0]) if len(arrivals) and arrivals[-1] > arrivals[0] else None


def _quantiles(values: Floats) -> Quantiles | None:
    return Quantiles(*map(float, np.percentile(values, QUANTILES))) if len(values) else None


def _stalls(gaps: "_Pool", target: Target | None) -> Stalls | None:
    if not gaps.size:
        return None
    # Tokens that come together have gaps of 0. Their share says nothing about the pace, and they must not make the median 0.
    apart = gaps.above(0.0)
    after = target.seconds if target else STALL * gaps.percentiles([50], apart)[0] if apart else 0.0
    count = gaps.above(after)
    return Stalls(after, count, count / gaps.size)


def _long_waits(waits: Floats, target: Target | None) -> LongWaits:
    after = LONG_WAIT_S if target is None else target.seconds
    return LongWaits(after, int((waits > after).sum()), float(waits.max(initial=0.0)))


def _may_be_late(target: Target, tokens: int) -> int:
    """How many of one request's `tokens` may be late."""
    return math.ceil(target.late_share * tokens - 1e-9)


def _attainment(target: Target, late: int, cases: int) -> Attainment:
    if not cases:
        return Attainment(str(target), None, False)
    return Attainment(str(target), 1 - late / cases, late <= target.late_share * cases + 1e-9)


class _Pool:
    """A multiset of numbers, each kept once with its count: all decodes of an iteration have the same gap. `size`: of all."""

    BUFFER = 1 << 20

    def __init__(self) -> None:
        self.size = 0
        self._values: Floats = np.array([])
        self._counts: npt.NDArray[np.int64] = np.array([], dtype=np.int64)
        self._new: list[Floats] = []
        self._unsorted = 0

    def add(self, values: Floats) -> None:
        self._new.append(values)
        self._unsorted += len(values)
        self.size += len(values)
        if self._unsorted > max(self.BUFFER, len(self._values)):
            self._sort()

    def above(self, limit: float) -> int:
        """How many numbers are above `limit`."""
        self._sort()
        return int(self._counts[np.searchsorted(self._values, limit, side="right") :].sum())

    def percentiles(self, percents: Sequence[float], largest: int | None = None) -> list[float]:
        """Percentiles of all numbers, or of the `largest` so many; linear between two numbers, as numpy's."""
        self._sort()
        size = self.size if largest is None else largest
        upto = np.cumsum(self._counts)

        def at(rank: int) -> float:
            return float(self._values[np.searchsorted(upto, self.size - size + rank, side="right")])

        values = []
        for percent in percents:
            place = (size - 1) * (percent / 100)
            low, share = int(place), place % 1
            a, b = at(low), at(min(low + 1, size - 1))
            values.append(a + (b - a) * share if share < 0.5 else b - (b - a) * (1 - share))
        return values

    def _sort(self) -> None:
        if not self._new:
            return
        values, counts = np.unique(np.concatenate(self._new), return_counts=True)
        self._new.clear()
        self._unsorted = 0
        if len(self._values):
            values, counts = np.concatenate([self._values, values]), np.concatenate([self._counts, counts])
            order = np.argsort(values, kind="stable")
            values, counts = values[order], counts[order]
            firsts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
            values, counts = values[firsts], np.add.reduceat(counts, firsts)
        self._values, self._counts = values, counts
