"""Deployments whose requests are cut at any token, move while they decode, or are spread over groups of instances: those that are
worth a simulation.

It knows the capacities of co-located replicas, which say what such instances may serve together, and simulates nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from stallfree.elastic.policies import POLICIES
from stallfree.metrics.report import Targets, by_class
from stallfree.planner.candidates import Candidates, Deployed, Shape
from stallfree.sim.deployment import Split
from stallfree.sim.systems import CHUNKS, Chunk, chunked

RATIOS = ((1, 1), (1, 3), (3, 1))
"""Numbers of P-heavy and D-heavy instances in a unit. They are compared with the chunk sizes `CHUNKS`."""
OTHERS: tuple[tuple[Chunk, ...], tuple[Chunk, ...]] = (512, 2048, None), (512, 1024, None)
"""The chunk sizes that the best ratio is tried with next, those of P-heavy instances first, then those of the others."""
SHAPES = 2
"""Equal instances are tried with so many splits of the model: the best by capacity."""


def units(candidates: Candidates, alone: Mapping[Shape, float], slo: Targets) -> Iterator[tuple[Deployed, float]]:
    """Units to begin with, and the requests per second that their instances serve without moves. `alone`: those of a co-located
    replica of each shape. None with adapters, which the simulator does not move."""
    if candidates.site.rank is not None:
        return
    plain = [shape for shape in alone if shape.size == shape.tp]
    best = sorted(plain, key=lambda shape: -alone[shape] / shape.size)[:SHAPES]
    for shape in best:
        cases = [("dynaserve", (1, 1))]
        if shape is best[0]:
            cases += [("taichi", numbers) for numbers in RATIOS]
        for mover, (first, second) in cases:
            unit = candidates.moving(mover, ((shape, first), (shape, second)), CHUNKS[mover], str(slo))
            if candidates.most(unit):
                yield unit, (first + second) * alone[shape]
    yield from _groups(candidates, best, alone, slo)


def _groups(
    candidates: Candidates, shapes: Sequence[Shape], alone: Mapping[Shape, float], slo: Targets
) -> Iterator[tuple[Deployed, float]]:
    """The instances of a node as elastic groups, with both policies: those of the first of `shapes` of which a node has several."""
    site = candidates.site
    if site.model is None or site.engine.endswith(".json") or site.tenant_weights is not None:  # they have no prices or weights
        return
    for shape in shapes:
        if (number := site.per_node // shape.tp) > 1:
            for policy in POLICIES:
                if policy == "loongserve" or by_class(slo).default.tbt is not None:
                    yield candidates.replica(Shape(shape.tp, 1, number), policy, slo=str(slo)), number * alone[shape]
            return


def other_chunks(unit: Split, second: bool) -> Iterator[Split]:
    """`unit` with each other chunk size of its first, or of its `second`, kind of instances."""
    pool = unit.decode if second else unit.prefill
    for chunk in OTHERS[second]:
        other = chunked(pool, chunk)
        yield replace(unit, decode=other) if second else replace(unit, prefill=other)
