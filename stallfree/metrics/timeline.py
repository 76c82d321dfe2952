"""One timeline per request: when it arrived, and when each of its tokens came; and how records become timelines.

It reads StepRecords and nothing else, so a live run and a simulated one are measured by the same lines.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from stallfree.core.record import StepRecord


@dataclass(slots=True)
class Timeline:
    """One request's life, in the run's seconds: `arrival`, when it was first `scheduled`, when each output token came (`tokens`),
    when it `finished` and why (`reason`); sizes in tokens. None for what has not happened. `stalls`: iterations that left it out as
    a ready decode, which only records can tell.
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
        for d in r.delivered:
            found[d.id].scheduled = d.asked
            found[d.id].tokens.append(d.t)
        for id, _, _ in r.work:
            if found[id].scheduled is None:
                found[id].scheduled = r.t_start
        for id in r.emitted:
            found[id].tokens.append(r.t_end)
        for id in r.stalled:
            found[id].stalls += 1
        for id, reason, _ in r.finished:
            came = found[id].tokens
            found[id].finished = r.t_end if reason in ("abort", "error") or not came else came[-1]
            found[id].reason = reason
    return found
