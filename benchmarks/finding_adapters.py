"""When do many adapters (LoRA) change the choice between co-locating and disaggregating? Simulated, A100 80 GB.

    sites     three models: capacity of the best co-located deployment and of the best two pools, by the number of adapters, their
              rank and what they change, and of merged weights on replicas of their own
    causes    what limits Yi-34B with 1,000 large adapters: the capacities if loads, memory or the time in iterations were free
    prices    what one adapter costs: its memory, its load from the host, and its part of an iteration

A capacity is the highest rate at which every target is met. The deployments are fixed: those that `stallfree plan` finds best
without adapters or with the largest ones. The k-th most popular adapter has a share that falls as 1 / k. Replicas do not share
adapters: each loads those that its own requests ask for, also in both pools.

    python benchmarks/finding_adapters.py sites causes prices --plot docs/images/finding_adapters.png
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from finding_disaggregation import TARGETS, lengths_of
from harness import machine, parser, show

from stallfree.core import plan
from stallfree.core.policy import CostModel
from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.metrics.capacity import search, shortfalls
from stallfree.perf.adapters import Adapters
from stallfree.perf.roofline import Roofline
from stallfree.planner.candidates import Candidates, Deployed, Shape, name, together
from stallfree.planner.site import Site
from stallfree.sim.deployment import Split
from stallfree.sim.shelf import HOST_LINK, Shelf
from stallfree.sim.simulator import Instance, Simulator, instance
from stallfree.sim.split import SplitSimulator
from stallfree.workload.traffic import Traffic

SLO = TARGETS["middle"]
LOAD = Traffic(lengths=lengths_of(1024, 128), max_total=4096, requests=128)
SHORTEST_S, TOLERANCE = 30.0, 0.04
"""Minimum seconds of arrivals in a trial, and the tolerance of a capacity as a share of it."""
CLOSE = 0.12
"""A smaller lead counts as none, as in the other findings."""


@dataclass(frozen=True)
class Place:
    """A site with deployments for it: `alone`, (policy, token budget, TP) of co-located replicas that fill it; `pools`, (way, TP,
    prefill replicas, decode replicas). `adapters`: (number, rank, what they change). `start`: requests/s to try first."""

    site: Site
    start: float
    alone: Sequence[tuple[str, int | None, int]]
    pools: Sequence[tuple[str, int, int, int]]
    adapters: Sequence[tuple[int, int, str]]


CORNERS = [(number, rank, modules) for rank, modules in ((8, "attention"), (64, "all")) for number in (10, 100, 1000)]
LARGE = CORNERS[-1]
MORE = [(4, 8, "attention"), (4, 64, "all"), (1000, 64, "attention"), (1000, 8, "all")]
PLACES = (
    Place(
        Site("llama3-8b", gpus=4, max_model_len=4096),
        34.0,
        [("slo", None, 1)],
        [("splitwise", 1, 3, 1), ("splitwise", 1, 2, 2), ("distserve", 1, 3, 1)],
        [*CORNERS, *MORE],
    ),
    Place(
        Site("yi-34b", gpus=8, max_model_len=4096),
        10.0,
        [("slo", None, 2), ("sarathi", 512, 4)],
        [("splitwise", 2, 3, 1), ("splitwise", 2, 2, 2), ("distserve", 2, 3, 1)],
        CORNERS,
    ),
    Place(
        Site("llama2-70b", gpus=16, nodes=2, max_model_len=4096),
        8.0,
        [("slo", None, 4), ("slo", None, 8)],
        [("splitwise", 4, 3, 1), ("distserve", 4, 3, 1), ("splitwise", 4, 2, 2)],
        CORNERS,
    ),
)


def deployments(place: Place, site: Site) -> Iterator[Deployed]:
    candidates = Candidates(site)
    for policy, budget, tp in place.alone:
        slo = SLO if policy == "slo" else None
        yield together(candidates.replica(Shape(tp), policy, budget, slo=slo), site.gpus // tp)
    for way, tp, prefill, decode in place.pools:
        yield candidates.split(way, Shape(tp), Shape(tp), (prefill, decode), whole=True)


def capacity(deployed: Deployed, traffic: Traffic, start: float, free: str = "") -> float:
    """`free`: what adapters do not cost: loads, memory or iterations."""
    simulator: Simulator | SplitSimulator
    if isinstance(deployed, Split):
        simulator = SplitSimulator(deployed, *(freed(instance(pool), free) for pool in (deployed.prefill, deployed.decode)))
    else:
        simulator = Simulator(deployed, freed(instance(deployed), free))
    slo = Slo.parse(SLO)

    def passes(rate: float, seed: int) -> bool:
        return not shortfalls(simulator.trial(traffic.lasting(SHORTEST_S, rate), rate, seed, slo), slo)

    return search(passes, start, most_trials=1, seed=0, lowest=0.05, tolerance=TOLERANCE, step=1.2).rate


@dataclass(frozen=True)
class Blind:
    """The cost model `of` an iteration without its adapters."""

    of: CostModel

    def seconds(self, shape: plan.Shape) -> float:
        return self.of.seconds([piece for piece in shape if piece[1] >= 0])


def freed(place: Instance, free: str) -> Instance:
    """The machine, on which adapters do not cost what is `free`."""
    if not free:
        return place
    assert isinstance(place.cost, Roofline)
    adapters = place.cost.adapters
    blocks = partial(adapters.blocks, block_size=place.capacity.block_size)
    shelf = Shelf(
        (LARGE[1],),
        (lambda rank: 1) if free == "memory" else blocks,
        lambda rank: 0.0 if free == "loads" else adapters.bytes(rank) / HOST_LINK,
    )
    return place._replace(shelf=shelf, cost=Blind(place.cost) if free == "iterations" else place.cost)  # type: ignore[arg-type]


def merged(number: int, groups: int, rate: float) -> float:
    """Requests/s of `groups` replicas, each of which serves one of `number` merged models at `rate`: the most at which the busiest
    model is served, with the replicas given to where they are needed most. 0 if there are more models than replicas."""
    if number > groups:
        return 0.0
    shares = 1 / np.arange(1, number + 1)
    shares /= shares.sum()
    replicas = np.ones(number)
    for _ in range(groups - number):
        replicas[np.argmin(replicas / shares)] += 1
    return float(rate * (replicas / shares).min())


def sites(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for place in PLACES[:1] if quick else PLACES:
        starts: dict[str, float] = {}
        base = 0.0
        for number, rank, modules in [(0, 0, ""), *(place.adapters[-1:] if quick else place.adapters)]:
            site = replace(place.site, rank=str(rank), adapter_modules=modules) if number else place.site
            traffic = replace(LOAD, adapters=number or None)
            found: dict[bool, dict[str, float]] = {True: {}, False: {}}
            for deployed in deployments(place, site):
                key = name(deployed) if isinstance(deployed, Split) else f"{deployed.replicas} x {name(deployed)}"
                rate = starts[key] = capacity(deployed, traffic, starts.get(key, place.start))
                found[isinstance(deployed, Split)][key] = rate
            alone, pools = (max(found[kind].items(), key=lambda pair: pair[1]) for kind in (False, True))
            base = base or alone[1]
            groups = site.gpus // min(tp for _, _, tp in place.alone)
            rows.append(
                {
                    "model": site.model, "adapters": number, "rank": rank, "on": modules, "co-located": alone[0],
                    "requests/s": alone[1], "two pools": pools[0], "requests/s ": pools[1],
                    "pools / co-located": pools[1] / alone[1],
                    "merged, requests/s": merged(number, groups, base / groups) if number else None,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def causes(quick: bool) -> list[dict[str, Any]]:
    place, (number, rank, modules) = PLACES[1], LARGE
    site, traffic = replace(place.site, rank=str(rank), adapter_modules=modules), replace(LOAD, adapters=number)
    rows: list[dict[str, Any]] = []
    for deployed in list(deployments(place, site))[: 1 if quick else None]:
        rates = {free: capacity(deployed, traffic, 0.7 * place.start, free) for free in ("", "loads", "memory", "iterations")}
        title = name(deployed) if isinstance(deployed, Split) else f"{deployed.replicas} x {name(deployed)}"
        rows.append({"deployment": title, "requests/s": rates.pop("")} | {f"free {free}": rate for free, rate in rates.items()})
    return rows


def prices(quick: bool) -> list[dict[str, Any]]:
    """`read`: what the adapter adds to an iteration of 64 decodes with 1,024 tokens before each, once its kernels run at all."""
    rows = []
    for place in PLACES[:1] if quick else PLACES:
        tp = min(tp for _, _, tp in place.alone)
        for rank, modules in ((8, "attention"), (64, "attention"), (8, "all"), (64, "all")):
            device = instance(Candidates(replace(place.site, adapter_modules=modules)).replica(Shape(tp)))
            assert isinstance(device.cost, Roofline)
            adapters: Adapters = device.cost.adapters
            plain, once, twice = (
                device.cost.seconds([*[(ranks, -1)] * (ranks > 0), *[(1024, 1)] * 64]) for ranks in (0, rank, 2 * rank)
            )
            rows.append(
                {
                    "model": f"{place.site.model} TP{tp}", "rank": rank, "on": modules, "MB a device": adapters.bytes(rank) / 1e6,
                    "KV blocks, %": 100 * adapters.blocks(rank, 16) / device.capacity.num_blocks,
                    "load, ms": 1e3 * adapters.bytes(rank) / HOST_LINK, "iteration, ms": 1e3 * plain,
                    "kernels, ms": 1e3 * (2 * once - twice - plain), "read, ms": 1e3 * (twice - once),
                }
            )  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    sides: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["rank"], row["on"]) == (64, "all") and row["adapters"] >= 10:
            sides.setdefault(row["model"], []).append((row["adapters"], row["pools / co-located"]))
    plot.lines(sides, "adapters of rank 64 on all matrices", "two pools / co-located", "A100", file, log="x", even=1.0)


PARTS = {"sites": sites, "causes": causes, "prices": prices}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=PARTS, nargs="+", help="what to look at")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios of `sites`")
    args = arguments.parse_args()
    facts = machine()
    for part in args.part:
        rows = PARTS[part](args.quick)
        show(f"Adapters: {part}", rows, facts, args.json)
        if args.plot and part == "sites":
            draw(rows, args.plot)


if __name__ == "__main__":
    main()
