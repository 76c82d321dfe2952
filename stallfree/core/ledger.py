"""The accounts under the scheduler: which requests there are, their states and order, and the KV blocks that they hold. Every
change of state is a method here. It chooses nothing and plans nothing.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from stallfree.core.adapters import Adapters, Turn
from stallfree.core.kv import BlockPool
from stallfree.core.plan import Capacity
from stallfree.core.queue import Queue
from stallfree.core.request import Refused, Request, Status

Reserve = Literal["chunk", "fit", "prompt", "max"]
"""KV blocks taken at admission: for the first chunk; for it, if the whole prompt would fit now; for the whole prompt; or for the
prompt and `max_tokens`."""

Key = Callable[[Request], tuple[Any, ...]]
"""The sort key of a request; the least is first, and of equal keys the first to arrive. Called once, when the request arrives."""


def by_arrival(request: Request) -> tuple[Any, ...]:
    return request.priority, request.arrival


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's limits: `max_seqs` running requests; `max_tokens` in one iteration; `watermark`, the share of the KV blocks that
    an admission leaves free (vLLM and the paper's artifact use 1 %)."""

    max_seqs: int = 256
    max_tokens: int = 8192
    watermark: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.max_seqs <= self.max_tokens:
            raise ValueError(
                f"max_seqs ({self.max_seqs}) must be at least 1 and at most max_tokens ({self.max_tokens}), "
                "so that every ready decode fits in one iteration"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark is a share of the KV blocks, from 0 to below 1, not {self.watermark}")


class Ledger:
    """`requests`: all that are not finished. Each is in one of five places: `running` (in the order of their keys), `queue`
    (waiting), parked by `adapters` (waiting for its adapter), `expected` (waiting for room for a KV transfer, in the order of their
    keys), or held (`num_held` requests keep KV and get no work). `preempted`: ids since the last plan. `max_len`: tokens of the
    longest request that fits. `reserve`: the KV blocks that an admission takes. `reuse`: equal prefixes share KV. `turn`: how the
    policy shares the machine among tenants, if it does.
    """

    def __init__(
        self,
        capacity: Capacity,
        limits: Limits | None = None,
        *,
        reserve: Reserve,
        reuse: bool = True,
        key: Key = by_arrival,
        turn: Turn | None = None,
    ):
        self.capacity = capacity
        self.limits = limits or Limits()
        self.reserve = reserve
        self.pool = BlockPool(capacity.num_blocks, capacity.block_size, reuse=reuse)
        self.max_len = min(capacity.max_model_len, capacity.num_blocks * capacity.block_size)
        self.watermark = int(self.limits.watermark * capacity.num_blocks)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.queue = Queue()
        self.expected: list[Request] = []
        self.adapters = Adapters(self.pool, self.queue, self.expected, turn)
        self.num_held = 0
        self.preempted: list[str] = []
        self._key = key
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + len(self.expected) + self.adapters.num_parked

    @property
    def spare(self) -> int:
        """KV blocks that an admission leaves free."""
        return self.watermark if self._occupied else 0

    def kept_free(self, request: Request) -> int:
        """KV blocks that an admission of `request` leaves free, those included that an adapter is owed. None if nobody has KV: who
        is owed may wait for an adapter of somebody who comes earlier and is not asked yet, and that one for `request`."""
        return self.spare + self.adapters.owed(request) if self._occupied else 0

    @property
    def _occupied(self) -> bool:
        """Whether any request has KV."""
        return bool(self.running or self.num_held)

    @property
    def full(self) -> bool:
        """Whether as many requests have KV as may run."""
        return len(self.running) + self.num_held >= self.limits.max_seqs

    def validate(self, request: Request) -> None:
        """Raise `Refused` for a request that could never be served. Reads nothing that changes, so any thread may call it."""
        length, max_len = len(request.prompt), self.max_len
        if request.adapter:
            if request.adapter not in self.adapters.known:
                raise Refused(f"adapter {request.adapter!r} is not loaded", "model")
            blocks, _ = self.adapters.known[request.adapter]
            max_len = min(max_len, (self.capacity.num_blocks - blocks) * self.capacity.block_size)
        if length == 0:
            raise Refused("the prompt is empty; it needs at least one token", "prompt")
        if request.max_tokens < 1:
            raise Refused(f"max_tokens is {request.max_tokens}; it must be at least 1", "max_tokens")
        if length >= max_len:
            raise Refused(
                f"the prompt has {length} tokens; with room for one more, at most {max_len - 1} fit "
                f"(context {self.capacity.max_model_len}, KV cache {self.capacity.num_blocks * self.capacity.block_size} tokens"
                + (f", of which adapter {request.adapter!r} takes some)" if max_len < self.max_len else ")"),
                "prompt",
            )
        if length + request.max_tokens > max_len:
            raise Refused(
                f"{length} prompt tokens and max_tokens {request.max_tokens} make {length + request.max_tokens}, more than "
                f"the {max_len} that fit; ask for at most {max_len - length}",
                "max_tokens",
            )

    def enter(self, request: Request) -> None:
        """Register a new request; it is in none of the four places yet. Raises `Refused` and then changes nothing."""
        self.validate(request)
        if request.id in self.requests:
            raise Refused(f"request id {request.id!r} is already in use; choose another", "id")
        self._arrivals += 1
        request.key = (*self._key(request), self._arrivals)
        request.lookup = (-1, request.root, 0)  # another pool may have written it
        request.status = Status.WAITING
        self.requests[request.id] = request

    def run(self, request: Request) -> None:
        """Move a request, which has its KV blocks, from any other place to `running`."""
        if request.ticket:
            self.queue.discard(request)
        if request.adapter:
            self.adapters.use(request)
        request.status = Status.RUNNING
        insort(self.running, request, key=lambda r: r.key)

    def preempt(self, request: Request) -> None:
        """Move a running request back to its old place in the queue, without KV."""
        request.num_preemptions += 1
        self.preempted.append(request.id)
        self.requeue(request)

    def requeue(self, request: Request) -> None:
        """As `preempt`, but the request does not count as preempted."""
        request.transferring = False
        self.running.remove(request)
        self.drop_kv(request)
        request.status = Status.WAITING
        self.wait(request)

    def wait(self, request: Request) -> None:
        """Queue a registered request, or park it if its adapter is not here."""
        if request.adapter:
            self.adapters.wait(request)
        else:
            self.queue.push(request)

    def leave(self, request: Request) -> None:
        """Remove a request from the accounts, wherever it is. It keeps its KV blocks."""
        del self.requests[request.id]
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.HELD:
            self.num_held -= 1
        elif request.ticket:
            self.queue.discard(request)
        elif not self.adapters.unpark(request):
            self.expected.remove(request)

    def end(self, request: Request, reason: str) -> None:
        """Finish a running request. It stays in `running` until `sweep`."""
        del self.requests[request.id]
        self.finish(request, reason)

    def sweep(self) -> None:
        """Take all finished requests out of `running`."""
        self.running = [r for r in self.running if r.status is Status.RUNNING]

    def finish(self, request: Request, reason: str) -> None:
        """Mark a request, which has left the accounts, as finished, and free its KV blocks."""
        request.status = Status.FINISHED
        request.finish_reason = reason
        self._release(request)

    def drop_kv(self, request: Request) -> None:
        self._release(request)
        request.num_computed = request.num_planned = 0
        request.drafts = ()

    def _release(self, request: Request) -> None:
        self.pool.release(request)
        if request.adapter:
            self.adapters.leave(request)

    def check(self) -> None:
        """Raise RuntimeError if the accounts of requests, queue and KV blocks do not agree. For tests and idle moments."""
        self.pool.check(self.requests.values(), [resident.blocks for resident in self.adapters.resident.values()])
        self.adapters.check()
        running = [r for r in self.requests.values() if r.status is Status.RUNNING]
        held = [r for r in self.requests.values() if r.status is Status.HELD]
        counts = len(self.running), self.num_waiting, self.num_held
        if set(running) != set(self.running) or sum(counts) != len(self.requests) or len(held) != self.num_held:
            raise RuntimeError(f"{len(self.requests)} requests, but {counts} running, waiting and held")
        if any(a.key >= b.key for line in (self.running, self.expected) for a, b in pairwise(line)):
            raise RuntimeError("the running or the expected requests are out of order")
        for r in (*running, *held):
            most = r.num_tokens + len(r.drafts) + (self.capacity.overlap and r.in_flight > 1)
            if not r.num_computed <= r.num_planned <= most or (r.num_computed < r.num_planned) != (r.in_flight > 0):
                raise RuntimeError(f"{r!r} with {r.in_flight} plans in flight has inconsistent counts")
