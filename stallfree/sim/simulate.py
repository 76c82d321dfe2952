"""A simulation of a policy on a machine under a load: arrivals in, timelines out, with records and spans if wanted.

It knows no rates, targets or model names: arrivals are drawn elsewhere, and `metrics` judges the result.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from struct import pack
from types import MappingProxyType
from typing import NamedTuple, Protocol
from zlib import crc32

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import CostModel, Policy, Priced
from stallfree.core.record import StepRecord
from stallfree.core.request import Refused, Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.core.speculation import Speculation
from stallfree.metrics.report import Report, Tally, Targets
from stallfree.metrics.timeline import Timeline
from stallfree.sim.cluster import serve
from stallfree.sim.guesses import Chance
from stallfree.sim.replica import LEAP, Replica, Span, script
from stallfree.sim.routers import load
from stallfree.sim.shelf import Shelf
from stallfree.workload.prompt import Prompt
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

STOP = -1
"""The token that ends an output before `max_tokens`; no prompt has it."""


class Machine(Protocol):
    """What a simulation says of a machine. For the values see `Replica`."""

    @property
    def iterations(self) -> int: ...
    @property
    def active_s(self) -> float: ...
    @property
    def busy_s(self) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Simulation:
    """`lines`: the requests' timelines, in the order in which they ended in each replica; empty if `ended` took them. `records`,
    `spans`: those of each replica, if wanted.
    """

    replicas: Sequence[Machine]
    lines: list[Timeline]
    records: list[list[StepRecord]]
    spans: list[list[Span]]

    @property
    def iterations(self) -> int:
        return sum(replica.iterations for replica in self.replicas)

    @property
    def bubbles(self) -> float:
        """The share of time in which a stage was idle, while its replica had an iteration under way."""
        active = sum(replica.active_s * len(replica.busy_s) for replica in self.replicas)
        return 1 - sum(sum(replica.busy_s) for replica in self.replicas) / active if active else 0.0


class Simulates(ABC):
    """A deployment ready to run. A trial is a run that keeps no timelines."""

    @abstractmethod
    def run(self, arrivals: Iterable[Arrival], *, ended: Callable[[Timeline], None] | None = None) -> object:
        """Serve `arrivals`. `ended`: called with the timeline of each request that ends; then no timelines are kept."""

    def trial(self, traffic: Traffic, rate: float | None, seed: int, slo: Targets) -> Report:
        """Serve `traffic` at `rate`, drawn with `seed`. Returns the report against `slo`."""
        tally = Tally(slo)
        self.run(traffic.stream(rate, seed), ended=tally.add)
        return tally.report(rate)


class Drafts(NamedTuple):
    """Guesses of a `proposer`, at most `most` for a stream in an iteration. `cost` prices them if the policy has no prices."""

    proposer: Chance
    most: int
    cost: CostModel


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
    front_s: float = 0.0,
    scatter: Sequence[float] = (),
    classes: Mapping[str, Slo] = MappingProxyType({}),
    weights: Mapping[str, float] = MappingProxyType({}),
    serve_late: bool = True,
    shelf: Shelf | None = None,
    drafts: Drafts | None = None,
) -> Simulation:
    """Serve `arrivals`, in the order of their times, on `replicas` of an engine with `capacity` (its `depth` is the number of
    pipeline stages) and `limits`. Each replica has its own policy. `cost`: the seconds of an iteration, over all stages.

    With `reuse`, equal prefixes share KV. Each request gets as many tokens as its arrival says. It asks for these, or for
    `max_tokens` if that is more and fits; this matters if the policy reserves KV for them. `ended`: called with the timeline of
    each request that ends; then no timelines are kept. `leap` 1 takes the iterations one by one, with the same result. `between_s`
    pass from an iteration's end to the next planning, and `front_s` from a request's arrival until the scheduler has it and its
    first token's way back. `scatter`: factors; each iteration's time is multiplied by one of them, chosen at random by the moment
    of its planning. `classes`: the targets of requests that name a class; `weights`: of tenants, 1 for others. `serve_late`: see
    `Replica`. `shelf`: the adapters, if requests ask for any. `drafts`: guesses of what follows, if there are any.

    Raises ValueError for a request that does not fit, arrivals out of order, an unknown router, or no replicas.
    """
    if replicas < 1:
        raise ValueError(f"there cannot be {replicas} replicas; give 1 or more")
    choose = load(router)
    lines: list[Timeline] = []
    result = Simulation([], lines, [[] for _ in range(replicas)], [[] for _ in range(replicas)])
    end = lines.append if ended is None else ended
    engines = [
        Replica(
            holding(guessing(policy(), capacity, limits, reuse, drafts), shelf),
            cost,
            ended=lambda request: end(request.sampling.line),  # type: ignore[attr-defined]
            record=result.records[number].append if records else None,
            span=result.spans[number].append if spans else None,
            leap=leap,
            between_s=between_s,
            slowness=scattering(scatter) if scatter else None,
            serve_late=serve_late,
            load_s=None if shelf is None else shelf.load_s,
            draft_s=0.0 if drafts is None else drafts.proposer.draft_s,
        )
        for number in range(replicas)
    ]
    shelves = () if shelf is None else (shelf,)
    with uncollected():
        serve(scripted(arrivals, engines[0].scheduler, max_tokens, front_s, classes, weights, shelves), engines, choose)
    return Simulation(engines, lines, result.records, result.spans)


def guessing(policy: Policy, capacity: Capacity, limits: Limits | None, reuse: bool, drafts: Drafts | None) -> Scheduler:
    """A scheduler whose iterations have `drafts`."""
    if drafts is None:
        return Scheduler(policy, capacity, limits, reuse=reuse)
    cost = policy.cost if isinstance(policy, Priced) else drafts.cost
    return Scheduler(policy, capacity, limits, reuse=reuse, speculation=Speculation(drafts.proposer, cost, drafts.most))


def holding(scheduler: Scheduler, shelf: Shelf | None) -> Scheduler:
    """The scheduler, which knows the adapters of `shelf`, also those that will be met later."""
    if shelf is not None:
        scheduler.ledger.adapters.known = shelf.known
    return scheduler


def scattering(scatter: Sequence[float]) -> Callable[[float], float]:
    """Gives one of `scatter` for a moment, as if at random. It depends on the moment alone, so that an iteration gets the same
    factor in a leap, even one cut short, as by itself.
    """

    def slowness(moment: float) -> float:
        return scatter[crc32(pack("d", moment)) % len(scatter)]

    return slowness


@contextmanager
def uncollected() -> Iterator[None]:
    """Switches the garbage collector off. A simulation makes no reference cycles, and with hundreds of replicas each collection
    would walk through millions of blocks and times.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def scripted(
    arrivals: Iterable[Arrival],
    scheduler: Scheduler,
    max_tokens: int | None,
    front_s: float = 0.0,
    classes: Mapping[str, Slo] = MappingProxyType({}),
    weights: Mapping[str, float] = MappingProxyType({}),
    shelves: Sequence[Shelf] = (),
) -> Iterator[Request]:
    own = STOP  # counted down, so that each request has its own token
    for number, arrival in enumerate(arrivals):
        own -= 1
        if arrival.adapter:
            if not shelves:
                raise ValueError("the requests ask for adapters, and it is not said how large these are; give --rank 8")
            for shelf in shelves:
                shelf.meet(arrival.adapter)
        prompt = Prompt(arrival.prompt_tokens, arrival.blocks, own)
        length = arrival.output_tokens
        most = length if max_tokens is None else max(length, min(max_tokens, scheduler.ledger.max_len - arrival.prompt_tokens))
        request = Request(
            str(number),
            prompt,
            most,
            stop_ids=frozenset({STOP}),
            arrival=arrival.at + front_s,
            priority=arrival.priority,
            tenant=arrival.tenant,
            weight=weights.get(arrival.tenant, 1.0),
            slo=classes.get(arrival.service_class),
            service_class=arrival.service_class,
            adapter=arrival.adapter,
        )
        try:
            scheduler.ledger.validate(request)
        except Refused as refused:
            most = scheduler.ledger.max_len
            raise ValueError(
                f"request {number}, at {arrival.at:g} s, can never be served: {refused}. --max-total {most} draws only requests "
                "that fit; --max-model-len, and more KV, allow longer ones"
            ) from None
        yield script(request, [own] * length if most == length else [*[own] * (length - 1), STOP], arrival.at)
