"""Deployments whose requests are cut at any token, or move while they decode: those that are worth a simulation.

It knows the capacities of co-located replicas, which say what such instances may serve together, and simulates nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from stallfree.planner.candidates import Candidates, Shape
from stallfree.sim.deployment import Split
from stallfree.sim.systems import CHUNKS, Chunk, chunked

RATIOS = ((1, 1), (1, 3), (3, 1))
"""Numbers of P-heavy and D-heavy instances in a unit. They are compared with the chunk sizes `CHUNKS`."""
OTHERS: tuple[tuple[Chunk, ...], tuple[Chunk, ...]] = (512, 2048, None), (512, 1024, None)
"""The chunk sizes that the best ratio is tried with next, those of P-heavy instances first, then those of the others."""
SHAPES = 2
"""Equal instances are tried with so many splits of the model: the best by capacity."""


def units(candidates: Candidates, alone: Mapping[Shape, float], slo: str) -> Iterator[tuple[Split, float]]:
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
            unit = candidates.moving(mover, ((shape, first), (shape, second)), CHUNKS[mover], slo)
            if candidates.most(unit):
                yield unit, (first + second) * alone[shape]


def other_chunks(unit: Split, second: bool) -> Iterator[Split]:
    """`unit` with each other chunk size of its first, or of its `second`, kind of instances."""
    pool = unit.decode if second else unit.prefill
    for chunk in OTHERS[second]:
        other = chunked(pool, chunk)
        yield replace(unit, decode=other) if second else replace(unit, prefill=other)
