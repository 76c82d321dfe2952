"""Iterations alike: one that is planned, how many of the next ones would be planned like it, and all of them taken in one leap,
with the same accounts as one by one.

For those who need no tokens computed, such as a simulator. It does not know how long an iteration takes.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from stallfree.core.draft import Draft
from stallfree.core.request import Request

if TYPE_CHECKING:
    from stallfree.core.kv import BlockPool
    from stallfree.core.scheduler import Scheduler


class Stretch:
    """Iterations from `step` on: the first as in `draft`; up to `most` in a row like it, each piece that many tokens further, if
    nobody comes, goes or ends. `sampling`: those who get a token in each, in order. `preempted`: ids, before the first.

    `grown`, after the leap: the KV blocks that each iteration took; those of the first had been taken before.
    """

    __slots__ = ("draft", "grown", "most", "preempted", "sampling", "step")

    def __init__(self, scheduler: Scheduler, draft: Draft, preempted: tuple[str, ...], most: int):
        self.step = scheduler.step
        self.draft = draft
        self.preempted = preempted
        self.sampling = [r for r in draft.work if r.num_planned == r.num_tokens] if draft.chunks else list(draft.work)
        self.most = 1 if preempted else min(most, _alike(scheduler, draft, most))
        self.grown: list[int] = []

    def advance(self, pool: BlockPool, steps: int) -> None:
        """What is planned, computed and held is brought to where it is after `steps` iterations; the tokens are there already."""
        work = self.draft.work
        if steps > 1:
            self._lengthen(pool, steps)
        for r in work:
            r.num_computed = r.num_planned
        if pool.reuse and steps == 1:
            for r in work:
                pool.commit(r)

    def _lengthen(self, pool: BlockPool, steps: int) -> None:
        """Plan all but the first. Blocks are taken, and filled ones indexed, in the order in which single steps would do it: on
        that depends which cached blocks make room.
        """
        self.grown = [0] * steps
        moments: list[tuple[int, int, int, Request, int]] = []
        size = pool.block_size
        for number, (r, count) in enumerate(self.draft.work.items()):
            stop = r.num_planned
            r.num_planned = end = stop + (steps - 1) * count
            held = len(r.blocks) * size
            while held < end:
                moments.append((-(-(held + 1 - stop) // count), 0, number, r, held + 1))
                held += size
            if pool.reuse:
                full = (r.num_shared + 1) * size
                while full <= end:
                    moments.append((max(0, -(-(full - stop) // count)), 1, number, r, full))
                    full += size
        moments.sort(key=lambda moment: moment[:3])
        for step, is_commit, _, r, upto in moments:
            if is_commit:
                r.num_computed = upto
                pool.commit(r)
            else:
                pool.grow(r, upto)
                self.grown[step] += 1


def _alike(scheduler: Scheduler, draft: Draft, most: int) -> int:
    """How many iterations in a row a steady policy would plan alike, the one in `draft` included.

    It is in the same place again if every running request moved on and one prompt at the most was in the works, cut off by the
    token limit and not yet at its end. Who was refused then is refused again: there will not be more room.
    """
    work = draft.work
    if draft.searched or len(draft.chunks) > 1 or len(work) < len(scheduler.running):
        return 1
    size = scheduler.pool.block_size
    for r in draft.chunks:
        if draft.left > 0 or not r.remaining or len(r.blocks) * size < r.num_tokens:
            return 1
        most = min(most, 1 + (r.remaining - 1) // work[r])
    free = scheduler.pool.num_free
    if (most // size + 1) * len(work) <= free:
        return most

    def lacking(steps: int) -> int:
        """Blocks for the decodes in so many iterations."""
        return sum([max(0, -(-(r.num_planned + steps - 1) // size) - len(r.blocks)) for r in work if r not in draft.chunks])

    return bisect_right(range(1, most + 1), free, key=lacking)
