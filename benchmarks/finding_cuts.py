"""Does a request that is cut at any token, or moves while it decodes, serve more than co-location and than two pools? Simulated,
Llama-2-13B on the 8 A100 80 GB of a node.

A capacity is the highest rate at which every target is met, on all GPUs. Every side has the same engine, load and targets:

    slo         co-located, the token budget found by the targets; the best split of the model
    fixed       co-located, the best of four token budgets, on the same split
    pools       the best of distserve, splitwise and hybrid over the two best pairs of pools
    taichi      P-heavy and D-heavy instances: the best of four ratios, then of the chunk sizes of each kind
    dynaserve   equal instances with policy slo; each request is cut where it balances two of them

    python benchmarks/finding_cuts.py --plot docs/images/finding_cuts.png
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness import machine, parser, show

from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.metrics.report import Targets
from stallfree.planner.candidates import WAYS, Candidates, Deployed, Kinds, Shape, name, together
from stallfree.planner.capacities import capacities
from stallfree.planner.parts import pairs, parts
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import SplitSimulator
from stallfree.sim.systems import Chunk, chunked
from stallfree.sim.trials import Trials, Tried
from stallfree.workload.traffic import Traffic

MIXES = {
    "chat": "median=512,p90=1500/median=200,p90=500",
    "long prompt": "median=2048,p90=3000/median=32,p90=64",
    "long answer": "median=128,p90=256/median=256,p90=512",
    "balanced": "median=1024,p90=2048/median=256,p90=512",
}
TARGETS = {"tight": "ttft=500ms@p90,tbt=40ms@p99", "loose": "ttft=2s@p90,tpot=75ms@p90"}
"""Under the loose ones, a token that comes early saves slack for later ones."""
SITE = Site("llama2-13b", gpus=8, max_model_len=4096)
BUDGETS = (256, 512, 1024, 2048)
PURE, MOVES = ("slo", "fixed", "pools"), ("taichi", "dynaserve")
TOLERANCE, ROUGH = 0.04, 0.08
"""Of the capacities, as shares of them: of all GPUs, and of the parts from which pairs of pools follow."""
STEP, LEAST = 1.2, 1 / 4
DRAWS = 3
"""Draws of the load; the rates are medians."""


class Best(NamedTuple):
    """The best of a side: requests per second, and what it is (None: nothing meets the targets)."""

    rate: float
    deployed: Deployed | None


class Cell:
    """The capacities under one mix and one target, on all GPUs."""

    def __init__(self, mix: str, targets: str, requests: int):
        self.candidates, self.slo, self.text = Candidates(SITE), Slo.parse(targets), targets
        self.traffic = Traffic(lengths=MIXES[mix], max_total=4096, requests=requests)

    def row(self) -> dict[str, Best]:
        """The best of each side in the first draw of the load, with the median of its capacities in all draws."""
        each = parts(self.candidates, self.traffic, self.slo, False, self._roughly)
        shapes = sorted(each.alone, key=lambda shape: -each.alone[shape] / shape.size)[:2]
        start = each.alone[shapes[0]] * SITE.gpus / shapes[0].size
        slo = [self._best([together(self._replicas(shape, None), SITE.gpus // shape.size)], start) for shape in shapes]
        found = {"slo": max(slo, key=lambda best: best.rate)}
        shape = shapes[slo.index(found["slo"])]
        fixed = [together(self._replicas(shape, budget), SITE.gpus // shape.size) for budget in BUDGETS]
        found["fixed"] = self._best(fixed, start)
        whole = [self.candidates.repeated(pair, self.candidates.most(pair)) for _, _, pair in pairs(self.candidates, each)[:2]]
        pools = [self.candidates.like(pair, way) for pair, way in product(whole, WAYS) if isinstance(pair, Split)]
        found["pools"] = self._best(pools, start)
        found["taichi"] = self._taichi(self._ratios(shape, whole), start)
        equal = [((shape, SITE.gpus // shape.size // 2),) * 2 for shape in shapes if SITE.gpus // shape.size > 1]
        found["dynaserve"] = self._best([self._moving("dynaserve", kinds, (None, None)) for kinds in equal], start)
        return self._drawn(found)

    def _replicas(self, shape: Shape, chunk: Chunk, number: int = 1) -> Deployment:
        return chunked(self.candidates.replica(shape, slo=self.text, replicas=number), chunk)

    def _moving(self, way: str, kinds: Kinds, chunks: tuple[Chunk, Chunk]) -> Split:
        return self.candidates.moving(way, kinds, chunks, self.text)

    def _ratios(self, shape: Shape, whole: Iterable[Deployed]) -> list[Kinds]:
        """Some, half and most of the instances P-heavy; and the two kinds of the best pair of pools."""
        number = SITE.gpus // shape.size
        heavy = {max(1, number // 4), number // 2, number * 3 // 4}
        kinds = [((shape, p), (shape, number - p)) for p in sorted(heavy) if 0 < p < number]
        pools = [(pair.prefill, pair.decode) for pair in whole if isinstance(pair, Split)][:1]
        return kinds + [((Shape.of(p), p.replicas), (Shape.of(d), d.replicas)) for p, d in pools]

    def _taichi(self, ratios: Iterable[Kinds], start: float) -> Best:
        """The best ratio first, then the best chunk size of its P-heavy instances, then that of its D-heavy ones."""
        best = self._best([self._moving("taichi", kinds, (1024, 256)) for kinds in ratios], start)
        for kind, sizes in ((0, (512, 2048, None)), (1, (512, 1024, None))):
            if isinstance(best.deployed, Split):
                pools = best.deployed.prefill, best.deployed.decode
                kinds = (Shape.of(pools[0]), pools[0].replicas), (Shape.of(pools[1]), pools[1].replicas)
                chunks = [pool.token_budget for pool in pools]
                others = [self._moving("taichi", kinds, (size, chunks[1]) if kind == 0 else (chunks[0], size)) for size in sizes]
                best = max(best, self._best(others, start), key=lambda each: each.rate)
        return best

    def _best(self, deployed: Sequence[Deployed], start: float) -> Best:
        """The best of several in the first draw. One that misses the targets at a share `LEAST` of `start` is left there."""
        rates = self._capacities({str(n): each for n, each in enumerate(deployed)}, start, 0)
        number = max(range(len(deployed)), key=lambda n: rates[str(n)], default=None)
        return Best(0.0, None) if number is None or not rates[str(number)] else Best(rates[str(number)], deployed[number])

    def _drawn(self, found: Mapping[str, Best]) -> dict[str, Best]:
        sides = {side: best.deployed for side, best in found.items() if best.deployed is not None}
        draws = [self._capacities(sides, max(best.rate for best in found.values()), seed) for seed in range(1, DRAWS)]
        return {
            side: best._replace(rate=median([best.rate, *(rates[side] for rates in draws)])) if side in sides else best
            for side, best in found.items()
        }

    def _capacities(self, deployed: Mapping[str, Deployed], start: float, seed: int) -> dict[str, float]:
        cases = {
            key: (Simulator(each) if isinstance(each, Deployment) else SplitSimulator(each), self.slo, start, seed)
            for key, each in deployed.items()
        }
        if not cases:
            return {}
        return {key: found.rate for key, found in capacities(cases, self.traffic, Trials, TOLERANCE, STEP, LEAST).items()}

    def _roughly(self, cases: Mapping[str, tuple[Tried, Targets, float]]) -> dict[str, float]:
        seeded = {key: (*case, 0) for key, case in cases.items()}
        return {key: found.rate for key, found in capacities(seeded, self.traffic, Trials, ROUGH, STEP).items()}


def title(deployed: Deployed | None) -> str:
    """A name, with the number of co-located replicas."""
    if deployed is None:
        return "none"
    return f"{deployed.replicas} x {name(deployed)}" if isinstance(deployed, Deployment) else name(deployed)


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    sides = {side: [(f"{row['targets']}, {row['mix']}", row[f"{side} / pure"]) for row in rows] for side in MOVES}
    plot.dots(sides, "over the best of slo, fixed and pools", "Llama-2-13B, 8 A100", file, even=1.0)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("cells", nargs="*", metavar="CELL", help="TARGETS:MIX, such as tight:chat; without one, all")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios to the better of co-location and pools")
    args = arguments.parse_args()
    every = [f"{targets}:{mix}" for targets, mix in product(TARGETS, MIXES)]
    rows, what = [], []
    for cell in every[:1] if args.quick else args.cells or every:
        targets, mix = cell.split(":")
        found = Cell(mix, TARGETS[targets], 64 if args.quick else 128).row()
        pure = max(found[side].rate for side in PURE)
        row = {"targets": targets, "mix": mix} | {side: best.rate for side, best in found.items()}
        rows.append(row | {f"{side} / pure": found[side].rate / pure if pure else None for side in MOVES})
        what.append({"targets": targets, "mix": mix} | {side: title(best.deployed) for side, best in found.items()})
        print(rows[-1], what[-1], flush=True)
    show("Requests/s on all GPUs, the median of the draws", rows, machine(), args.json)
    show("What each side is", what, {}, None)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
