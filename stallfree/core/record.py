"""A record: one iteration as a line of JSON. A run, real or simulated, is a list of records. Metrics, plots, calibration and replay
read records and nothing else. Records hold no token values and no text.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import Any, NamedTuple, Self

from stallfree.core.ledger import Ledger, Limits
from stallfree.core.plan import Capacity, Plan, StepResult, Work
from stallfree.core.request import Request
from stallfree.core.slo import Slo

VERSION = 3
RARE = (
    "extra_rows", "constrained", "scored", "deferred", "drafted", "paused", "tenants", "classes", "predicted", "refused",
    "adapters", "loaded", "restored", "shown",
)  # fmt: skip
"""Fields of a record that are written only if they hold anything."""


class Arrived(NamedTuple):
    """A request that arrived: `arrival` in seconds, sizes in tokens, `slo` its own latency targets in words ("" for none), `blocks`
    the fingerprints of its prompt's full KV blocks, if they were taken."""

    id: str
    arrival: float
    prompt_tokens: int
    max_tokens: int
    priority: int
    slo: str = ""
    blocks: tuple[int, ...] = ()


class Finished(NamedTuple):
    """A request that ended, the reason, and the fingerprints of its full KV blocks after those of the prompt."""

    id: str
    reason: str
    blocks: tuple[int, ...] = ()


class Refusal(NamedTuple):
    """A request that was refused at `t` (s, the run's), before it came to the scheduler: its tenant, and the reason in words."""

    t: float
    tenant: str
    why: str


class Delivered(NamedTuple):
    """A request whose prompt was computed elsewhere. Its blocks were reserved and its KV transfer requested at `asked` (seconds);
    at `t` (seconds) KV and one more token were here. `cached` tokens had been here before. `num_bytes` of KV came, in `seconds` of
    copying, sending and receiving, without waits. `cut`: only so many tokens of the prompt came, and no token with them; None: all
    came."""

    id: str
    asked: float
    t: float
    cached: int
    num_bytes: int
    seconds: float
    cut: int | None = None


class Loaded(NamedTuple):
    """An adapter whose weights are in KV blocks since `t` (s): its key, its `rank`, the number of its `blocks`, and when it was
    asked for."""

    key: str
    rank: int
    blocks: int
    asked: float
    t: float


class Fingerprints:
    """Numbers that are equal for two KV blocks if these and all blocks before them are equal. They tell nothing else about the
    content. Replay finds shared prefixes by them. Each run has its own secret `key`, which is never written.
    """

    def __init__(self, block_size: int, key: bytes):
        self._block_size, self._key = block_size, key

    def prompt(self, request: Request) -> tuple[int, ...]:
        return tuple(self._blocks(request, len(request.prompt)))

    def output(self, request: Request) -> tuple[int, ...]:
        return tuple(self._blocks(request, request.num_tokens))[len(request.prompt) // self._block_size :]

    def _blocks(self, request: Request, length: int) -> Iterator[int]:
        digest = request.root.encode()
        for start in range(0, length - self._block_size + 1, self._block_size):
            content = array("q", request.tokens(start, start + self._block_size)).tobytes()
            digest = blake2b(digest + content, digest_size=6, key=self._key).digest()
            yield int.from_bytes(digest)


@dataclass(frozen=True, slots=True)
class Run:
    """What all iterations of a run have in common: the first line of its file. `policy`: its name; `options`: the policy's; `slo`:
    in words; `cost`: the state of the cost model at the start, if the policy has one. `host_blocks`: KV blocks that host memory
    keeps, of which `host_moves` are moved each way in an iteration; `saved_blocks`: those that were there at the start.
    """

    policy: str
    capacity: Capacity
    limits: Limits
    reuse: bool = True
    slo: str = ""
    options: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    host_blocks: int = 0
    host_moves: int = 0
    saved_blocks: int = 0

    @property
    def targets(self) -> Slo | None:
        """The latency targets, parsed from `slo`; None if there are none."""
        return Slo.parse(self.slo) if self.slo else None

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps({"version": VERSION, "run": asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Raises ValueError for a line that does not begin a run of this version."""
        values = _values(line).get("run")
        if isinstance(values, dict):
            values = {"host_blocks": 0, "host_moves": 0, "saved_blocks": 0} | values
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(cls)}:
            raise ValueError(f"a record file begins with a line that describes the run; this one begins with {line[:80]!r}")
        values["capacity"], values["limits"] = Capacity(**values["capacity"]), Limits(**values["limits"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Times in seconds since the run's origin: planning began at `t_plan`, the executor at `t_start` and ended at `t_end`.

    `work`: (id, start, count) of each piece. `emitted`: ids that got a token, once for each token. `cached`: (id, tokens found in
    the prefix cache) of the requests admitted. `arrived`, `finished`: since the last record. `preempted`: ids. `stalled`: ids of
    the ready decodes that got no token. `num_running`, `num_waiting`, `free_blocks`: after the iteration. `budget` (tokens),
    `reason`, `limit_s`, `margin`: see `Plan`. `error`: the executor's, if it failed. `bubble_s`: see `StepResult`. `delivered`: KV
    transfers that ended since the last record. `recalled`: ids whose KV transfer failed; their prompts are computed here.
    `extra_rows`: (id, rows) of the requests in `arrived` whose sampling takes as long as that many plain rows. `constrained`: ids
    of those in `arrived` that are never planned ahead of their last token. `scored`: ids of those whose chunks are small and take
    no cached prefix. `deferred`: see `StepResult`. `drafted`: (id, tokens) of the decodes with drafts: the last tokens of their
    work. `paused`: ids of those that will not be planned ahead of their last token, as more may be guessed after it. `tenants`:
    (id, tenant, weight) of those in `arrived` with a tenant or a weight other than 1. `classes`: (id, class) of those with a class.
    `predicted`: (id, seconds from its arrival to its first token, as forecast then) of those with a forecast. `refused`: requests
    that were refused since the last record. `adapters`: (id, its adapter's key, the adapter's KV blocks and rank) of those with an
    adapter. `loaded`: adapters that were loaded since the last record. `restored`: see `Plan`; of a request in `cached`, these
    tokens are among the ones found. `shown`: (id, t) of each token that another engine sampled, and that was shown at `t` (s)
    while the KV was still on its way.
    """

    step: int
    t_plan: float
    t_start: float
    t_end: float
    work: list[tuple[str, int, int]]
    emitted: list[str]
    cached: list[tuple[str, int]]
    arrived: list[Arrived]
    finished: list[Finished]
    preempted: list[str]
    stalled: list[str]
    num_running: int
    num_waiting: int
    free_blocks: int
    budget: int
    reason: str
    limit_s: float | None = None
    margin: float | None = None
    error: str | None = None
    bubble_s: float = 0.0
    delivered: list[Delivered] = field(default_factory=list)
    recalled: list[str] = field(default_factory=list)
    extra_rows: list[tuple[str, int]] = field(default_factory=list)
    constrained: list[str] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)
    drafted: list[tuple[str, int]] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    tenants: list[tuple[str, str, float]] = field(default_factory=list)
    classes: list[tuple[str, str]] = field(default_factory=list)
    predicted: list[tuple[str, float]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    adapters: list[tuple[str, str, int, int]] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)
    restored: list[tuple[str, int]] = field(default_factory=list)
    shown: list[tuple[str, float]] = field(default_factory=list)

    @property
    def sampled_elsewhere(self) -> list[tuple[str, float]]:
        """(id, t) of each token that another engine sampled, in the order of the tokens of a request: `shown`, and those that came
        with delivered KV."""
        return [*self.shown, *((d.id, d.t) for d in self.delivered if d.cut is None)]

    @property
    def drafts(self) -> tuple[int, int]:
        """How many drafts were checked, and how many of them were right."""
        if not self.drafted:
            return 0, 0
        got = Counter(self.emitted)
        return sum(count for _, count in self.drafted), sum(min(max(0, got[id] - 1), count) for id, count in self.drafted)

    @classmethod
    def of(
        cls,
        plan: Plan,
        result: StepResult,
        ledger: Ledger,
        times: tuple[float, float, float],
        arrived: Sequence[Request],
        finished: Sequence[Request],
        prints: Fingerprints | None = None,
        *,
        dropped: Sequence[str] = (),
        delivered: Sequence[Delivered] = (),
        recalled: Sequence[str] = (),
        shown: Sequence[tuple[str, float]] = (),
        loaded: Sequence[Loaded] = (),
    ) -> Self:
        """The record of a completed plan. `times`: (t_plan, t_start, t_end). `dropped`: see `Completed`. `prints`: takes the
        fingerprints of KV blocks; None takes none.
        """
        ends = {r.id: r.num_tokens for r in finished}
        lost = {*dropped, *result.deferred, *(result.failed if result.error is None else [w.id for w in plan.work])}
        return cls(
            plan.step,
            *times,
            work=[(w.id, w.start, w.count) for w in plan.work],
            emitted=[w.id for w in plan.work if w.samples and w.id not in lost for _ in range(_emitted(w, result, ends))],
            cached=list(plan.cached),
            arrived=[
                Arrived(
                    r.id,
                    r.arrival,
                    len(r.prompt),
                    r.max_tokens,
                    r.priority,
                    "" if r.slo is None else str(r.slo),
                    () if prints is None else prints.prompt(r),
                )
                for r in arrived
            ],
            finished=[Finished(r.id, str(r.finish_reason), () if prints is None else prints.output(r)) for r in finished],
            preempted=list(plan.preempted),
            stalled=list(plan.stalled),
            num_running=len(ledger.running),
            num_waiting=ledger.num_waiting,
            free_blocks=ledger.pool.num_free,
            budget=plan.budget,
            reason=plan.reason,
            limit_s=plan.limit_s,
            margin=plan.margin,
            error=result.error,
            bubble_s=result.bubble_s,
            delivered=list(delivered),
            recalled=list(recalled),
            extra_rows=[(r.id, r.extra_rows) for r in arrived if r.extra_rows],
            constrained=[r.id for r in arrived if r.constrained],
            scored=[r.id for r in arrived if r.scored],
            deferred=sorted(result.deferred),
            paused=[r.id for r in ledger.running if r.paused],
            drafted=[(w.id, w.count - 1) for w in plan.work if w.decode and w.count > 1],
            tenants=[(r.id, r.tenant, r.weight) for r in arrived if r.tenant or r.weight != 1],
            classes=[(r.id, r.service_class) for r in arrived if r.service_class],
            predicted=[(r.id, r.predicted) for r in arrived if r.predicted is not None],
            adapters=[(r.id, r.adapter, *ledger.adapters.known.get(r.adapter, (0, 0))) for r in arrived if r.adapter],
            loaded=list(loaded),
            restored=list(plan.restored),
            shown=list(shown),
        )

    def to_json(self) -> str:
        """One line, without its end."""
        values = asdict(self)
        for name in RARE:
            if not values[name]:
                del values[name]
        return json.dumps({"version": VERSION, **values}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Raises ValueError for a line that is not a whole record of this version. `bubble_s` and the fields in `RARE` may be
        missing."""
        values: dict[str, Any] = {"bubble_s": 0.0} | {name: [] for name in RARE} | _values(line)
        if set(values) != {f.name for f in fields(cls)}:
            raise ValueError(f"a record of version {VERSION} has other fields than {line[:80]!r}")
        for name in ("work", "cached", "extra_rows", "drafted", "tenants", "classes", "predicted", "adapters", "restored", "shown"):
            values[name] = [tuple(row) for row in values[name]]
        values["arrived"] = [Arrived(*row)._replace(blocks=tuple(row[-1])) for row in values["arrived"]]
        values["delivered"] = [Delivered(*row) for row in values["delivered"]]
        values["refused"] = [Refusal(*row) for row in values["refused"]]
        values["loaded"] = [Loaded(*row) for row in values["loaded"]]
        values["finished"] = [Finished(*row)._replace(blocks=tuple(row[-1])) for row in values["finished"]]
        return cls(**values)


def _emitted(work: Work, result: StepResult, ends: Mapping[str, int]) -> int:
    """How many tokens a request got. `ends`: the tokens of requests that have ended, perhaps before the last that was sampled."""
    tokens = len(result.tokens.get(work.id, (0,)))
    return min(tokens, ends[work.id] - work.start - 1) if tokens > 1 and work.id in ends else tokens


def read(lines: Iterable[str]) -> tuple[Run, list[StepRecord]]:
    """A run and its records, from the lines of a file. Raises ValueError that names the first line that cannot be read."""
    run: Run | None = None
    records: list[StepRecord] = []
    for number, line in enumerate(lines, 1):
        try:
            if run is None:
                run = Run.from_json(line)
            else:
                records.append(StepRecord.from_json(line))
        except (TypeError, ValueError) as error:
            whole = f"; the lines before it are whole: `head -n {number - 1}` keeps them" if records else ""
            raise ValueError(f"line {number}: {error}{whole}") from None
    if run is None:
        raise ValueError("the file is empty; a record file begins with a line that describes the run")
    return run, records


def _values(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not a record, or one cut short: {line[:80]!r} ({error})") from None
    version = values.pop("version", None) if isinstance(values, dict) else None
    if version != VERSION:
        raise ValueError(
            f"not a record of version {VERSION} but of {version}: {line[:80]!r}; record the run again with this release"
        )
    return dict(values)
