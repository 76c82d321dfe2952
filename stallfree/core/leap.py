"""Leaps, for the simulator: plan one iteration, count how many of the next ones would be planned like it, and complete them all at
once. Requests and KV blocks end as if each iteration had run.

It computes no tokens, and does not know how long an iteration takes.
"""

from bisect import bisect_right
from collections.abc import Sequence

from stallfree.core.kv import BlockPool
from stallfree.core.ledger import Ledger
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler


class Stretch:
    """The next iteration of `scheduler`, at `now`, and up to `most` iterations in a row that would be planned alike, each a step
    further, while no request arrives, leaves or ends. `leap` completes them; before that, call nothing else of the scheduler.
    Raises ValueError unless the policy is steady and nothing is in flight.

    `step`: number of the first iteration; `draft`: its draft; `sampling`: the requests that get a token in each, in order;
    `preempted`: ids preempted before the first. `grown`, after the leap: KV blocks that each iteration after the first took.
    """

    __slots__ = ("_scheduler", "draft", "grown", "most", "preempted", "sampling", "step")

    def __init__(self, scheduler: Scheduler, now: float, most: int):
        if not scheduler.steady or scheduler.num_in_flight:
            raise ValueError("a stretch needs a policy that is `steady` and no plan in flight; schedule step by step instead")
        self._scheduler = scheduler
        self.step = scheduler.step
        self.draft = draft = scheduler.draft(now)
        draft.close()
        ledger = scheduler.ledger
        self.preempted = tuple(ledger.preempted)
        self.sampling = [r for r in draft.work if r.num_planned == r.num_tokens] if draft.chunks else list(draft.work)
        self.most = 1 if self.preempted else min(most, self._alike(ledger, most))
        self.grown: list[int] = []
        if draft.work:
            ledger.preempted.clear()
        else:
            scheduler.open = None

    def taken(self, steps: int) -> int:
        """KV blocks that the first `steps` iterations take, without the first itself. Before the leap, the pool counts them as
        free."""
        size = self._scheduler.ledger.pool.block_size
        ends = [(r, r.num_planned + (steps - 1) * count) for r, count in self.draft.work.items()]
        return sum([max(0, -(-end // size) - len(r.blocks)) for r, end in ends])

    def leap(self, steps: int, tokens: Sequence[Sequence[int]], now: float) -> list[Request]:
        """Complete the first `steps` iterations. `tokens`: for each request of `sampling`, one token per iteration; only the last
        may end the request. Returns the requests that ended, at `now`.
        """
        scheduler = self._scheduler
        if self.draft is not scheduler.open or not 1 <= steps <= self.most:
            raise ValueError(f"cannot leap over {steps} steps; the stretch must be the open one, with 1 to {self.most} steps")
        scheduler.open = None
        scheduler.step += steps
        ledger = scheduler.ledger
        ending: list[tuple[Request, str]] = []
        for request, sampled in zip(self.sampling, tokens, strict=True):
            output = request.output
            if not output:
                request.first_token = now
            request.last_token = now
            output += sampled
            request.num_tokens += steps
            if sampled[-1] in request.stop_ids and len(output) > request.min_tokens:
                ending.append((request, "stop"))
            elif len(output) >= request.max_tokens:
                ending.append((request, "length"))
        self._advance(ledger.pool, steps)
        for request, reason in ending:
            ledger.end(request, reason)
        if ending:
            ledger.sweep()
        return [request for request, _ in ending]

    def _advance(self, pool: BlockPool, steps: int) -> None:
        """Update the counts and blocks of the requests to the end of `steps` iterations. Their tokens are already appended."""
        work = self.draft.work
        if steps > 1:
            self._lengthen(pool, steps)
        for r in work:
            r.num_computed = r.num_planned
        if pool.reuse and steps == 1:
            for r in work:
                pool.commit(r)

    def _lengthen(self, pool: BlockPool, steps: int) -> None:
        """Plan all iterations after the first. Blocks are taken, and full ones indexed, in the order of single steps, because this
        order decides which cached blocks are evicted.
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

    def _alike(self, ledger: Ledger, most: int) -> int:
        """How many iterations in a row a steady policy would plan alike, including the first.

        An iteration repeats if every running request moved on but for those whose KV is on its way, and at most one prompt was
        computed, whose chunk the token limit cut short of its end. A request that was refused is refused again, because there will
        not be more room.
        """
        draft = self.draft
        work = draft.work
        if draft.searched or len(draft.chunks) > 1:
            return 1
        if len(work) < len(ledger.running) and len(work) < sum([not r.transferring for r in ledger.running]):
            return 1
        size = ledger.pool.block_size
        for r in draft.chunks:
            if draft.left > 0 or not r.remaining or len(r.blocks) * size < r.num_tokens:
                return 1
            most = min(most, 1 + (r.remaining - 1) // work[r])
        free = ledger.pool.num_free
        if (most // size + 1) * len(work) <= free:
            return most
        return bisect_right(range(1, most + 1), free, key=self.taken)
