"""One timeline per request: when it arrived, and when each of its tokens came. It makes timelines from records.

It reads StepRecords and nothing else, so the same lines of code measure a live run and a simulated one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from stallfree.core.record import StepRecord


@dataclass(slots=True)
class Timeline:
    """One request's life, in the run's seconds: its `arrival`, when it was first `scheduled`, when each output token came
    (`tokens`), when it `finished` and why (`reason`). None: it has not happened. `stalls`: iterations that left it out as a ready
    decode; only records can tell them. `cached`: prompt tokens found in the prefix cache when it was last admitted; a client does
    not know them. `tenant`, `service_class`, `priority`: the request's.
    """

    id: str
    arrival: float
    prompt_tokens: int
    scheduled: float | None = None
    tokens: list[float] = field(default_factory=list)
    finished: float | None = None
    reason: str | None = None
    stalls: int = 0
    cached: int | None = None
    tenant: str = ""
    service_class: str = ""
    priority: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first output token."""
        return self.tokens[0] - self.arrival if self.tokens else None

    @property
    def gaps(self) -> list[float]:
        """TBT: seconds between consecutive output tokens."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def timelines(records: Iterable[StepRecord]) -> dict[str, Timeline]:
    """The timelines of all requests that arrived in these records, by id."""
    lines: dict[str, Timeline] = {}
    for r in records:
        for request in r.arrived:
            lines[request.id] = Timeline(request.id, request.arrival, request.prompt_tokens, priority=request.priority)
        for id, tenant, _ in r.tenants:
            lines[id].tenant = tenant
        for id, service_class in r.classes:
            lines[id].service_class = service_class
        for id, found in r.cached:
            lines[id].cached = min(found, lines[id].prompt_tokens)
        for id, t in r.sampled_elsewhere:
            if lines[id].scheduled is None:
                lines[id].scheduled = t  # until it is known when it was asked for
            lines[id].tokens.append(t)
        for d in r.delivered:
            lines[d.id].scheduled, lines[d.id].cached = d.asked, d.cached
        for id, _, _ in r.work:
            if lines[id].scheduled is None:
                lines[id].scheduled = r.t_start
        for id in r.emitted:
            lines[id].tokens.append(r.t_end)
        for id in r.stalled:
            lines[id].stalls += 1
        for id, reason, _ in r.finished:
            tokens = lines[id].tokens
            lines[id].finished = r.t_end if reason in ("abort", "error") or not tokens else tokens[-1]
            lines[id].reason = reason
    return lines
