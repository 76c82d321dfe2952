"""The iteration being written: what a policy may read, and the five verbs it speaks.

A draft keeps the engine's limits and the KV accounts, so a policy cannot break them; it may only lower the token limit. It does
not choose anything itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stallfree.core.plan import UNKNOWN, Plan, Work
from stallfree.core.request import Request, Status

if TYPE_CHECKING:
    from stallfree.core.scheduler import Scheduler

RUNNING = Status.RUNNING  # looked up once: attributes of an enum are slow, and this one is asked for at every decode

ENGINE_LIMIT = "the engine's limit"
"""The reason for the budget where a policy gives none."""


class Draft:
    """One iteration, from an empty page to a sealed plan.

    Reads: `now` (s); `left`, tokens that still fit; `running`, `decoding` (one token short: ready decodes; where iterations
    overlap, also those that will be once the one that runs has ended) and `prefilling` (more to catch up on), each in order of
    priority, then arrival, as they stood when the page was empty; `waiting`, the same order; `shape`, what is written so far.
    Verbs: `decode`, `prefill`, `admit`, `preempt`, `cap`. Notes that go into the record unread: `limit_s`, `margin` (see `Plan`).

    For the scheduler: `work`, how many tokens of each request are written, in their order, and which of these are `chunks`, not
    decodes; who was `admitted`; whether the prefix cache was `searched` in vain, for a request that then found no room.
    """

    __slots__ = (
        "_block_size", "_passed", "_ready", "_scheduler", "admitted", "budget", "chunks", "decoding", "left", "limit_s", "margin",
        "now", "prefilling", "reason", "searched", "work",
    )  # fmt: skip

    def __init__(self, scheduler: Scheduler, now: float):
        self._scheduler = scheduler
        self._block_size = scheduler.pool.block_size
        self.work: dict[Request, int] = {}
        self.chunks: dict[Request, int] = {}
        self.admitted: list[Request] = []
        self.searched = False
        self._passed: list[tuple[tuple[int, float, int], int, Request]] = []
        self.now = now
        self.left = self.budget = scheduler.limits.max_tokens
        self.reason = ENGINE_LIMIT
        self.limit_s: float | None = None
        self.margin: float | None = None
        self.decoding: list[Request] = []
        self.prefilling: list[Request] = []
        overlap = scheduler.capacity.overlap
        for r in scheduler.running:
            remaining = r.num_tokens - r.num_planned
            if remaining == 1 and r.output:
                self.decoding.append(r)
            elif remaining > 0:
                self.prefilling.append(r)
            elif overlap and r.goes_on:
                self.decoding.append(r)
        self._ready = set(self.decoding)

    @property
    def running(self) -> list[Request]:
        return self._scheduler.running

    @property
    def empty(self) -> bool:
        return not self.work

    @property
    def shape(self) -> list[tuple[int, int]]:
        return [(r.num_planned - count, count) for r, count in self.work.items()]

    @property
    def waiting(self) -> Iterator[Request]:
        """Waiting requests, first to serve first; one that is not admitted is passed over until the next iteration."""
        queue = self._scheduler.queue
        while (entry := queue.head()) is not None:
            yield entry[2]
            if queue.live(entry):
                self._passed.append(queue.pop())

    def start(self, request: Request) -> int:
        """The position at which a request's next chunk begins. For a waiting request: the tokens found in the prefix cache now."""
        return self._scheduler.pool.look(request) if request.status is Status.WAITING else request.num_planned

    def cap(self, tokens: int, reason: str) -> None:
        """Lower this iteration's token limit to `tokens`, those already written included, because of `reason`."""
        tokens = max(0, tokens)
        if tokens < self.budget:
            self.left -= self.budget - tokens
            self.budget = tokens
            self.reason = reason

    def decode(self, request: Request) -> bool:
        """Give a ready decode its token. If KV is short, requests after it in order are preempted; False if that is not enough, if
        no token is left, or for a request that is not a ready decode or has its token already.
        """
        if request not in self._ready or self.left <= 0:
            return False
        start = request.num_planned
        if start >= len(request.blocks) * self._block_size and not self._make_room(request, start + 1):
            return False
        self._ready.remove(request)
        self.work[request] = 1
        request.num_planned = start + 1
        self.left -= 1
        return True

    def prefill(self, request: Request, count: int | None = None) -> int:
        """Plan up to `count` more tokens of a running request, as many as fit; returns how many."""
        if request.status is not RUNNING or request in self.work:
            return 0
        size = min(request.remaining, self.left, request.remaining if count is None else count)
        if size <= 0 or not self._make_room(request, request.num_planned + size):
            return 0
        self._write(request, size)
        return size

    def admit(self, request: Request, count: int | None = None, *, whole: bool = False) -> int:
        """Take in a waiting request, reserve KV as the policy says, and plan its first chunk; returns its tokens, 0 if refused.

        `whole` asks for all of its tokens in this iteration. Such a prompt may exceed the token limit if it is alone in the
        iteration: a long one would starve for ever.
        """
        scheduler = self._scheduler
        pool = scheduler.pool
        if not request.ticket or self.left <= 0 or scheduler.full:  # a ticket says that it waits in this scheduler's queue
            return 0
        cached = pool.match(request)
        remaining = request.num_tokens - cached
        size = min(remaining, self.left, remaining if count is None else count)
        if whole:
            size = remaining if remaining <= self.left or self.empty else 0
        upto = {"chunk": cached + size, "prompt": request.num_tokens, "max": len(request.prompt) + request.max_tokens}
        if size <= 0 or not pool.grow(request, upto[scheduler.policy.reserve], scheduler.spare):
            pool.release(request)
            self.searched = self.searched or pool.reuse
            return 0
        request.num_cached = request.num_computed = request.num_planned = cached
        scheduler.admitted(request)
        self.admitted.append(request)
        self._write(request, size)
        return size

    def preempt(self, request: Request) -> None:
        """Take a running request's KV and put it back in the queue, at its old place; it will recompute. Not if in flight."""
        if request.status is not RUNNING or request.in_flight:
            raise ValueError(f"only a running request that is not in flight can be preempted, not {request!r}")
        self._ready.discard(request)
        count = self.work.pop(request, None)
        if count is not None:
            self.chunks.pop(request, None)
            self.left += count
        self._scheduler.preempted(request)

    def seal(self, step: int, preempted: tuple[str, ...]) -> tuple[Plan, list[Request]]:
        """The plan, and its requests in the order of its work; the queue is whole again."""
        self.close()
        chunks = self.chunks
        # The one path that runs for every stream in every iteration: `_chunk`, spelt out for a decode, without a call of `Work`.
        new = tuple.__new__
        work = [
            self._chunk(r, chunks[r])
            if r in chunks
            else new(Work, (
                r.id, r.num_planned - 1, 1, True, True, (r.output[-1] if r.num_planned <= r.num_tokens else UNKNOWN,),
                tuple(r.blocks), r.sampling, r.adapter, r.prompt, r.output,
            ))
            for r in self.work
        ]  # fmt: skip
        plan = Plan(
            step, self.now, tuple(work), preempted, self.stalled, self.cached, self.budget, self.reason, self.limit_s, self.margin
        )
        return plan, list(self.work)

    def close(self) -> None:
        """Nothing more is written; the queue is whole again."""
        for entry in self._passed:
            self._scheduler.queue.restore(entry)

    @property
    def stalled(self) -> tuple[str, ...]:
        """The ready decodes that are left out."""
        if len(self.decoding) + len(self.chunks) == len(self.work):
            return ()
        return tuple([r.id for r in self.decoding if r not in self.work])

    @property
    def cached(self) -> tuple[tuple[str, int], ...]:
        """(id, tokens found in the prefix cache) of those admitted."""
        return tuple([(r.id, r.num_cached) for r in self.admitted if r in self.work])

    @staticmethod
    def _chunk(r: Request, count: int) -> Work:
        stop = r.num_planned
        start = stop - count
        return Work(
            r.id, start, count, stop == r.num_tokens, False, r.tokens(start, stop), tuple(r.blocks), r.sampling, r.adapter,
            r.prompt, r.output,
        )  # fmt: skip

    def _write(self, request: Request, count: int) -> None:
        self._ready.discard(request)
        self.work[request] = count
        self.chunks[request] = count
        request.num_planned += count
        self.left -= count

    def _make_room(self, request: Request, upto: int) -> bool:
        """Grow, preempting from the end of the order what stands behind `request` and is not in flight."""
        scheduler = self._scheduler
        if scheduler.pool.grow(request, upto):
            return True
        for victim in scheduler.running[::-1]:
            if victim.key <= request.key:
                return False
            if not victim.in_flight:
                self.preempt(victim)
                if scheduler.pool.grow(request, upto):
                    return True
        return False
