"""What a policy, a machine and a load would make of each other: arrivals in, timelines out, with records and spans if wanted.

It knows no rates, targets or names of models: what arrives is drawn elsewhere, and what it was worth is judged by `metrics`.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from struct import pack
from zlib import crc32

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import CostModel, Policy
from stallfree.core.record import StepRecord
from stallfree.core.request import Refused, Request
from stallfree.core.scheduler import Scheduler
from stallfree.metrics.timeline import Timeline
from stallfree.sim.cluster import serve
from stallfree.sim.replica import LEAP, Replica, Span, script
from stallfree.sim.routers import load
from stallfree.workload.prompt import Prompt
from stallfree.workload.workload import Arrival

STOP = -1
"""The token that ends an output before `max_tokens`; no prompt has it."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """`lines`: the requests' timelines, of each replica in the order in which they ended; none if they were handed on. `records`
    and `spans`: those of each replica, where they were asked for.
    """

    replicas: Sequence[Replica]
    lines: list[Timeline]
    records: list[list[StepRecord]]
    spans: list[list[Span]]

    @property
    def iterations(self) -> int:
        return sum(replica.iterations for replica in self.replicas)

    @property
    def bubbles(self) -> float:
        """Share of the stages' time, while their replica had an iteration under way, in which they did nothing."""
        active = sum(replica.active_s * len(replica.busy_s) for replica in self.replicas)
        return 1 - sum(sum(replica.busy_s) for replica in self.replicas) / active if active else 0.0


def simulate(
    arrivals: Iterable[Arrival],
    policy: Callable[[], Policy],
    cost: CostModel,
    capacity: Capacity,
    limits: Limits | None = None,
    *,
    replicas: int = 1,
    router: str = "round-robin",
    reuse: bool = False,
    max_tokens: int | None = None,
    ended: Callable[[Timeline], None] | None = None,
    records: bool = False,
    spans: bool = False,
    leap: int = LEAP,
    between_s: float = 0.0,
    scatter: Sequence[float] = (),
) -> Simulation:
    """Serve `arrivals`, in the order of their times, on `replicas` of an engine with `capacity` (of which `depth` is the number of
    pipeline stages) and `limits`, each with a policy of its own; `cost` says what a whole iteration takes.

    `reuse` shares the KV of equal beginnings of prompts. Each request gets as many tokens as its arrival says; it asks for these,
    or for `max_tokens` if that is more and fits, which matters to a policy that reserves KV for them. `ended`: called with the
    timeline of each request that ended, which then is not kept. `leap` 1 takes every iteration by itself, to the same end.
    `between_s` pass from each iteration's end to the next one's planning. `scatter`: factors of which each iteration's time gets
    one, at random by the moment of its planning.

    Raises ValueError for a request that does not fit, arrivals out of order, an unknown router, or no replicas.
    """
    if replicas < 1:
        raise ValueError(f"{replicas} replicas serve nobody; give 1 or more")
    choose = load(router)
    lines: list[Timeline] = []
    made = Simulation([], lines, [[] for _ in range(replicas)], [[] for _ in range(replicas)])
    end = lines.append if ended is None else ended
    several = [
        Replica(
            Scheduler(policy(), capacity, limits, reuse=reuse),
            cost,
            ended=lambda request: end(request.sampling.line),  # type: ignore[attr-defined]
            record=made.records[number].append if records else None,
            span=made.spans[number].append if spans else None,
            leap=leap,
            between_s=between_s,
            slowness=scattering(scatter) if scatter else None,
        )
        for number in range(replicas)
    ]
    with uncollected():
        serve(scripted(arrivals, several[0].scheduler, max_tokens), several, choose)
    return Simulation(several, lines, made.records, made.spans)


def scattering(scatter: Sequence[float]) -> Callable[[float], float]:
    """One of `scatter` for a moment, as if at random. By the moment and not in turn: an iteration gets the same in a leap, also in
    one that is cut short, as by itself.
    """

    def slowness(moment: float) -> float:
        return scatter[crc32(pack("d", moment)) % len(scatter)]

    return slowness


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for cycles of garbage: a simulation makes none, and with hundreds of replicas every look walks through
    millions of blocks and times again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def scripted(arrivals: Iterable[Arrival], scheduler: Scheduler, max_tokens: int | None) -> Iterator[Request]:
    own = STOP
    for number, arrival in enumerate(arrivals):
        own -= 1
        prompt = Prompt(arrival.prompt_tokens, arrival.blocks, own)
        length = arrival.output_tokens
        asked = length if max_tokens is None else max(length, min(max_tokens, scheduler.ledger.max_len - arrival.prompt_tokens))
        request = Request(str(number), prompt, asked, stop_ids=frozenset({STOP}), arrival=arrival.at)
        try:
            scheduler.ledger.validate(request)
        except Refused as refused:
            raise ValueError(f"request {number}, at {arrival.at:g} s, can never be served: {refused}") from None
        yield script(request, [own] * length if asked == length else [*[own] * (length - 1), STOP])
