"""Open-loop load: each request is sent when it is due, whatever happened to earlier ones, as independent users do.

Times count from when a request was due, so that no wait in the client is hidden. A client that is often late did not make the
planned load, so its run is not valid. It knows neither how arrivals were drawn nor the targets of the latencies.
"""

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stallfree.bench.client import Client, Failed
from stallfree.bench.dialect import Dialect
from stallfree.metrics.report import COMPLETED, Report
from stallfree.metrics.timeline import Timeline
from stallfree.workload.workload import Arrival

MOST_LATE_S = 0.05
"""Seconds that the client may send 1 request in 100 late: far below any sensible target for TTFT."""


@dataclass(slots=True)
class Load:
    """A run as its client saw it, in seconds from its start. `lines`: the requests sent, of which `ended` have ended. `late_s`:
    from when each was due until it was sent. `short`, `long`: completed requests with fewer or more tokens than requested.
    `cpu_share`: of one core, by the client. `messages`: the first of each kind of error.
    """

    server: str
    planned: int
    lines: list[Timeline] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    ended: int = 0
    short: int = 0
    long: int = 0
    cpu_share: float = 0.0
    messages: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def behind(self) -> str | None:
        """The error in words if the client was too late; else None."""
        late = _percentile(self.late_s, 99)
        if late <= MOST_LATE_S:
            return None
        return (
            f"the client fell behind its own schedule: 1 request in 100 was sent {late * 1e3:.0f} ms late or more, "
            f"{MOST_LATE_S * 1e3:.0f} ms are allowed; lower the rate, or give the client its own machine"
        )

    @property
    def problems(self) -> list[str]:
        """The reasons why the run is not valid; empty if it is."""
        problems = []
        if self.interrupted:
            problems.append(f"interrupted after {len(self.lines)} of {self.planned} requests were sent")
        if self.behind:
            problems.append(self.behind)
        if lost := sum(line.reason == "connection" for line in self.lines):
            problems.append(f"{lost} requests found no server: {self.messages['connection']}")
        if self.long:
            problems.append(
                f"{self.long} requests got more tokens than they asked for, so this server's events are no tokens, and it reports "
                "no usage that counts them"
            )
        if not any(line.reason in COMPLETED for line in self.lines):
            problems.append(f"no request was completed: {'; '.join(self.messages.values()) or 'none had ended'}")
        return problems

    def as_dict(self, report: Report) -> dict[str, Any]:
        """The run as JSON values: its validity, the `report`, and the client's own figures."""
        client = {
            "late_p99_s": _percentile(self.late_s, 99),
            "late_max_s": _percentile(self.late_s, 100),
            "cpu_share": self.cpu_share,
        }
        valid = {"valid": not self.problems, "problems": self.problems, "server": self.server}
        return valid | asdict(report) | {"short": self.short, "long": self.long, "messages": self.messages, "client": client}


async def load(client: Client, dialect: Dialect, arrivals: Sequence[Arrival], tick: Callable[[Load], None]) -> Load:
    """Send `arrivals` when they are due, and wait for their ends. It calls `tick` when a request is sent and when it has ended. If
    it is cancelled, it cancels the running requests and returns the run so far.
    """
    _allow_connections(len(arrivals))
    loop, rng = asyncio.get_running_loop(), np.random.default_rng()
    run = Load(str(dialect), len(arrivals))
    running: set[asyncio.Task[None]] = set()

    async def serve(arrival: Arrival, line: Timeline, body: bytes) -> None:
        run.late_s.append(loop.time() - origin - arrival.at)
        run.lines.append(line)
        tick(run)
        times: list[float] = []
        try:
            events = await client.stream(body, arrival.output_tokens, times)
        except Failed as failed:
            line.reason = failed.kind
            run.messages.setdefault(failed.kind, str(failed))
        else:
            line.reason = "length"
            line.prompt_tokens = events.prompt_tokens or line.prompt_tokens
            run.short += len(times) < arrival.output_tokens
            run.long += len(times) > arrival.output_tokens
        finally:
            line.tokens = [t - origin for t in times]
        line.finished = loop.time() - origin
        run.ended += 1
        tick(run)

    worked, origin = time.process_time(), loop.time()
    try:
        for number, arrival in enumerate(arrivals):
            body = dialect.body(rng, arrival.prompt_tokens, arrival.output_tokens, _own(arrival))
            await asyncio.sleep(origin + arrival.at - loop.time())
            task = asyncio.create_task(serve(arrival, _line(number, arrival), body))
            running.add(task)
            task.add_done_callback(running.discard)
        while running:
            await asyncio.wait(running)
    except asyncio.CancelledError:
        run.interrupted = True
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    run.cpu_share = (time.process_time() - worked) / (loop.time() - origin)
    return run


def _line(number: int, arrival: Arrival) -> Timeline:
    return Timeline(
        str(number),
        arrival.at,
        arrival.prompt_tokens,
        tenant=arrival.tenant,
        service_class=arrival.service_class,
        priority=arrival.priority,
    )


def _own(arrival: Arrival) -> dict[str, Any]:
    """The fields that say whose a request is and what it is promised, those that differ from their defaults. The class is named in
    OpenAI's field and in this project's, so a server needs to know only one of them.
    """
    fields: dict[str, Any] = {}
    if arrival.tenant:
        fields["user"] = arrival.tenant
    if arrival.service_class:
        fields |= {"service_tier": arrival.service_class, "slo": {"class": arrival.service_class}}
    if arrival.priority:
        fields["priority"] = arrival.priority
    return fields


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


def _allow_connections(most: int) -> None:
    """Raise the limit of open files: each running request needs one, and the default may be too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
