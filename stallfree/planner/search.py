"""Ranks candidates by their capacity in simulation. It simulates only the likely ones, which it finds by their parts' capacities.

It searches each part alone: a co-located replica, prompts only, decodes only. These capacities give the best ratios of prefill to
decode replicas. It simulates only the best pairs of each way whole, and the best of both kinds on all devices. It does not know how
processes start, and prints nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice, product
from math import ceil, inf
from statistics import fmean

from stallfree.core.slo import Slo
from stallfree.metrics.capacity import Capacity
from stallfree.metrics.report import Report, Tally
from stallfree.planner.candidates import WAYS, Candidates, name, size
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import SplitSimulator, place, unlimited
from stallfree.sim.trials import Trial, Trials, Tried
from stallfree.workload.traffic import Traffic

Deployed = Deployment | Split
Open = Callable[[Mapping[str, Tried]], AbstractContextManager[Trials]]
"""Opens processes for trials of the named simulators."""

BUDGETS = (512, 2048)
"""Token budgets of the co-located `sarathi` candidates: the paper's."""
ROUGH, FINE = 0.08, 0.04
"""Tolerances of the capacity searches, as shares of the capacity: of a unit, and of all devices."""
SECONDS = 30.0
"""Minimum seconds of arrivals in a trial."""
ROOM = 1.05
"""A target that can be met is so many times the latency seen almost without load."""
SHAPES = 3
"""At most this many splits of a model are tried co-located: the best by their estimated capacity."""
FINALISTS = 2
"""At most this many pairs of each way are simulated whole, and at most so many more that fit in a node. Of all these, at most so
many are simulated on all devices."""


class Prompts:
    """Simulates a deployment that computes prompts up to the first token, and nothing after it."""

    def __init__(self, deployment: Deployment):
        self._simulator = Simulator(deployment)

    def trial(self, traffic: Traffic, rate: float | None, seed: int, slo: Slo) -> Report:
        tally = Tally(slo)
        self._simulator.run((replace(a, output_tokens=1) for a in traffic.stream(rate, seed)), ended=tally.add)
        return tally.report(rate)


@dataclass(frozen=True)
class Ranked:
    """A candidate: the unit `deployed`, how many `units` the devices hold, and the highest `rate` (1/s) at which one meets the SLO.
    `at`, `above`: reports at that rate and at the lowest that failed, None if not tried. `why`: the reasons of the failure.
    """

    deployed: Deployed
    units: int
    rate: float
    at: Report | None
    above: Report | None
    why: tuple[str, ...]

    @property
    def name(self) -> str:
        return name(self.deployed)

    @property
    def total(self) -> float:
        """Requests per second of all units."""
        return self.units * self.rate


@dataclass(frozen=True)
class Answer:
    """The result of a search. `ranked`: all candidates. `whole`: the best co-located and the best split ones, each simulated with
    its units as one cluster on all devices. Both have the best first.
    """

    ranked: list[Ranked]
    whole: list[Ranked]

    @property
    def best(self) -> Ranked:
        return max(self.whole, key=lambda ranked: ranked.total)


def search(candidates: Candidates, traffic: Traffic, slo: Slo, run: Open, tell: Callable[[str], None] = lambda _: None) -> Answer:
    """Rank `candidates` for `traffic`, without its rate, and `slo`. Raises ValueError if none meets the SLO, with the nearest
    targets that can be met.
    """
    arrivals = list(replace(traffic, requests=300, duration=None, arrivals="poisson").stream(1.0, 0))
    prompt, output = (fmean(getattr(a, field) for a in arrivals) for field in ("prompt_tokens", "output_tokens"))
    guess = {shape: _estimate(candidates, shape, prompt, output, slo) for shape in candidates.shapes}
    shapes = sorted(guess, key=lambda shape: -guess[shape] / (shape[0] * shape[1]))
    alone = dict(islice(_possible(candidates, shapes, slo).items(), SHAPES))
    first_token = Slo(ttft=slo.ttft)
    tell(f"{len(shapes)} splits of the model over devices; each part by itself")
    cases: dict[str, tuple[Tried, Slo, float]] = {}
    for shape in shapes:
        if shape in alone:
            cases[f"slo {shape}"] = alone[shape], slo, guess[shape]
        if 2 * shape[0] * shape[1] > candidates.site.gpus:
            continue
        cases[f"prompts {shape}"] = Prompts(candidates.prefill(shape, "distserve")), first_token, 2 * guess[shape]
        pair = candidates.split("distserve", shape, shape, (1, 1))
        cases[f"decodes {shape}"] = SplitSimulator(pair, prefill=unlimited(candidates.shapes[shape])), slo, 2 * guess[shape]
    parts = {key: rate for key, (rate, *_) in _capacities(cases, traffic, run, ROUGH).items()}
    best = max(alone, key=lambda shape: parts[f"slo {shape}"] / (shape[0] * shape[1]))
    units: dict[str, Deployed] = {}
    starts: dict[str, float] = {}
    for shape in alone:
        # Whole prompts first are better if the first token is urgent and later tokens are not.
        for unit in (candidates.replica(*shape, "slo", slo=str(slo)), candidates.replica(*shape, "prefill-first")):
            units[name(unit)], starts[name(unit)] = unit, parts[f"slo {shape}"]
    for budget in BUDGETS:
        unit = candidates.replica(*best, "sarathi", budget)
        units[name(unit)], starts[name(unit)] = unit, parts[f"slo {best}"]
    pools = [shape for shape in shapes if f"prompts {shape}" in parts]
    pairs: list[tuple[float, float, bool, Split]] = []
    for p, d in product(pools, pools):
        for numbers in candidates.ratios(p, d):
            rate = min(numbers[0] * parts[f"prompts {p}"], numbers[1] * parts[f"decodes {d}"])
            pair = candidates.split(WAYS[0], p, d, numbers)
            number, inside = candidates.site.gpus // size(pair), candidates.site.per_node % size(pair) == 0
            if rate and _fits(_repeated(candidates, pair, number)):
                pairs.append((rate * number, rate, inside, pair))
    pairs.sort(key=lambda row: -row[0])
    for way in WAYS:
        for _, rate, _, pair in [*pairs[:FINALISTS], *[row for row in pairs if row[2]][:FINALISTS]]:
            pair = candidates.like(pair, way)
            units[name(pair)], starts[name(pair)] = pair, rate
    tell(f"{len(units)} candidates, each a unit of few devices")
    ranked = _ranked(candidates, units, starts, traffic, slo, run, ROUGH)
    if not any(each.rate for each in ranked):
        raise ValueError(_nearest(ranked, slo))
    co_located = [each for each in ranked if isinstance(each.deployed, Deployment)][:1]
    split = [each for each in ranked if isinstance(each.deployed, Split)][:FINALISTS]
    tell("the best of both kinds on all devices together")
    finalists = [each for each in co_located + split if each.rate]
    clusters = {each.name: _repeated(candidates, each.deployed, each.units) for each in finalists}
    whole = _ranked(candidates, clusters, {each.name: each.total for each in finalists}, traffic, slo, run, FINE)
    return Answer(ranked, whole)


def attainments(
    whole: Iterable[Ranked], rates: Iterable[float], traffic: Traffic, slo: Slo, run: Open
) -> dict[str, list[tuple[float, Report]]]:
    """(rate, report) at each of `rates`, by the names of `whole`."""
    simulators = {each.name: _simulator(each.deployed) for each in whole}
    with run(simulators) as pool:
        cases = {
            (name, rate): (name, traffic.lasting(SECONDS, rate), rate, traffic.seed, slo) for rate in rates for name in simulators
        }
        reports = pool.reports(cases)
        return {name: [(rate, report) for (other, rate), report in reports.items() if other == name] for name in simulators}


def _ranked(
    candidates: Candidates,
    units: Mapping[str, Deployed],
    starts: Mapping[str, float],
    traffic: Traffic,
    slo: Slo,
    run: Open,
    tolerance: float,
) -> list[Ranked]:
    cases = {key: (_simulator(unit), slo, max(starts[key], 1e-3)) for key, unit in units.items()}
    ranked = []
    for key, (rate, at, above, why) in _capacities(cases, traffic, run, tolerance).items():
        ranked.append(Ranked(units[key], candidates.site.gpus // size(units[key]), rate, at, above, why))
    return sorted(ranked, key=lambda each: -each.total)


def _capacities(
    cases: Mapping[str, tuple[Tried, Slo, float]], traffic: Traffic, run: Open, tolerance: float
) -> dict[str, tuple[float, Report | None, Report | None, tuple[str, ...]]]:
    """For each case its capacity, the report at it, the report at the lowest rate that failed, and the reasons of that."""
    trials: dict[str, list[Trial]] = {key: [] for key in cases}
    with run({key: simulator for key, (simulator, _, _) in cases.items()}) as pool:
        capacities: dict[str, Capacity] = pool.capacities(
            {key: (traffic, slo, start) for key, (_, slo, start) in cases.items()},
            lambda key, trial: trials[key].append(trial),
            lowest=1e-3,
            tolerance=tolerance,
            seed=traffic.seed,
            shortest_s=SECONDS,
        )
    results = {}
    for key, capacity in capacities.items():
        reports = {rate: (report, tuple(why)) for rate, _, report, why in trials[key]}
        above, why = reports[capacity.above] if capacity.above is not None else (None, ())
        results[key] = capacity.rate, reports[capacity.rate][0] if capacity.rate else None, above, why
    return results


def _possible(candidates: Candidates, shapes: Iterable[tuple[int, int]], slo: Slo) -> dict[tuple[int, int], Simulator]:
    """Simulators of the `shapes` with which a lone request, co-located, meets `slo`. Raises ValueError if there are none, with the
    fastest shape's reason.
    """
    simulators, why = {}, {}
    for shape in shapes:
        try:
            simulators[shape] = Simulator(candidates.replica(*shape, "slo", slo=str(slo)))
        except ValueError as error:
            why[shape] = str(error)
    if not simulators:
        fastest = min(why, key=lambda shape: candidates.shapes[shape].cost.seconds([(1, 1)]))
        raise ValueError(f"nothing here meets {slo}: with {name(candidates.replica(*fastest, 'slo'))}, the fastest, {why[fastest]}")
    return simulators


def _estimate(candidates: Candidates, shape: tuple[int, int], prompt: float, output: float, slo: Slo) -> float:
    """The estimated capacity (requests per second) of a replica that always runs as many decodes as KV and the target allow."""
    cost, capacity = candidates.shapes[shape].cost, candidates.shapes[shape].capacity
    middle = int(prompt + output / 2)
    decodes = max(1, min(Deployment().max_seqs, capacity.num_blocks * capacity.block_size // (middle + 1)))
    pace = slo.tbt or slo.tpot
    while decodes > 1 and pace is not None and cost.seconds([(middle, 1)] * decodes) > pace.seconds:
        decodes = decodes * 3 // 4
    return 1 / (cost.seconds([(0, int(prompt))]) + output * cost.seconds([(middle, 1)] * decodes) / decodes)


def _simulator(deployed: Deployed) -> Simulator | SplitSimulator:
    return Simulator(deployed) if isinstance(deployed, Deployment) else SplitSimulator(deployed)


def _repeated(candidates: Candidates, unit: Deployed, number: int) -> Deployed:
    """`number` units as one cluster."""
    if isinstance(unit, Deployment):
        return replace(unit, replicas=number, router="shortest-queue")
    prefill, decode = (replace(pool, replicas=pool.replicas * number) for pool in (unit.prefill, unit.decode))
    return replace(unit, prefill=prefill, decode=decode, nodes=candidates.site.nodes)


def _fits(deployed: Deployed) -> bool:
    """Whether the replicas of a split can be placed on the nodes, each one whole."""
    try:
        return isinstance(deployed, Deployment) or bool(place(deployed))
    except ValueError:
        return False


def _nearest(ranked: Iterable[Ranked], slo: Slo) -> str:
    """The error for an SLO that no candidate meets, with the targets that the nearest candidate can meet."""
    nearest: tuple[float, list[str]] = inf, []
    for report in (each.above for each in ranked if each.above is not None):
        worst, words = 0.0, []
        for metric in ("ttft", "tbt", "tpot"):
            target, quantiles = getattr(slo, metric), getattr(report, f"{metric}_s")
            if target is None or quantiles is None:
                continue
            label = "p90" if target.percentile <= 90 else "p99"
            seconds = max(target.seconds, ROOM * getattr(quantiles, label))
            worst = max(worst, seconds / target.seconds)
            words.append(f"{metric}={ceil(1000 * seconds)}ms@{label}")
        nearest = min(nearest, (worst, words))
    return f"nothing here meets {slo}, not even almost without load; the nearest that can be met is about {','.join(nearest[1])}"
