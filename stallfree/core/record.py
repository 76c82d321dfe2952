"""What one iteration was, as one line of JSON. A run, real or simulated, is a list of these: metrics, plots, calibration and replay
read records and nothing else. Token values and text are not in them.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Self

from stallfree.core.plan import Plan, StepResult
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler

VERSION = 1


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Times in seconds since the run's origin: planning began at `t_plan`, the executor at `t_start` and ended at `t_end`.

    `work`: (id, start, count) of each piece. `emitted`: ids that got a token. `cached`: (id, tokens found in the prefix cache) of
    the requests admitted. `arrived`: (id, arrival, prompt tokens, max_tokens, priority) since the last record; `finished`:
    (id, reason), likewise. `preempted`, `stalled`: ids, the latter the ready decodes that got no token. `num_running`,
    `num_waiting`, `free_blocks`: after the iteration. `budget`: tokens, with its `reason`. `error`: the executor's, if it failed.
    """

    step: int
    t_plan: float
    t_start: float
    t_end: float
    work: list[tuple[str, int, int]]
    emitted: list[str]
    cached: list[tuple[str, int]]
    arrived: list[tuple[str, float, int, int, int]]
    finished: list[tuple[str, str]]
    preempted: list[str]
    stalled: list[str]
    num_running: int
    num_waiting: int
    free_blocks: int
    budget: int
    reason: str
    error: str | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        result: StepResult,
        scheduler: Scheduler,
        times: tuple[float, float, float],
        arrived: Iterable[Request],
        finished: Iterable[Request],
    ) -> Self:
        """The record of a completed plan; `times` are (t_plan, t_start, t_end)."""
        lost = result.failed if result.error is None else {w.id: result.error for w in plan.work}
        return cls(
            plan.step,
            *times,
            work=[(w.id, w.start, w.count) for w in plan.work],
            emitted=[w.id for w in plan.work if w.samples and w.id not in lost],
            cached=list(plan.cached),
            arrived=[(r.id, r.arrival, len(r.prompt), r.max_tokens, r.priority) for r in arrived],
            finished=[(r.id, str(r.finish_reason)) for r in finished],
            preempted=list(plan.preempted),
            stalled=list(plan.stalled),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.queue),
            free_blocks=scheduler.pool.num_free,
            budget=plan.budget,
            reason=plan.reason,
            error=result.error,
        )

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Raises ValueError for a line that is not a whole record of this version."""
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"not a record, or one cut short: {line[:80]!r} ({error})") from None
        if not isinstance(values, dict) or values.pop("version", None) != VERSION:
            raise ValueError(f"not a record of version {VERSION}: {line[:80]!r}")
        if set(values) != {f.name for f in fields(cls)}:
            raise ValueError(f"a record of version {VERSION} has other fields than {line[:80]!r}")
        for name in ("work", "cached", "arrived", "finished"):
            values[name] = [tuple(row) for row in values[name]]
        return cls(**values)
