"""Adapters (LoRA) in the accounts: whose weights are in KV blocks, which requests wait for that, and which adapters make room.

An adapter takes blocks of the same pool as the requests' KV (unified paging; S-LoRA, arXiv 2311.03285). Only requests whose adapter
is ready are in the queue. The others are parked beside it, and hold nobody up. It does not know how weights get into blocks.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import chain
from typing import Any

from stallfree.core.kv import BlockPool
from stallfree.core.queue import Queue
from stallfree.core.request import Request

IDLE_SHARE = 0.5
"""While more than this share of the blocks belongs to adapters, those that nobody wants leave as others come. The rest is for KV
and cached prefixes."""

LOOKAHEAD = 8
"""How many of the adapters that are wanted are looked at for one that finds room."""

MOST_LOADING = 2
"""Adapters that are loaded at once: one is read while another is written."""


Turn = Callable[[Request], tuple[Any, ...]]
"""What comes before a request's key when loads are ordered. The least is first. It may change while the request waits."""


@dataclass(slots=True, eq=False)
class Resident:
    """An adapter with `blocks` of the pool. `ready`: its weights are there. `users` have KV; `waiting` are in the queue."""

    key: str
    rank: int
    blocks: list[int]
    ready: bool = False
    users: set[Request] = field(default_factory=set)
    waiting: set[Request] = field(default_factory=set)


class Adapters:
    """The adapters of one engine. `known`: (blocks, rank) of each, by its key. `resident`: those with blocks, the least recently
    used first. `evicted`: keys of those that lost their blocks; whoever runs the model takes them out of this list. `num_failed`:
    loads that failed.

    Loads are in the order of the requests' keys. If the policy shares the machine among tenants, `turn` says how (`policy.Fair`),
    and keys decide between requests of a tenant.
    """

    def __init__(self, pool: BlockPool, queue: Queue, expected: list[Request], turn: Turn | None = None):
        self._pool, self._queue, self._expected, self._turn = pool, queue, expected, turn
        self.known: dict[str, tuple[int, int]] = {}
        self.resident: dict[str, Resident] = {}
        self.evicted: list[str] = []
        # By adapter and tenant; of a tenant in the order of keys.
        self._parked: dict[str, dict[str, list[Request]]] = {}
        self._tenants: Counter[str] = Counter()
        self.num_failed = 0
        pool.lender = self

    @property
    def num_blocks(self) -> int:
        """Blocks that adapters have. For any thread."""
        return sum([len(resident.blocks) for resident in list(self.resident.values())])

    @property
    def num_parked(self) -> int:
        """Requests that wait for their adapter. For any thread."""
        return sum(list(self._tenants.values()))

    @property
    def tenants(self) -> Set[str]:
        """Those with a parked request."""
        return self._tenants.keys()

    @property
    def num_idle(self) -> int:
        """Blocks of adapters that no request with KV uses, so that they can be taken back. For any thread."""
        return sum([len(r.blocks) for r in list(self.resident.values()) if r.ready and not r.users]) if self.resident else 0

    def counts(self) -> dict[str, int]:
        """How many adapters are resident (their weights are in blocks), loading, and away. For any thread."""
        here = list(self.resident.values())
        ready = sum(resident.ready for resident in here)
        return {"resident": ready, "loading": len(here) - ready, "away": len(self.known) - len(here)}

    def active(self) -> list[str]:
        """The keys of the adapters that have blocks or are waited for. For any thread."""
        return list(dict.fromkeys([*list(self.resident), *list(self._parked)]))

    def state(self, key: str) -> str:
        """ "resident", "loading" or "away", as in `counts`. For any thread."""
        own = self.resident.get(key)
        return "away" if own is None else "resident" if own.ready else "loading"

    def rank(self, key: str) -> int:
        return self.known[key][1] if key else 0

    def ready(self, request: Request) -> bool:
        """Whether the request could run now, for all that its adapter is concerned."""
        return not request.adapter or ((own := self.resident.get(request.adapter)) is not None and own.ready)

    def wait(self, request: Request) -> None:
        """Queue a request, or park it until its adapter is ready."""
        if self.ready(request):
            self.resident[request.adapter].waiting.add(request)
            self._queue.push(request)
        else:
            lines = self._parked.setdefault(request.adapter, {})
            insort(lines.setdefault(request.tenant, []), request, key=lambda r: r.key)
            self._tenants[request.tenant] += 1

    def unpark(self, request: Request) -> bool:
        """Forget a request that may be parked. Returns whether it was."""
        lines = self._parked.get(request.adapter, {})
        line = lines.get(request.tenant, [])
        if request not in line:
            return False
        line.remove(request)
        self._count_out(request)
        if not line:
            del lines[request.tenant]
        if not lines:
            del self._parked[request.adapter]
        return True

    def use(self, request: Request) -> None:
        """The request has KV from now on: its adapter stays."""
        own = self.resident.pop(request.adapter)
        own.waiting.discard(request)
        own.users.add(request)
        self.resident[request.adapter] = own

    def leave(self, request: Request) -> None:
        """The request needs its adapter no more, or not now."""
        if own := self.resident.get(request.adapter):
            own.users.discard(request)
            own.waiting.discard(request)

    def wanted(self, key: str) -> bool:
        """Whether any request waits for the adapter or uses it."""
        own = self.resident.get(key)
        return key in self._parked or any(r.adapter == key for r in self._expected) or bool(own and (own.users or own.waiting))

    def requests(self, key: str) -> int:
        """How many requests wait for the adapter or use it. For any thread."""
        own = self.resident.get(key)
        parked = sum(map(len, list(self._parked.get(key, {}).values())))
        return parked + (len(own.users) + len(own.waiting) if own is not None else 0)

    def loads_until(self, request: Request) -> int:
        """The loads until the adapter of a request that arrives now is ready, one after another, if all find room: its own, and
        those before it. 0 if it is ready. For any thread."""
        if self.ready(request):
            return 0
        loading = [resident.key for resident in list(self.resident.values()) if not resident.ready]
        if request.adapter in loading:
            return loading.index(request.adapter) + 1
        heads = {key: rank for key in list(self._parked) if key not in loading and (rank := self._rank_of(key)) is not None}
        own = min(self._rank(request), heads.pop(request.adapter, self._rank(request)))
        return len(loading) + sum(rank <= own for rank in heads.values()) + 1

    def owed(self, request: Request) -> int:
        """Blocks that an admission of `request` leaves free, for an adapter that a request before it is parked for. Without this,
        those whose adapters are here could take every block for ever."""
        if not self._parked:
            return 0
        first = min((self._head(key) for key in self._parked if key not in self.resident), key=self._place, default=None)
        return self.known[first.adapter][0] if first is not None and self._place(first) < self._place(request) else 0

    def next(self, spare: int) -> Resident | None:
        """Take blocks for the next adapter to load, and leave `spare` blocks free. An adapter that finds no room keeps its place in
        the order, and a smaller one may go before it. None if there is nothing to load.
        """
        if not (self._parked or self._expected):
            return None
        if sum([not resident.ready for resident in self.resident.values()]) >= MOST_LOADING:
            return None
        heads = [self._head(key) for key in self._parked] + [r for r in self._expected if not self.ready(r)]
        for head in nsmallest(LOOKAHEAD, heads, key=self._place):
            if head.adapter in self.resident:
                continue
            size, rank = self.known[head.adapter]
            blocks = self._pool.take(size, spare) if self._make_room(size + spare, head) else None
            if blocks is not None:
                resident = self.resident[head.adapter] = Resident(head.adapter, rank, blocks)
                return resident
            spare += size
        return None

    def loaded(self, key: str) -> None:
        """The weights are in their blocks. The requests that were parked for them go into the queue."""
        own = self.resident[key]
        own.ready = True
        for request in chain(*self._parked.pop(key, {}).values()):
            self._count_out(request)
            self.wait(request)

    def failed(self, key: str) -> list[Request]:
        """The weights cannot be loaded. Returns the requests that wait for them; whoever asked ends them."""
        self.num_failed += 1
        self._pool.give(self.resident.pop(key).blocks)
        return [*chain(*self._parked.get(key, {}).values()), *(r for r in self._expected if r.adapter == key)]

    def evict(self, key: str) -> None:
        """Take the blocks of an adapter that no request with KV uses. Requests for it that are in the queue are parked again."""
        own = self.resident.pop(key)
        if own.users or not own.ready:
            raise ValueError(f"adapter {key!r} is in use or being loaded; it cannot be evicted")
        self._pool.give(own.blocks)
        self.evicted.append(key)
        for request in own.waiting:
            self._queue.discard(request)
            self.wait(request)

    def reclaim(self, number: int, request: Request) -> None:
        """Evict adapters until `number` more blocks are free, but not the one of `request`, for whose KV they are; none if all
        would not do, because they would be loaded again, and again in vain. Those that nobody waits for leave first, of these the
        least recently used; then those whose requests come last.
        """
        idle = [resident for resident in self._evictable() if resident.key != request.adapter]
        if sum(len(resident.blocks) for resident in idle) < number:
            return
        for resident in idle:
            if number <= 0:
                return
            number -= len(resident.blocks)
            self.evict(resident.key)

    def lost(self) -> None:
        """All KV is lost, and the weights with it."""
        for key in list(self.resident):
            own = self.resident[key]
            own.ready = True
            own.users.clear()
            self.evict(key)
        self.evicted.clear()

    def check(self) -> None:
        """Raise RuntimeError if the accounts do not agree."""
        parked = Counter(r.tenant for lines in self._parked.values() for line in lines.values() for r in line)
        if parked != self._tenants:
            raise RuntimeError(f"{self._tenants} requests are parked by tenant, and {parked} are in lines")
        for resident in self.resident.values():
            if not resident.ready and (resident.users or resident.waiting):
                raise RuntimeError(f"adapter {resident.key!r} is in use and not loaded")
            if any(not r.ticket for r in resident.waiting) or any(r.ticket for r in resident.users):
                raise RuntimeError(f"adapter {resident.key!r}: its users or waiting requests are elsewhere")

    def _make_room(self, number: int, head: Request) -> bool:
        """Whether `number` blocks are free for the adapter of `head`, after evictions: of adapters that nobody wants, and of those
        whose first request comes after `head`."""
        idle = [r for r in self._evictable() if not self._waiters(r) or self._first(r) > self._place(head)]
        over = self.num_blocks + number - int(IDLE_SHARE * self._pool.num_blocks)
        short = number - self._pool.num_free + self.num_idle
        if short > sum(len(resident.blocks) for resident in idle):
            return False
        for resident in idle:
            if short <= 0 and (over <= 0 or self._waiters(resident)):
                break
            short -= len(resident.blocks)
            over -= len(resident.blocks)
            self.evict(resident.key)
        return True

    def _evictable(self) -> list[Resident]:
        """In the order of eviction."""
        free = [resident for resident in self.resident.values() if resident.ready and not resident.users]
        unwanted: list[Resident] = []
        waited: list[Resident] = []
        for resident in free:
            (waited if self._waiters(resident) else unwanted).append(resident)
        return unwanted + sorted(waited, key=self._first, reverse=True)

    def _waiters(self, resident: Resident) -> list[Request]:
        """The requests that wait with this adapter here: for their turn, or for room for a KV transfer."""
        return [*resident.waiting, *(r for r in self._expected if r.adapter == resident.key)]

    def _place(self, request: Request) -> tuple[Any, ...]:
        """The least is first."""
        return request.key if self._turn is None else (*self._turn(request), request.key)

    def _rank(self, request: Request) -> tuple[Any, ...]:
        """The place of a request, but for its arrival."""
        return (request.priority,) if self._turn is None else self._turn(request)

    def _first(self, resident: Resident) -> tuple[Any, ...]:
        """The place of the first request that waits with an adapter here."""
        return min(map(self._place, self._waiters(resident)))

    def _head(self, key: str) -> Request:
        """The first request that is parked for an adapter."""
        return min((line[0] for line in self._parked[key].values()), key=self._place)

    def _rank_of(self, key: str) -> tuple[Any, ...] | None:
        """The rank of the first request that is parked for an adapter; None if there is none any more. For any thread."""
        lines = list(self._parked.get(key, {}).values())
        return min([self._rank(r) for line in lines for r in line[:1]], default=None)

    def _count_out(self, request: Request) -> None:
        self._tenants[request.tenant] -= 1
        if not self._tenants[request.tenant]:
            del self._tenants[request.tenant]
