"""Ranks candidates by their capacity in simulation. It simulates only the likely ones, which it finds by their parts' capacities.

The capacities of the parts give the best ratios of prefill to decode replicas. It simulates only the best pairs of each way, and
the best of both kinds on all devices, in several draws of the load. It does not know how processes start, and prints nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, inf

from stallfree.elastic.policies import POLICIES
from stallfree.metrics.report import Report, Targets, by_class
from stallfree.planner import moving
from stallfree.planner.candidates import WAYS, Candidates, Deployed, kind, name, size
from stallfree.planner.capacities import SECONDS, Found, Open, capacities
from stallfree.planner.parts import Parts, pairs, parts
from stallfree.planner.site import counted
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.elastic import ElasticSimulator
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import SplitSimulator
from stallfree.sim.trials import Tried
from stallfree.workload.traffic import Traffic

BUDGETS = (512, 2048)
"""Token budgets of the co-located `sarathi` candidates: the paper's."""
ROUGH, FINE = 0.08, 0.05
"""Tolerances of the capacity searches, as shares of the capacity: of candidates and of further draws, and of finalists."""
NEAR, NEARER = 1.2, 1.1
"""The first step of a search whose first rate follows from the parts, and of a finalist's, whose unit was searched before."""
ROOM = 1.05
"""A target that can be met is so many times the latency seen almost without load."""
FINALISTS = 2
"""At most this many pairs of each way are candidates, and at most so many more that fit in a node. Of all these, at most so many
are finalists."""
DRAWS, BURSTY_DRAWS = 3, 5
"""Draws of the load for the best of each kind, under Poisson arrivals and under others. The median capacity over all draws is
between the least and the largest of n with a probability of 1 - 2 / 2^n: 75 % and 94 %, whatever the distribution."""
APART, PART = 7, 64
"""A part of a trace is this fraction of it, so that five parts that begin as `workload.GOLDEN` says do not overlap; and at least so
many requests. A shorter trace has no parts."""
ENOUGH = 512
"""Candidates are compared in an eighth of a trace, and in at least this many requests."""
PURE = ("co-located", "pools")
"""The kinds that commands can run. The third is simulated only: requests are cut at any token, move while they decode, or are
spread over groups of instances."""
LEAST = 1 / 3
"""A candidate that misses the SLO at this share of what its parts promise is left there: it is not the best."""


PROMISING = 0.8
"""A deployment with moves that misses the SLO at this share of what its instances serve without any is left there, and one with
other chunk sizes at the rate of the best so far."""


@dataclass(frozen=True)
class Ranked:
    """A candidate: what was simulated (`deployed`), how many of it (`units`) the devices hold, and the highest `rate` (1/s) at
    which one meets the SLO. `whole`: it was simulated on all devices, as one cluster, and is one unit.

    `draws`: the capacities in several draws of the load, of which `rate` is the median, drawn with `seed`; or those in several
    parts of a trace. `at`, `above`: reports at that rate and at the lowest that failed, None if not tried. `why`: the reasons of
    the failure.
    """

    deployed: Deployed
    units: int
    whole: bool
    rate: float
    draws: tuple[float, ...]
    seed: int
    at: Report | None
    above: Report | None
    why: tuple[str, ...]

    @property
    def name(self) -> str:
        return name(self.deployed)

    @property
    def title(self) -> str:
        """The name, with the number of all replicas or units."""
        number = self.units * (self.deployed.replicas if isinstance(self.deployed, Deployment) else 1)
        return self.name if number == 1 else f"{number} x {self.name}"

    @property
    def total(self) -> float:
        """Requests per second of all units."""
        return self.units * self.rate


@dataclass(frozen=True)
class Answer:
    """The result of a search. `ranked`: all candidates. `whole`: of these the best of each kind that commands can run, each
    simulated on all devices in several draws of the load. Both lists have the best first. `moved`: the best of the kind that is
    simulated only, on all devices in the first draw; None if none meets the SLO.
    """

    ranked: list[Ranked]
    whole: list[Ranked]
    moved: Ranked | None = None

    @property
    def best(self) -> Ranked:
        return max(self.whole, key=lambda ranked: ranked.total)


def search(
    candidates: Candidates, traffic: Traffic, slo: Targets, run: Open, tell: Callable[[str], None] = lambda _: None
) -> Answer:
    """Rank `candidates` for `traffic`, without its rate, and `slo`. Raises ValueError if none meets the SLO, with the nearest
    targets that can be met.

    Under Poisson arrivals a candidate is a unit of few devices, and its rate counts for each unit. Under others a unit by itself
    would meet the burstiness of all arrivals at a share of their rate, so every candidate is simulated on all devices.
    """
    bursty = not traffic.arrivals.startswith("poisson")

    def find(
        cases: Mapping[str, tuple[Tried, Targets, float]], load: Traffic, tolerance: float, step: float, least: float = 0.0
    ) -> dict[str, Found]:
        return capacities({key: (*case, traffic.seed) for key, case in cases.items()}, load, run, tolerance, step, least)

    def roughly(cases: Mapping[str, tuple[Tried, Targets, float]], least: float = 0.0) -> dict[str, Found]:
        return find(cases, begin(traffic), ROUGH, NEAR, least)

    tell(f"{counted(len(candidates.shapes), 'split')} of the model over devices; the best for each part by itself")
    each = parts(candidates, traffic, slo, bursty, lambda cases: {key: found.rate for key, found in roughly(cases).items()})

    def tried(units: Iterable[tuple[Deployed, float]], least: float = LEAST) -> dict[str, Ranked]:
        """Units with the requests per second that they promise, each simulated, or as many of it as the devices hold."""
        named = {name(unit): (unit, candidates.most(unit), rate) for unit, rate in units}
        if bursty:
            named = {key: (candidates.repeated(unit, number), 1, number * rate) for key, (unit, number, rate) in named.items()}
        cases = {key: (_simulator(unit), slo, rate) for key, (unit, _, rate) in named.items()}
        founds = roughly(cases, least) if cases else {}
        return {key: _ranked(found, named[key][0], named[key][1], traffic.seed) for key, found in founds.items()}

    units = _units(candidates, each, slo)
    tell(f"{len(units)} candidates, each {'on all devices' if bursty else 'a unit of few devices'}")
    ranked = tried(units)
    for one in PURE:  # if none of a kind keeps what its parts promise, it is searched to the end
        if not any(True for _ in _of(one, ranked)):
            ranked |= tried([unit for unit in units if kind(unit[0]) == one], 0.0)
    if not any(each.rate for each in ranked.values()):
        raise ValueError(_nearest(ranked.values(), slo))
    tell("requests that are cut at any token, move while they decode, or are spread over groups of instances")
    ranked |= tried(moving.units(candidates, each.alone, slo), PROMISING)
    for second in (False, True):
        best_chunks = next((each.deployed for key, each in _of("moving", ranked) if key.startswith("taichi")), None)
        if isinstance(best_chunks, Split):
            rate = ranked[name(best_chunks)].rate
            ranked |= tried(((unit, rate) for unit in moving.other_chunks(best_chunks, second)), 1.0)
    tell("the best of each kind on all devices together")
    clusters = {
        key: each.deployed if bursty else candidates.repeated(each.deployed, each.units)
        for one, most in (("co-located", 1), ("pools", FINALISTS), ("moving", 1))
        for key, each in islice(_of(one, ranked), most)
    }
    founds = find({key: (_simulator(cluster), slo, ranked[key].total) for key, cluster in clusters.items()}, traffic, FINE, NEARER)
    whole = {key: _ranked(found, clusters[key], 1, traffic.seed) for key, found in founds.items()}
    draws = BURSTY_DRAWS if bursty else DRAWS
    tell(f"the best of both kinds in {draws} draws of the load")
    best = dict(pair for one in PURE for pair in islice(_of(one, whole), 1))
    if not best:
        raise ValueError(_nearest(whole.values(), slo))
    drawn = _drawn(best, traffic, slo, run, draws)
    comparable = {} if traffic.arrivals == "trace" else whole
    moved = next((each for _, each in _of("moving", whole)), None)
    return Answer(_sorted((ranked | comparable | drawn).values()), _sorted(drawn.values()), moved)


def begin(traffic: Traffic) -> Traffic:
    """The load in which candidates are compared: of a trace, its begin."""
    if traffic.arrivals != "trace" or traffic.requests is None:
        return traffic
    return replace(traffic, requests=max(min(traffic.requests, ENOUGH), traffic.requests // 8))


def attainments(
    whole: Iterable[Ranked], rates: Iterable[float], traffic: Traffic, slo: Targets, run: Open
) -> dict[str, list[tuple[float, Report]]]:
    """(rate, report) at each of `rates`, by the names of `whole`."""
    simulators = {each.name: _simulator(each.deployed) for each in whole}
    with run(simulators) as pool:
        cases = {
            (name, rate): (name, traffic.lasting(SECONDS, rate), rate, traffic.seed, slo) for rate in rates for name in simulators
        }
        reports = pool.reports(cases)
        return {name: [(rate, report) for (other, rate), report in reports.items() if other == name] for name in simulators}


def _units(candidates: Candidates, each: Parts, slo: Targets) -> list[tuple[Deployed, float]]:
    """The co-located units and the pools to simulate, and the requests per second that their parts promise."""
    units: list[tuple[Deployed, float]] = []
    for shape, rate in each.alone.items():
        # Whole prompts first are better if the first token is urgent and later tokens are not.
        units.append((candidates.replica(shape, "slo", slo=str(slo)), rate))
        units.append((candidates.replica(shape, "prefill-first"), rate))
    best = max(each.alone, key=lambda shape: each.alone[shape] / shape.size)
    units += [(candidates.replica(best, "sarathi", budget), each.alone[best]) for budget in BUDGETS]
    rows = pairs(candidates, each)
    inside = [row for row in rows if candidates.site.per_node % size(row[2]) == 0]
    for way in WAYS:
        units += [(candidates.like(pair, way), rate) for _, rate, pair in [*rows[:FINALISTS], *inside[:FINALISTS]]]
    return list({name(unit): (unit, rate) for unit, rate in units}.values())


def _drawn(whole: Mapping[str, Ranked], traffic: Traffic, slo: Targets, run: Open, draws: int) -> dict[str, Ranked]:
    """Each of `whole` in so many draws of the load, the first of which it has had; or in so many parts of a trace, which has no
    other draws, and none if it is short. All get the same draws.
    """
    seeds = range(traffic.seed + 1, traffic.seed + draws)
    if traffic.arrivals == "trace":
        part = (traffic.requests or 0) // APART
        if part < PART:
            return dict(whole)
        seeds, traffic = range(draws), replace(traffic, requests=part)
    simulators = {key: _simulator(each.deployed) for key, each in whole.items()}
    cases = {f"{key} {seed}": (simulators[key], slo, each.rate, seed) for key, each in whole.items() for seed in seeds}
    founds = capacities(cases, traffic, run, ROUGH, 1 + ROUGH)
    drawn = {}
    for key, each in whole.items():
        others = [replace(each, seed=seed, **founds[f"{key} {seed}"]._asdict()) for seed in seeds]
        if traffic.arrivals == "trace":
            drawn[key] = replace(each, draws=tuple(other.rate for other in others))
            continue
        middle = sorted([each, *others], key=lambda each: each.rate)[draws // 2]
        drawn[key] = replace(middle, draws=(each.rate, *(other.rate for other in others)))
    return drawn


def _simulator(deployed: Deployed) -> Simulator | ElasticSimulator | SplitSimulator:
    if isinstance(deployed, Split):
        return SplitSimulator(deployed)
    return ElasticSimulator(deployed) if deployed.policy in POLICIES else Simulator(deployed)


def _ranked(found: Found, deployed: Deployed, units: int, seed: int) -> Ranked:
    return Ranked(deployed, units, units == 1, found.rate, (found.rate,), seed, found.at, found.above, found.why)


def _sorted(ranked: Iterable[Ranked]) -> list[Ranked]:
    return sorted(ranked, key=lambda each: -each.total)


def _of(one: str, ranked: Mapping[str, Ranked]) -> Iterator[tuple[str, Ranked]]:
    """Those of `one` kind that meet the SLO, the best first."""
    best = sorted(ranked.items(), key=lambda pair: -pair[1].total)
    return (pair for pair in best if kind(pair[1].deployed) == one and pair[1].rate)


def _nearest(ranked: Iterable[Ranked], slo: Targets) -> str:
    """The error for an SLO that no candidate meets, with the targets, of the first class, that the nearest candidate can meet."""
    nearest: tuple[float, list[str]] = inf, []
    first = by_class(slo).default
    for report in (each.above for each in ranked if each.above is not None):
        worst, words = 0.0, []
        for metric in ("ttft", "tbt", "tpot"):
            target, quantiles = getattr(first, metric), getattr(report, f"{metric}_s")
            if target is None or quantiles is None:
                continue
            label = "p90" if target.percentile <= 90 else "p99"
            seconds = max(target.seconds, ROOM * getattr(quantiles, label))
            worst = max(worst, seconds / target.seconds)
            words.append(f"{metric}={ceil(1000 * seconds)}ms@{label}")
        nearest = min(nearest, (worst, words))
    return f"nothing here meets {slo}, not even almost without load; the nearest that can be met is about {','.join(nearest[1])}"
