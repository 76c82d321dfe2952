"""Records into one timeline per request, and timelines into the numbers that users feel: TTFT, TBT, and stalls with their cause.

It reads StepRecords and nothing else, so a live run and a simulated one are measured by the same lines.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from stallfree.core.record import StepRecord


@dataclass(slots=True)
class Timeline:
    """One request's life, in the run's seconds: `arrival`, when it was first `scheduled`, when each output token came (`tokens`),
    when it `finished` and why (`reason`); sizes in tokens. None for what has not happened.
    """

    id: str
    arrival: float
    prompt_tokens: int
    scheduled: float | None = None
    tokens: list[float] = field(default_factory=list)
    finished: float | None = None
    reason: str | None = None
    stalls: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first output token."""
        return self.tokens[0] - self.arrival if self.tokens else None

    @property
    def gaps(self) -> list[float]:
        """TBT: seconds between consecutive output tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def timelines(records: Iterable[StepRecord]) -> dict[str, Timeline]:
    """Every request that arrived in these records, by id."""
    found: dict[str, Timeline] = {}
    for r in records:
        for request in r.arrived:
            found[request.id] = Timeline(request.id, request.arrival, request.prompt_tokens)
        for id, _, _ in r.work:
            if found[id].scheduled is None:
                found[id].scheduled = r.t_start
        for id in r.emitted:
            found[id].tokens.append(r.t_end)
        for id in r.stalled:
            found[id].stalls += 1
        for id, reason, _ in r.finished:
            found[id].finished, found[id].reason = r.t_end, reason
    return found


@dataclass(frozen=True, slots=True)
class Report:
    """A run in numbers. Seconds; percentiles over the requests (TTFT) and over all gaps pooled (TBT). `stalls`: ready decodes that
    an iteration left out. `late`: output tokens that came more than `late_after` after the one before.
    """

    requests: int
    output_tokens: int
    ttft_p50: float
    tbt_p50: float
    tbt_p99: float
    tbt_max: float
    stalls: int
    late: int
    late_after: float


def report(lines: Sequence[Timeline], late_after: float) -> Report:
    """Raises ValueError if no request got two tokens: there is nothing to measure."""
    gaps = np.array([gap for line in lines for gap in line.gaps])
    ttfts = np.array([line.ttft for line in lines if line.ttft is not None])
    if not len(gaps):
        raise ValueError(f"none of {len(lines)} requests got two tokens, so there are no gaps to measure")
    p50, p99 = np.percentile(gaps, [50, 99])
    return Report(
        requests=len(lines),
        output_tokens=sum(len(line.tokens) for line in lines),
        ttft_p50=float(np.median(ttfts)),
        tbt_p50=float(p50),
        tbt_p99=float(p99),
        tbt_max=float(gaps.max()),
        stalls=sum(line.stalls for line in lines),
        late=int((gaps > late_after).sum()),
        late_after=late_after,
    )
