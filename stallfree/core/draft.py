"""The iteration while a policy writes it: what the policy may read, and the verbs that it may call.

A draft enforces the engine's limits and keeps the KV accounts, so a policy cannot break them. A policy may only lower the token
limit. A draft chooses nothing itself.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence, Set

from stallfree.core.ledger import Ledger
from stallfree.core.plan import UNKNOWN, Plan, Work
from stallfree.core.queue import Entry
from stallfree.core.request import Lane, Request, Status

RUNNING = Status.RUNNING  # looked up once: attributes of an enum are slow, and every decode needs this one

ENGINE_LIMIT = "the engine's limit"
"""The reason for the token budget if the policy gives none."""


SCORED_TOKENS = 128
"""The most tokens in an iteration whose logits are all needed, over all requests: with 152,064 logits for a token, 78 MB. A policy
that computes prompts whole does not keep to it."""


class Draft:
    """One iteration, from an empty draft to a sealed plan.

    A policy reads: `now` (s); `left`, tokens that still fit; `running`; `decoding`, the ready decodes (with overlap, also those
    that the running iteration will make ready); `prefilling`, running requests with more to compute; `waiting`; `num_waiting`;
    `lanes` with a waiting request, and `first`, the first requests of one; and `shape`, the work written so far. The lists are in
    the policy's order; `decoding` and `prefilling` are as they were in the empty draft. Verbs: `decode`, `decode_all`, `prefill`,
    `admit`, `displace`, `preempt`, `relegate`, `cap`. `limit_s` and `margin` are optional; the plan only copies them. After
    the policy, `Speculation` may `guess` more tokens for its decodes.

    The scheduler reads: `work`, the tokens written per request, in order; `chunks`, the part of it that is not decodes; `admitted`;
    and `searched`: whether the prefix cache was searched for a request that then found no room.
    """

    __slots__ = (
        "_block_size", "_ledger", "_passed", "_ready", "_restored", "_scored_left", "admitted", "budget", "chunks", "decoding",
        "left", "limit_s", "margin", "now", "prefilling", "reason", "searched", "work",
    )  # fmt: skip

    def __init__(self, ledger: Ledger, now: float):
        self._ledger = ledger
        self._block_size = ledger.pool.block_size
        self.work: dict[Request, int] = {}
        self.chunks: dict[Request, int] = {}
        self.admitted: list[Request] = []
        self.searched = False
        self._restored: dict[Request, int] = {}
        if ledger.pool.tier is not None:
            ledger.pool.tier.begin()
        self._passed: list[Entry] = []
        self.now = now
        self.left = self.budget = ledger.limits.max_tokens
        self._scored_left = SCORED_TOKENS
        self.reason = ENGINE_LIMIT
        self.limit_s: float | None = None
        self.margin: float | None = None
        self.decoding: list[Request] = []
        self.prefilling: list[Request] = []
        overlap = ledger.capacity.overlap
        for r in ledger.running:
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
        return self._ledger.running

    @property
    def num_waiting(self) -> int:
        return self._ledger.num_waiting

    @property
    def empty(self) -> bool:
        return not self.work

    @property
    def shape(self) -> list[tuple[int, int]]:
        pieces = [(r.num_planned - count, count) for r, count in self.work.items()]
        return [(ranks, -1), *pieces] if (ranks := self._ranks) else pieces

    @property
    def guessable(self) -> list[Request]:
        """The decodes in the draft whose last token is known, so that the tokens after it can be guessed. With several plans in
        flight, another one may still compute tokens before it."""
        return [r for r in self.work if r not in self.chunks and r.num_planned == r.num_tokens and not r.in_flight]

    def brings(self, request: Request) -> list[tuple[int, int]]:
        """What the request's adapter would add to `shape`: nothing if it has none, or if work in the draft uses it already."""
        adapter = request.adapter
        if not adapter or any(r.adapter == adapter for r in self.work):
            return []
        return [(self._ledger.adapters.rank(adapter), -1)]

    @property
    def _ranks(self) -> int:
        """The sum of the ranks of the adapters in the draft."""
        adapters = self._ledger.adapters
        return sum(map(adapters.rank, {r.adapter for r in self.work})) if adapters.resident else 0

    @property
    def waiting(self) -> Iterator[Request]:
        """Waiting requests, in order. A request that is not admitted is passed over until the next iteration."""
        queue = self._ledger.queue
        while (entry := queue.head()) is not None:
            yield entry[2]
            if queue.live(entry):
                self._passed.append(queue.pop())

    @property
    def lanes(self) -> Collection[Lane]:
        """Those with a waiting request."""
        return self._ledger.queue.lanes

    @property
    def parked(self) -> Set[str]:
        """The tenants with a request that waits for its adapter. Such a request is in no lane."""
        return self._ledger.adapters.tenants

    @property
    def queue_version(self) -> tuple[int, int]:
        """Another one whenever the waiting requests are others."""
        return self._ledger.queue.version

    def first(self, lane: Lane, most: int = 1) -> list[Request]:
        """The first `most` waiting requests of a lane, in order."""
        return self._ledger.queue.first(lane, most)

    @property
    def overlap(self) -> bool:
        """Whether an iteration is planned while another one runs."""
        return self._ledger.capacity.overlap

    @property
    def full(self) -> bool:
        """Whether as many requests have KV as may run."""
        return self._ledger.full

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV all running requests together can have."""
        pool = self._ledger.pool
        return (pool.num_blocks - self._ledger.watermark) * pool.block_size

    def start(self, request: Request) -> int:
        """The position at which the next chunk of a request begins. For a waiting request: its tokens in the prefix cache now."""
        return self._ledger.pool.look(request) if request.status is Status.WAITING else request.num_planned

    def fits(self, request: Request) -> bool:
        """Whether there is KV for all tokens that a running request still needs, or for its next decode, without preempting any
        other. Takes nothing."""
        return self._ledger.pool.fits(request, max(request.num_tokens, request.num_planned + 1), 0)

    def cap(self, tokens: int, reason: str) -> None:
        """Lower this iteration's token limit to `tokens`, including those already written, for this `reason`."""
        tokens = max(0, tokens)
        if tokens < self.budget:
            self.left -= self.budget - tokens
            self.budget = tokens
            self.reason = reason

    def decode(self, request: Request) -> bool:
        """Give a ready decode its token. If KV is short, this preempts requests after it in the order. Returns False if that is not
        enough, if no token is left, if the request is not a ready decode, or if it already has its token.
        """
        return self._decode((request,)) > 0

    def decode_all(self, but: Collection[Request] = ()) -> None:
        """`decode` for every ready decode that is not in `but`, in order."""
        self._decode([r for r in self.decoding if r not in but] if but else self.decoding)

    def _decode(self, requests: Iterable[Request]) -> int:
        """`decode` for each of `requests`. Returns how many got their token."""
        ready, work, size, number = self._ready, self.work, self._block_size, 0
        for request in requests:
            if request not in ready or self.left <= 0:
                continue
            start = request.num_planned
            if start >= len(request.blocks) * size and not self._make_room(request, start + 1):
                continue
            ready.remove(request)
            work[request] = 1
            request.num_planned = start + 1
            self.left -= 1
            number += 1
        return number

    def prefill(self, request: Request, count: int | None = None) -> int:
        """Plan up to `count` more tokens of a running request, as many as fit. Returns their number."""
        if request.status is not RUNNING or request in self.work:
            return 0
        if back := self._ledger.pool.restore(request):
            request.num_cached += back
            self._restored[request] = back
        size = min(request.remaining, self.left, request.remaining if count is None else count)
        if request.scored:
            size = min(size, self._scored_left)
        if self._ledger.pool.restorable(request):
            size = min(size, 1)  # the rest of this prefix comes back in the next iterations
        if size <= 0 or not self._make_room(request, request.num_planned + size):
            return 0
        self._write(request, size)
        return size

    def guess(self, request: Request, tokens: Sequence[int]) -> int:
        """Let the iteration check whether `tokens` follow a request that is `guessable`: as many as fit without taking KV from
        anybody. Returns their number.
        """
        ledger = self._ledger
        most = min(len(tokens), self.left, request.max_tokens - len(request.output) - 1, ledger.max_len - request.num_tokens)
        if most > 0 and not ledger.pool.grow(request, request.num_planned + most, ledger.spare):
            most = min(most, len(request.blocks) * self._block_size - request.num_planned)
        if most <= 0:
            return 0
        request.drafts = tuple(tokens[:most])
        self.work[request] += most
        request.num_planned += most
        self.left -= most
        return most

    def admit(self, request: Request, count: int | None = None, *, whole: bool = False) -> int:
        """Admit a waiting request, reserve KV as the policy says, and plan its first chunk. Returns its tokens; 0 if refused.

        `whole` plans all of its tokens in this iteration or none. A whole prompt may exceed the token limit if it is alone in the
        iteration; otherwise a long prompt would starve.
        """
        ledger = self._ledger
        pool = ledger.pool
        if not request.ticket or self.left <= 0 or ledger.full:  # with a ticket, it waits in this ledger's queue
            return 0
        spare = ledger.kept_free(request)
        cached = pool.match(request, spare)
        remaining = request.num_tokens - cached
        size = min(remaining, self.left, remaining if count is None else count)
        if request.scored:
            size = min(size, self._scored_left)
        if pool.restorable(request):
            size = min(size, 1)
        if whole:
            size = remaining if remaining <= self.left or self.empty else 0
        first, whole_prompt = cached + size, request.num_tokens
        upto = {"chunk": first, "fit": first, "prompt": whole_prompt, "max": len(request.prompt) + request.max_tokens}
        fits = ledger.reserve != "fit" or pool.fits(request, whole_prompt, spare)
        if size <= 0 or not fits or not pool.grow(request, upto[ledger.reserve], spare):
            pool.release(request)
            self.searched = self.searched or pool.reuse
            return 0
        request.num_cached = request.num_computed = request.num_planned = cached
        ledger.run(request)
        self.admitted.append(request)
        if request.num_restored:
            self._restored[request] = request.num_restored
        self._write(request, size)
        return size

    def displace(self, request: Request, victims: Collection[Request], count: int) -> int:
        """Preempt the `victims`, and `admit` a request in their place. If one of them is in flight, or all together would not make
        room, nothing happens. Returns the tokens of the request's chunk, or 0.
        """
        ledger = self._ledger
        size = ledger.pool.block_size
        free = ledger.pool.num_free + sum([len(v.blocks) for v in victims]) - ledger.watermark
        if any(v.in_flight for v in victims) or free < -(-request.num_tokens // size):
            return 0
        for victim in victims:
            self.preempt(victim)
        return self.admit(request, count)

    def relegate(self, request: Request, relegated: bool = True) -> None:
        """Put a request among those whose targets cannot be met any more, or take it out again. This moves it to another lane."""
        waits = bool(request.ticket)
        if waits:
            self._ledger.queue.discard(request)
        request.relegated = relegated
        if waits:
            self._ledger.queue.push(request)

    def preempt(self, request: Request) -> None:
        """Put a running request, not in flight, back at its old place in the queue, without its KV. It is recomputed later."""
        if request.status is not RUNNING or request.in_flight:
            raise ValueError(f"only a running request that is not in flight can be preempted, not {request!r}")
        self._ready.discard(request)
        count = self.work.pop(request, None)
        if count is not None:
            self.chunks.pop(request, None)
            self.left += count
        self._ledger.preempt(request)

    def seal(self, step: int, *, tables: bool = True) -> tuple[Plan, list[Request]]:
        """Close the draft. Returns the plan, and its requests in the order of its work. Without `tables`, its decodes name no
        blocks: they are many numbers, and a simulated machine reads none."""
        self.close()
        chunks = self.chunks
        # This runs for every stream in every iteration: `_chunk`, written out for a decode, without a call of `Work`.
        new = tuple.__new__
        work = [
            self._chunk(r, chunks[r])
            if r in chunks
            else self._guessed(r)
            if r.drafts
            else new(Work, (
                r.id, r.num_planned - 1, 1, True, True, (r.output[-1] if r.num_planned <= r.num_tokens else UNKNOWN,),
                tuple(r.blocks) if tables else (), r.sampling, r.adapter, r.prompt, r.output,
            ))
            for r in self.work
        ]  # fmt: skip
        preempted = tuple(self._ledger.preempted)
        plan = Plan(
            step, self.now, tuple(work), preempted, self.stalled, self.cached, self.budget, self.reason, self.limit_s, self.margin,
            self._ranks, tuple([(r.id, tokens) for r, tokens in self._restored.items() if r in self.work]),
        )  # fmt: skip
        return plan, list(self.work)

    def close(self) -> None:
        """End the writing. The requests that were passed over return to the queue."""
        for entry in self._passed:
            self._ledger.queue.restore(entry)

    @property
    def stalled(self) -> tuple[str, ...]:
        """Ids of the ready decodes that get no token."""
        if len(self.decoding) + len(self.chunks) == len(self.work):
            return ()
        return tuple([r.id for r in self.decoding if r not in self.work])

    @property
    def cached(self) -> tuple[tuple[str, int], ...]:
        """(id, tokens found in the prefix cache) of the requests admitted."""
        return tuple([(r.id, r.num_cached) for r in self.admitted if r in self.work])

    @staticmethod
    def _chunk(r: Request, count: int) -> Work:
        stop = r.num_planned
        start = stop - count
        return Work(
            r.id, start, count, stop == r.num_tokens, False, r.tokens(start, stop), tuple(r.blocks), r.sampling, r.adapter,
            r.prompt, r.output,
        )  # fmt: skip

    @staticmethod
    def _guessed(r: Request) -> Work:
        count = 1 + len(r.drafts)
        return Work(
            r.id, r.num_planned - count, count, True, True, (r.output[-1], *r.drafts), tuple(r.blocks), r.sampling, r.adapter,
            r.prompt, r.output,
        )  # fmt: skip

    def _write(self, request: Request, count: int) -> None:
        self._ready.discard(request)
        self.work[request] = count
        self.chunks[request] = count
        request.num_planned += count
        self.left -= count
        if request.scored:
            self._scored_left -= count

    def _make_room(self, request: Request, upto: int) -> bool:
        """Grow `request` to `upto` tokens. If KV is short, preempt requests after it that are not in flight, the last first."""
        ledger = self._ledger
        if ledger.pool.grow(request, upto):
            return True
        for victim in ledger.running[::-1]:
            if victim.key <= request.key:
                return False
            if not victim.in_flight:
                self.preempt(victim)
                if ledger.pool.grow(request, upto):
                    return True
        return False
