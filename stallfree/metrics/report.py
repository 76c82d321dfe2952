"""Timelines into a report: latencies, rates, stalls, and what share of an SLO was met. The numbers that users feel.

It needs each request's arrival and the times of its tokens, and knows nothing of where they were measured: by a client over HTTP,
by the engine's records, or by a simulator. Times in seconds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from stallfree.core.slo import Slo, Target
from stallfree.metrics.timeline import Timeline

COMPLETED = ("stop", "length")
"""Reasons for which a request ends that has got all it asked for; any other is an error."""
STALL = 5.0
"""Without a target for TBT a gap is a stall from so many median gaps on: the paper's strict SLO in decode iterations."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Quantiles:
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Stalls:
    """Gaps between two tokens of a request of more than `after_s` seconds: how many, and their share of all gaps."""

    after_s: float
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests per second: `nominal` as they were wanted, `actual` as they arrived. None if not known, or for a single request."""

    nominal: float | None
    actual: float | None


@dataclass(frozen=True, slots=True)
class Attainment:
    """`in_time`: the share of the cases within the target; None, and not met, if there was no case."""

    target: str
    in_time: float | None
    met: bool


@dataclass(frozen=True, slots=True)
class Report:
    """A run in numbers. `completed`: requests that got all they asked for; `errors`: how many ended otherwise, by kind;
    `unfinished`: how many had not ended. `seconds`: from the first arrival to the last token; `output_tokens_per_s` over these.

    Over the requests: `ttft_s` (with a first token), `tpot_s` (mean gap, of those with two), `e2e_s` (arrival to last token, of the
    completed). `tbt_s` over the gaps of all requests, pooled. `slo_attainment` by the target's name. None: there was no case.
    """

    completed: int
    errors: dict[str, int]
    unfinished: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    request_rate: Rate
    ttft_s: Quantiles | None
    tbt_s: Quantiles | None
    tpot_s: Quantiles | None
    e2e_s: Quantiles | None
    stalls: Stalls | None
    slo_attainment: dict[str, Attainment]


def report(lines: Iterable[Timeline], slo: Slo | None = None, nominal_rate: float | None = None) -> Report:
    """What `lines` amount to. A request that ended before its first token is late for `ttft`, however soon it ended. Under `tpot`
    the token after i others is due i times the target after the first was due: by `ttft`, or when it came if that is no target.
    """
    lines, slo = list(lines), slo or Slo()
    firsts = np.array([line.ttft for line in lines if line.ttft is not None])
    gaps = [np.array(line.gaps) for line in lines if len(line.tokens) > 1]
    pooled = np.concatenate(gaps) if gaps else np.array([])
    arrivals = sorted(line.arrival for line in lines)
    reasons = Counter(line.reason for line in lines if line.reason is not None)
    output_tokens = sum(len(line.tokens) for line in lines)
    seconds = max((line.tokens[-1] for line in lines if line.tokens), default=0.0) - arrivals[0] if output_tokens else 0.0
    attainment = {}
    if slo.ttft:
        lost = sum(line.reason is not None and not line.tokens for line in lines)
        attainment["ttft"] = _attainment(slo.ttft, np.append(firsts, [np.inf] * lost))
    if slo.tbt:
        attainment["tbt"] = _attainment(slo.tbt, pooled)
    if slo.tpot:
        attainment["tpot"] = _attainment(slo.tpot, _behind(lines, slo.tpot, slo.ttft) + slo.tpot.seconds)
    return Report(
        completed=sum(reasons[reason] for reason in COMPLETED),
        errors={reason: n for reason, n in reasons.most_common() if reason not in COMPLETED},
        unfinished=len(lines) - reasons.total(),
        prompt_tokens=sum(line.prompt_tokens for line in lines),
        output_tokens=output_tokens,
        seconds=seconds,
        output_tokens_per_s=output_tokens / seconds if seconds else 0.0,
        request_rate=Rate(nominal_rate, _rate(arrivals)),
        ttft_s=_quantiles(firsts),
        tbt_s=_quantiles(pooled),
        tpot_s=_quantiles(np.array([each.mean() for each in gaps])),
        e2e_s=_quantiles(np.array([line.tokens[-1] - line.arrival for line in lines if line.tokens and line.reason in COMPLETED])),
        stalls=_stalls(pooled, slo.tbt),
        slo_attainment=attainment,
    )


def table(reports: Mapping[str, Report]) -> list[list[str]]:
    """Reports side by side as text: a row of their names, then a row for each figure. Times in milliseconds."""
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
    for name in ("ttft", "tbt", "tpot", "e2e"):
        found = [getattr(r, f"{name}_s") for r in each]
        for f in fields(Quantiles):
            values = (None if q is None else getattr(q, f.name) * 1e3 for q in found)
            rows.append([f"{name.upper()} {f.name}, ms", *map(_number, values)])
    rows.append(["stalls", *("-" if r.stalls is None else f"{r.stalls.count} (> {r.stalls.after_s * 1e3:.4g} ms)" for r in each)])
    for name, target in dict.fromkeys((name, attained.target) for r in each for name, attained in r.slo_attainment.items()):
        rows.append([f"within {name}={target}", *(_in_time(r.slo_attainment.get(name)) for r in each)])
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _in_time(attained: Attainment | None) -> str:
    if attained is None or attained.in_time is None:
        return "-"
    return f"{attained.in_time:.2%} {'met' if attained.met else 'MISSED'}"


def _rate(arrivals: Sequence[float]) -> float | None:
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]) if len(arrivals) > 1 and arrivals[-1] > arrivals[0] else None


def _quantiles(values: Floats) -> Quantiles | None:
    return Quantiles(*map(float, np.percentile(values, [50, 90, 99, 100]))) if len(values) else None


def _stalls(gaps: Floats, target: Target | None) -> Stalls | None:
    if not len(gaps):
        return None
    # Tokens that come together leave gaps of 0; their share says nothing about the pace, and the median must not become 0.
    apart = gaps[gaps > 0]
    after = target.seconds if target else STALL * float(np.median(apart)) if len(apart) else 0.0
    count = int((gaps > after).sum())
    return Stalls(after, count, count / len(gaps))


def _attainment(target: Target, seconds: Floats) -> Attainment:
    if not len(seconds):
        return Attainment(str(target), None, False)
    late = int((seconds > target.seconds).sum())
    return Attainment(str(target), 1 - late / len(seconds), late <= target.late_share * len(seconds) + 1e-9)


def _behind(lines: Iterable[Timeline], pace: Target, first: Target | None) -> Floats:
    """For each token after a request's first: seconds from when it was due until it came."""
    found = [np.array([])]
    for line in lines:
        if len(line.tokens) > 1:
            due = line.arrival + first.seconds if first else line.tokens[0]
            found.append(np.array(line.tokens[1:]) - due - pace.seconds * np.arange(1, len(line.tokens)))
    return np.concatenate(found)
