"""The capacities of the parts of a deployment, each by itself: co-located replicas, prompts only, decodes only. From these follow
the pairs of pools that are worth a simulation.

A formula names the few splits of the model that may be best in each part; these are simulated. It does not know which unit wins.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import log
from statistics import fmean

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo
from stallfree.metrics.report import Report, Tally, Targets, by_class
from stallfree.planner.candidates import WAYS, Candidates, Shape, name, size, together
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Instance, Simulator
from stallfree.sim.split import SplitSimulator, unlimited
from stallfree.sim.trials import Tried
from stallfree.workload.traffic import Traffic

SHAPES = 3
"""At most this many splits of a model are tried for each part: the best by their estimated capacity."""
GAIN = 1.2
"""A split with pipeline stages, or a ring, is tried if, by estimate, it serves so many times as much as any other split. In
simulation, splits without stages serve 1.1 to 1.4 times their estimate, and pipelines 0.7 to 1.1 times, because stages wait for
each other. Pools have no rings: KV passes only between engines with as many groups, and a ring decodes slowly."""
DRAWN = 300
"""Requests that are drawn to find the mean lengths of a load."""

Capacities = Callable[[Mapping[str, tuple[Tried, Targets, float]]], Mapping[str, float]]
"""Finds the capacity of each simulator for its targets, from a first rate on."""


class Prompts:
    """Simulates a deployment that computes prompts up to the first token, and nothing after it."""

    def __init__(self, deployment: Deployment):
        self._simulator = Simulator(deployment)

    def trial(self, traffic: Traffic, rate: float | None, seed: int, slo: Targets) -> Report:
        tally = Tally(slo)
        self._simulator.run((replace(a, output_tokens=1) for a in traffic.stream(rate, seed)), ended=tally.add)
        return tally.report(rate)


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of `prompt` and `output`, and the prompt that 90 % of the prompts are not longer than."""

    prompt: float
    output: float
    long_prompt: int

    @classmethod
    def of(cls, traffic: Traffic) -> "Lengths":
        arrivals = list(replace(traffic, requests=DRAWN, duration=None, arrivals="poisson").stream(1.0, 0))
        prompts = sorted(a.prompt_tokens for a in arrivals)
        return cls(fmean(prompts), fmean(a.output_tokens for a in arrivals), prompts[len(prompts) * 9 // 10])


@dataclass(frozen=True)
class Estimate:
    """Requests per second of a replica, by formula: all of each request, prompts alone, decodes alone."""

    whole: float
    prompts: float
    decodes: float


def estimate(instance: Instance, lengths: Lengths, slo: Slo) -> Estimate:
    """A replica that always runs as many decodes as KV and the target allow. Prompts alone wait for each other as in an M/D/1 queue
    (DistServe, OSDI'24, section 3.1) whose waits are taken as exponential: 90 % of them are below log(10) times their mean.

    A pipeline of n stages has n iterations under way, each of them as long as it would be alone.
    """
    cost, capacity, depth = instance.cost, instance.capacity, instance.capacity.depth
    middle = int(lengths.prompt + lengths.output / 2)
    most = min(Deployment().max_seqs, capacity.num_blocks * capacity.block_size // (middle + 1))
    decodes = max(1, most // depth)
    pace = slo.tbt or slo.tpot
    while decodes > 1 and pace is not None and cost.seconds([(middle, 1)] * decodes) > pace.seconds:
        decodes = decodes * 3 // 4
    prompt = cost.seconds([(0, max(1, int(lengths.prompt)))]) / depth
    output = lengths.output * cost.seconds([(middle, 1)] * decodes) / decodes / depth
    spare = slo.ttft.seconds - cost.seconds([(0, lengths.long_prompt)]) if slo.ttft else prompt
    waits = max(0.0, spare) / prompt * 2 / log(10)
    return Estimate(1 / (prompt + output), waits / (1 + waits) / prompt, 1 / output)


@dataclass(frozen=True)
class Parts:
    """Splits of the model that may be best, with requests per second of a replica: co-located (`alone`), and of each pool.
    `prompt`: the mean tokens of a prompt.
    """

    prompt: float
    alone: dict[Shape, float]
    prompts: dict[Shape, float]
    decodes: dict[Shape, float]


def parts(candidates: Candidates, traffic: Traffic, slo: Targets, bursty: bool, find: Capacities) -> Parts:
    """Simulate the parts of `candidates`. Under `bursty` arrivals a single replica would meet all the burstiness with a share of
    the rate. A part is then as many replicas as the devices hold, or half of them for a pool, and its rate is shared out. Raises
    ValueError if a request by itself misses the SLO everywhere.
    """
    lengths = Lengths.of(traffic)
    classes = by_class(slo)
    guess = {shape: estimate(instance, lengths, classes.default) for shape, instance in candidates.shapes.items()}
    in_pools = [shape for shape in guess if shape.sp == 1 and 2 * shape.size <= candidates.site.gpus]
    alone = _possible(candidates, _best(guess, "whole", list(guess)), slo)
    cases: dict[str, tuple[Tried, Targets, float]] = {}
    numbers: dict[str, int] = {}
    for shape, deployment in alone.items():
        key = f"alone {shape}"
        numbers[key] = candidates.most(deployment) if bursty else 1
        cases[key] = Simulator(together(deployment, numbers[key])), slo, numbers[key] * guess[shape].whole
    first_tokens = Classes({name: Slo(ttft=each.ttft, ttlt=each.ttlt) for name, each in classes.items()})
    for kind, targets in (("prompts", first_tokens), ("decodes", slo)):
        for shape in _best(guess, kind, in_pools)[:SHAPES]:
            key = f"{kind} {shape}"
            numbers[key] = max(1, candidates.most(candidates.replica(shape)) // 2) if bursty else 1
            rate = numbers[key] * getattr(guess[shape], kind)
            cases[key] = _pool(candidates, kind, shape, numbers[key]), targets, rate
    rates = {key: rate / numbers[key] for key, rate in find(cases).items()}
    kinds = ("alone", "prompts", "decodes")
    return Parts(
        lengths.prompt, *({shape: rates[f"{kind} {shape}"] for shape in guess if f"{kind} {shape}" in rates} for kind in kinds)
    )


def pairs(candidates: Candidates, parts: Parts) -> list[tuple[float, float, Split]]:
    """(requests per second of all devices, of a unit, the unit) for pairs of pools in every ratio, the best first."""
    rows = []
    for p, d in product(parts.prompts, parts.decodes):
        for numbers in candidates.ratios(p, d):
            pair = candidates.split(WAYS[0], p, d, numbers)
            if not (number := candidates.most(pair)):
                continue
            rate = min(numbers[0] * parts.prompts[p], numbers[1] * parts.decodes[d], candidates.kv_rate(pair) / parts.prompt)
            if rate:
                rows.append((rate * number, rate, pair))
    return sorted(rows, key=lambda row: -row[0])


def _best(guess: Mapping[Shape, Estimate], kind: str, shapes: list[Shape]) -> list[Shape]:
    """Those of `shapes` that may be best for this `kind` of work, by their estimates per device."""

    def each(shape: Shape) -> float:
        rate: float = getattr(guess[shape], kind)
        return rate / shape.size

    simple = [shape for shape in shapes if shape.size == shape.tp]
    least = GAIN * max(map(each, simple), default=0.0)
    return sorted((shape for shape in shapes if shape in simple or each(shape) >= least), key=lambda shape: -each(shape))


def _pool(candidates: Candidates, kind: str, shape: Shape, number: int) -> Tried:
    """A simulator of one pool of `number` replicas by itself. Decodes come from prompts that take no time, in the same node."""
    if kind == "prompts":
        return Prompts(together(candidates.prefill(shape, WAYS[0]), number))
    pair = candidates.split(WAYS[0], shape, shape, (1, number))
    return SplitSimulator(replace(pair, nodes=1, per_node=size(pair)), prefill=unlimited(candidates.shapes[shape]))


def _possible(candidates: Candidates, shapes: list[Shape], slo: Targets) -> dict[Shape, Deployment]:
    """Co-located replicas of the first `SHAPES` of the `shapes` with which a request by itself meets `slo`. Raises ValueError if
    there are none, with the fastest shape's reason.
    """
    deployments: dict[Shape, Deployment] = {}
    why: dict[Shape, str] = {}
    for shape in shapes:
        if len(deployments) == SHAPES:
            break
        deployment = candidates.replica(shape, "slo", slo=str(slo))
        try:
            Simulator(deployment)
        except ValueError as error:
            why[shape] = str(error)
        else:
            deployments[shape] = deployment
    if not deployments:
        fastest = min(why, key=lambda shape: candidates.shapes[shape].cost.seconds([(1, 1)]))
        raise ValueError(f"nothing here meets {slo}: with {name(candidates.replica(fastest, 'slo'))}, the fastest, {why[fastest]}")
    return deployments
