"""Reduces timelines to a report: latencies, rates, stalls, and the share of an SLO that was met. The numbers that users feel.

It needs each request's arrival and the times of its tokens. It does not know who measured them: a client over HTTP, the engine's
records, or a simulator. Times are in seconds.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo, Target
from stallfree.metrics.pool import Floats, Pool
from stallfree.metrics.stalls import LONG_WAIT_S
from stallfree.metrics.timeline import Timeline

COMPLETED = ("stop", "length")
"""Reasons of requests that ended with their whole output; any other reason is an error."""
STALL = 5.0
"""Median gaps from which on a gap is a stall, without a target for TBT: the paper's strict SLO, in decode iterations."""

QUANTILES = (50, 90, 99, 100)

Targets = Slo | Classes
"""What requests are judged by: the same for all, or for each what its class promises, completed by the first class."""


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
class OfClass:
    """The requests of one service class that ended or run, by its own targets. The names are those of `Report`. The rate of its
    `goodput` is over the seconds of the whole run."""

    requests: int
    ttft_s: Quantiles | None
    tbt_s: Quantiles | None
    slo_attainment: dict[str, Attainment]
    goodput: Goodput | None


@dataclass(frozen=True, slots=True)
class OfTenant:
    """The requests of one tenant. `tokens`: of prompts whose first token came, and of outputs; `share`: of all tenants' tokens."""

    requests: int
    tokens: int
    share: float
    ttft_s: Quantiles | None


@dataclass(frozen=True, slots=True)
class Report:
    """A run in numbers. `completed`: requests with their whole output. `errors`: how many ended otherwise, by kind. `unfinished`:
    how many had not ended. `seconds`: from the first arrival to the last token; `output_tokens_per_s` is over these seconds.
    `cached_tokens`: how many of `prompt_tokens` were found in the prefix cache; None if it is not known.

    Over requests: `ttft_s` (with a first token), `tpot_s` (mean gap, with two tokens), `e2e_s` (arrival to last token, completed
    only), `scheduling_s` (arrival to first scheduling, which a client cannot see). `tbt_s`: over the gaps of all requests, pooled.
    `long_waits`: by the target for TTFT, or `LONG_WAIT_S` without one. `slo_attainment`: by the target's name; `goodput`: by all
    targets together. None: there was no case, or no target. With several classes, a request is judged by its own, and a target's
    name begins with its class. `classes`: each that has requests, by itself; empty with one. `tenants`: each by itself; empty if
    none has a name.
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
    classes: dict[str, OfClass] = field(default_factory=dict)
    tenants: dict[str, OfTenant] = field(default_factory=dict)


def by_class(targets: Targets | None) -> Classes:
    """The targets of each class, completed by the first; without classes, of the class ""."""
    if not isinstance(targets, Classes):
        return Classes({"": targets or Slo()})
    return Classes({name: slo.within(targets.default) for name, slo in targets.items()})


class Tally:
    """Adds timelines to a report one by one and keeps none, so that a million of them need little memory. A request of an unknown
    class, or of none, is judged by the first class."""

    def __init__(self, targets: Targets | None = None):
        classes = by_class(targets)
        self._first = next(iter(classes))
        several = len(classes) > 1
        self._whole = _Tally(Slo() if several else classes.default)
        self._classes = {name: _Tally(slo) for name, slo in classes.items()} if several else {}
        self._tenants: dict[str, _Tenant] = {}

    def add(self, line: Timeline) -> None:
        self._whole.add(line)
        tenant = self._tenants.get(line.tenant) or self._tenants.setdefault(line.tenant, _Tenant())
        tenant.add(line)
        if self._classes:
            self._classes[line.service_class if line.service_class in self._classes else self._first].add(line)

    def report(self, nominal_rate: float | None = None) -> Report:
        """The report of all timelines so far."""
        report = self._whole.report(nominal_rate)
        if self._classes:
            parts = {name: tally.part(report.seconds) for name, tally in self._classes.items() if tally.requests}
            attainment = {f"{name} {target}": met for name, part in parts.items() for target, met in part.slo_attainment.items()}
            ended, good = self._whole.ended, sum(tally.good for tally in self._classes.values())
            goodput = _goodput(good, ended, report.seconds) if attainment else None
            report = replace(report, slo_attainment=attainment, goodput=goodput, classes=parts)
        if self._tenants.keys() - {""}:
            tokens = max(1, sum(tenant.tokens for tenant in self._tenants.values()))
            report = replace(report, tenants={name: tenant.part(tokens) for name, tenant in self._tenants.items()})
        return report


class _Tenant:
    """Adds the timelines of one tenant."""

    def __init__(self) -> None:
        self.tokens = self._requests = 0
        self._firsts = array("d")

    def add(self, line: Timeline) -> None:
        self._requests += 1
        if line.tokens:
            self.tokens += line.prompt_tokens + len(line.tokens)
            self._firsts.append(line.tokens[0] - line.arrival)

    def part(self, all_tokens: int) -> OfTenant:
        return OfTenant(self._requests, self.tokens, self.tokens / all_tokens, _quantiles(np.array(self._firsts)))


class _Tally:
    """Adds the timelines of requests with the same targets. `requests`: how many; `good`: how many met all targets."""

    def __init__(self, slo: Slo):
        self._slo = slo
        self._arrivals, self._firsts, self._paces, self._whole = array("d"), array("d"), array("d"), array("d")
        self._delays, self._in_vain = array("d"), array("d")
        self._gaps = Pool()
        self._reasons: Counter[str] = Counter()
        self.requests = self._prompt_tokens = self._output_tokens = self._lost = 0
        self._cached_tokens: int | None = None
        self._last = 0.0
        self._due = self._late = self.good = self._whole_late = 0

    def add(self, line: Timeline) -> None:
        tokens, slo = np.array(line.tokens), self._slo
        self.requests += 1
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
        self.good += good

    @property
    def ended(self) -> int:
        return self._reasons.total()

    def report(self, nominal_rate: float | None = None) -> Report:
        slo, gaps, firsts = self._slo, self._gaps, np.array(self._firsts)
        arrivals = np.sort(self._arrivals)
        seconds = self._last - float(arrivals[0]) if self._output_tokens else 0.0
        attainment = self._attained()
        return Report(
            completed=sum(self._reasons[reason] for reason in COMPLETED),
            errors={reason: n for reason, n in self._reasons.most_common() if reason not in COMPLETED},
            unfinished=self.requests - self.ended,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            seconds=seconds,
            output_tokens_per_s=self._output_tokens / seconds if seconds else 0.0,
            request_rate=Rate(nominal_rate, _rate(arrivals)),
            ttft_s=_quantiles(firsts),
            tbt_s=_pooled(gaps),
            tpot_s=_quantiles(np.array(self._paces)),
            e2e_s=_quantiles(np.array(self._whole)),
            scheduling_s=_quantiles(np.array(self._delays)),
            stalls=_stalls(gaps, slo.tbt),
            long_waits=_long_waits(np.concatenate([firsts, self._in_vain]), slo.ttft),
            slo_attainment=attainment,
            goodput=_goodput(self.good, self.ended, seconds) if attainment else None,
        )

    def part(self, seconds: float) -> OfClass:
        """These requests as a part of a run of so many `seconds`."""
        attainment = self._attained()
        goodput = _goodput(self.good, self.ended, seconds) if attainment else None
        return OfClass(self.requests, _quantiles(np.array(self._firsts)), _pooled(self._gaps), attainment, goodput)

    def _attained(self) -> dict[str, Attainment]:
        slo, gaps, firsts, attainment = self._slo, self._gaps, np.array(self._firsts), {}
        if slo.ttft:
            late = self._lost + int((firsts > slo.ttft.seconds).sum())
            attainment["ttft"] = _attainment(slo.ttft, late, len(firsts) + self._lost)
        if slo.tbt:
            attainment["tbt"] = _attainment(slo.tbt, gaps.above(slo.tbt.seconds), gaps.size)
        if slo.tpot:
            attainment["tpot"] = _attainment(slo.tpot, self._late, self._due)
        if slo.ttlt:
            attainment["ttlt"] = _attainment(slo.ttlt, self._whole_late, self.ended)
        return attainment


def report(lines: Iterable[Timeline], slo: Targets | None = None, nominal_rate: float | None = None) -> Report:
    """The report of `lines`. A request that ended before its first token is late for `ttft`, however soon it ended. Under `tpot`
    the token after i others is due i times the target after the first one was due by `ttft`; without `ttft`, after it came.
    """
    tally = Tally(slo)
    for line in lines:
        tally.add(line)
    return tally.report(nominal_rate)


def _rate(arrivals: Floats) -> float | None:
    return (len(arrivals) - 1) / float(arrivals[-1] - arrivals[0]) if len(arrivals) and arrivals[-1] > arrivals[0] else None


def _quantiles(values: Floats) -> Quantiles | None:
    return Quantiles(*map(float, np.percentile(values, QUANTILES))) if len(values) else None


def _pooled(gaps: Pool) -> Quantiles | None:
    return Quantiles(*gaps.percentiles(QUANTILES)) if gaps.size else None


def _goodput(good: int, ended: int, seconds: float) -> Goodput | None:
    return Goodput(good / ended, good / seconds) if ended and seconds else None


def _stalls(gaps: Pool, target: Target | None) -> Stalls | None:
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
