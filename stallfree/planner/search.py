"""From candidates to a ranking: the capacity of each by simulation, the likely ones first found from what their parts can do.

Each part is searched by itself: a co-located replica; prompts alone; decodes alone. From these follows how many prefill and decode
replicas go together, and only the best of each way are simulated whole. Then the best co-located and the best split ones are
simulated on all devices. It runs what it is given in the processes it is given, and prints nothing.
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
"""Processes for trials of what is in the mapping."""

BUDGETS = (512, 2048)
"""Budgets at which co-located `sarathi` is tried: the paper's."""
ROUGH, FINE = 0.08, 0.04
"""Share of a capacity to which that of a unit, and of all devices, is found."""
SECONDS = 30.0
"""Of arrivals in a trial, at least."""
ROOM = 1.05
"""Above what was seen almost without load is a target that can be met."""
SHAPES = 3
"""Splits of a model that are tried co-located, the best by what they could do at most."""
FINALISTS = 2
"""Units of each way of disaggregating that are simulated whole, and so many more that lie within a node; and of the best of all
those, how many are run on all devices."""


class Prompts:
    """A deployment that computes prompts up to the first token, and nothing after it."""

    def __init__(self, deployment: Deployment):
        self._simulator = Simulator(deployment)

    def trial(self, traffic: Traffic, rate: float | None, seed: int, slo: Slo) -> Report:
        tally = Tally(slo)
        self._simulator.run((replace(a, output_tokens=1) for a in traffic.stream(rate, seed)), ended=tally.add)
        return tally.report(rate)


@dataclass(frozen=True)
class Ranked:
    """A candidate: the unit `deployed`, how many of them there is room for, and the highest `rate` (requests per second) at which
    one meets the SLO; `at` that rate, and `above` it, a report of a trial (None: not tried), with why that failed.
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
    """`ranked`, the best first; `whole`: the best co-located one and the best split ones, each on all devices together, its units
    one cluster; the best first too.
    """

    ranked: list[Ranked]
    whole: list[Ranked]

    @property
    def best(self) -> Ranked:
        return max(self.whole, key=lambda one: one.total)


def search(there: Candidates, traffic: Traffic, slo: Slo, run: Open, tell: Callable[[str], None] = lambda line: None) -> Answer:
    """Those `there` for `traffic`, whose rate is not looked at, and `slo`. Raises ValueError if none of them meets it,
    saying what comes nearest.
    """
    coming = list(replace(traffic, requests=300, duration=None, arrivals="poisson").stream(1.0, 0))
    prompt, output = (fmean(getattr(a, what) for a in coming) for what in ("prompt_tokens", "output_tokens"))
    guess = {shape: _most(there, shape, prompt, output, slo) for shape in there.shapes}
    shapes = sorted(guess, key=lambda shape: -guess[shape] / (shape[0] * shape[1]))
    alone = dict(islice(_possible(there, shapes, slo).items(), SHAPES))
    first_token = Slo(ttft=slo.ttft)
    tell(f"{len(shapes)} splits of the model over devices; each part by itself")
    cases: dict[str, tuple[Tried, Slo, float]] = {}
    for shape in shapes:
        if shape in alone:
            cases[f"slo {shape}"] = alone[shape], slo, guess[shape]
        if 2 * shape[0] * shape[1] > there.site.gpus:
            continue
        cases[f"prompts {shape}"] = Prompts(there.prefill(shape, "distserve")), first_token, 2 * guess[shape]
        pair = there.split("distserve", shape, shape, (1, 1))
        cases[f"decodes {shape}"] = SplitSimulator(pair, prefill=unlimited(there.shapes[shape])), slo, 2 * guess[shape]
    parts = {what: rate for what, (rate, *_) in _capacities(cases, traffic, run, ROUGH).items()}
    best = max(alone, key=lambda shape: parts[f"slo {shape}"] / (shape[0] * shape[1]))
    units: dict[str, Deployed] = {}
    starts: dict[str, float] = {}
    for shape in alone:
        # Whole prompts first are better where the first token is urgent and those after it are not.
        for one in (there.replica(*shape, "slo", slo=str(slo)), there.replica(*shape, "prefill-first")):
            units[name(one)], starts[name(one)] = one, parts[f"slo {shape}"]
    for budget in BUDGETS:
        one = there.replica(*best, "sarathi", budget)
        units[name(one)], starts[name(one)] = one, parts[f"slo {best}"]
    pools = [shape for shape in shapes if f"prompts {shape}" in parts]
    pairs: list[tuple[float, float, bool, Split]] = []
    for p, d in product(pools, pools):
        for numbers in there.ratios(p, d):
            rate = min(numbers[0] * parts[f"prompts {p}"], numbers[1] * parts[f"decodes {d}"])
            pair = there.split(WAYS[0], p, d, numbers)
            number, inside = there.site.gpus // size(pair), there.site.per_node % size(pair) == 0
            if rate and _fits(_repeated(there, pair, number)):
                pairs.append((rate * number, rate, inside, pair))
    pairs.sort(key=lambda one: -one[0])
    for way in WAYS:
        for _, rate, _, pair in [*pairs[:FINALISTS], *[one for one in pairs if one[2]][:FINALISTS]]:
            pair = there.like(pair, way)
            units[name(pair)], starts[name(pair)] = pair, rate
    tell(f"{len(units)} candidates, each a unit of few devices")
    ranked = _ranked(there, units, starts, traffic, slo, run, ROUGH)
    if not any(one.rate for one in ranked):
        raise ValueError(_nearest(ranked, slo))
    co_located = [one for one in ranked if isinstance(one.deployed, Deployment)][:1]
    split = [one for one in ranked if isinstance(one.deployed, Split)][:FINALISTS]
    tell("the best of both kinds on all devices together")
    finalists = [one for one in co_located + split if one.rate]
    all_of_it = {one.name: _repeated(there, one.deployed, one.units) for one in finalists}
    whole = _ranked(there, all_of_it, {one.name: one.total for one in finalists}, traffic, slo, run, FINE)
    return Answer(ranked, whole)


def attainments(
    whole: Iterable[Ranked], rates: Iterable[float], traffic: Traffic, slo: Slo, run: Open
) -> dict[str, list[tuple[float, Report]]]:
    """For each of `whole`, reports at `rates`."""
    simulators = {one.name: _simulator(one.deployed) for one in whole}
    with run(simulators) as pool:
        cases = {
            (what, rate): (what, traffic.lasting(SECONDS, rate), rate, traffic.seed, slo) for rate in rates for what in simulators
        }
        reports = pool.reports(cases)
        return {what: [(rate, report) for (of, rate), report in reports.items() if of == what] for what in simulators}


def _ranked(
    there: Candidates,
    units: Mapping[str, Deployed],
    starts: Mapping[str, float],
    traffic: Traffic,
    slo: Slo,
    run: Open,
    tolerance: float,
) -> list[Ranked]:
    cases = {what: (_simulator(one), slo, max(starts[what], 1e-3)) for what, one in units.items()}
    found = []
    for what, (rate, at, above, why) in _capacities(cases, traffic, run, tolerance).items():
        found.append(Ranked(units[what], there.site.gpus // size(units[what]), rate, at, above, why))
    return sorted(found, key=lambda one: -one.total)


def _capacities(
    cases: Mapping[str, tuple[Tried, Slo, float]], traffic: Traffic, run: Open, tolerance: float
) -> dict[str, tuple[float, Report | None, Report | None, tuple[str, ...]]]:
    """For each case its capacity, the report at it, and that of the lowest rate that failed, with why."""
    tried: dict[str, list[Trial]] = {what: [] for what in cases}
    with run({what: simulator for what, (simulator, _, _) in cases.items()}) as pool:
        searched: dict[str, Capacity] = pool.capacities(
            {what: (traffic, slo, start) for what, (_, slo, start) in cases.items()},
            lambda what, trial: tried[what].append(trial),
            lowest=1e-3,
            tolerance=tolerance,
            seed=traffic.seed,
            shortest_s=SECONDS,
        )
    found = {}
    for what, most in searched.items():
        reports = {rate: (report, tuple(why)) for rate, _, report, why in tried[what]}
        above, why = reports[most.above] if most.above is not None else (None, ())
        found[what] = most.rate, reports[most.rate][0] if most.rate else None, above, why
    return found


def _possible(there: Candidates, shapes: Iterable[tuple[int, int]], slo: Slo) -> dict[tuple[int, int], Simulator]:
    """Those of `shapes` with which a request by itself meets `slo`, co-located. Raises ValueError if there are none, with what the
    fastest takes.
    """
    found, why = {}, {}
    for shape in shapes:
        try:
            found[shape] = Simulator(there.replica(*shape, "slo", slo=str(slo)))
        except ValueError as error:
            why[shape] = str(error)
    if not found:
        fastest = min(why, key=lambda shape: there.shapes[shape].cost.seconds([(1, 1)]))
        raise ValueError(f"nothing here meets {slo}: with {name(there.replica(*fastest, 'slo'))}, the fastest, {why[fastest]}")
    return found


def _most(there: Candidates, shape: tuple[int, int], prompt: float, output: float, slo: Slo) -> float:
    """Requests per second of a replica that is always busy with as many decodes as KV and the target for tokens allow."""
    cost, capacity = there.shapes[shape].cost, there.shapes[shape].capacity
    middle = int(prompt + output / 2)
    most = max(1, min(Deployment().max_seqs, capacity.num_blocks * capacity.block_size // (middle + 1)))
    pace = slo.tbt or slo.tpot
    while most > 1 and pace is not None and cost.seconds([(middle, 1)] * most) > pace.seconds:
        most = most * 3 // 4
    return 1 / (cost.seconds([(0, int(prompt))]) + output * cost.seconds([(middle, 1)] * most) / most)


def _simulator(deployed: Deployed) -> Simulator | SplitSimulator:
    return Simulator(deployed) if isinstance(deployed, Deployment) else SplitSimulator(deployed)


def _repeated(there: Candidates, unit: Deployed, number: int) -> Deployed:
    """So many units as one cluster."""
    if isinstance(unit, Deployment):
        return replace(unit, replicas=number, router="shortest-queue")
    prefill, decode = (replace(pool, replicas=pool.replicas * number) for pool in (unit.prefill, unit.decode))
    return replace(unit, prefill=prefill, decode=decode, nodes=there.site.nodes)


def _fits(deployed: Deployed) -> bool:
    """Whether its replicas can be placed on the nodes, none in pieces."""
    try:
        return isinstance(deployed, Deployment) or bool(place(deployed))
    except ValueError:
        return False


def _nearest(ranked: Iterable[Ranked], slo: Slo) -> str:
    """What comes nearest to an SLO that nobody meets: of the candidate that exceeds its targets by the least."""
    nearest: tuple[float, list[str]] = inf, []
    for report in (one.above for one in ranked if one.above is not None):
        worst, words = 0.0, []
        for what in ("ttft", "tbt", "tpot"):
            target, found = getattr(slo, what), getattr(report, f"{what}_s")
            if target is None or found is None:
                continue
            label = "p90" if target.percentile <= 90 else "p99"
            seconds = max(target.seconds, ROOM * getattr(found, label))
            worst = max(worst, seconds / target.seconds)
            words.append(f"{what}={ceil(1000 * seconds)}ms@{label}")
        nearest = min(nearest, (worst, words))
    return f"nothing here meets {slo}, not even almost without load; the nearest that can be met is about {','.join(nearest[1])}"
