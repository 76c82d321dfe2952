"""Pairings: who computes a prompt and who decodes. Two are published; one is between them and co-location.

A pairing sees the replicas as they are when it is asked. It does not know the future.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from stallfree.core.nearest import nearest
from stallfree.core.request import Request
from stallfree.sim.movers import MOVERS
from stallfree.sim.replica import Replica
from stallfree.sim.transfer import Pools


@dataclass(frozen=True, slots=True)
class DistServe:
    """DistServe (OSDI'24): a prompt goes to the shortest prefill queue. When it is computed, the decode replica with the fewest
    requests is chosen, which pulls the KV once it has room. `near`: for each prefill replica, the decode replicas that its KV may
    go to.
    """

    near: Sequence[Sequence[int]]
    overlap = False
    early = False

    def prefill(self, request: Request, pools: Pools) -> int | Replica:
        return _shortest(pools.prefill, request.arrival)

    def decode(self, source: int, pools: Pools) -> int:
        return min(self.near[source], key=pools.load)


@dataclass(frozen=True, slots=True)
class Splitwise:
    """Splitwise (ISCA'24): both machines are chosen at the arrival, the prompt machine with the fewest pending tokens and the token
    machine with the fewest tokens of KV. KV leaves layer by layer. The mixed pool: a token machine takes a whole request if every
    prompt machine has more than `spill` tokens pending; the prompt machine takes it if no token machine has room.
    """

    spill: ClassVar[int] = 8192

    near: Sequence[Sequence[int]]
    overlap = True
    early = True

    def prefill(self, request: Request, pools: Pools) -> int | Replica:
        source = _shortest(pools.prefill, request.arrival)
        if pools.prefill[source].pending(request.arrival) > self.spill:
            return pools.decode[_shortest(pools.decode, request.arrival)]
        return source if any(pools.fits(number, request) for number in self.near[source]) else pools.prefill[source]

    def decode(self, source: int, pools: Pools) -> int:
        return min(self.near[source], key=pools.kv)


class Hybrid(Splitwise):
    """Chunked replicas in both pools, with a large budget for prefill and a small one for decode. A decode replica takes whole
    requests once a few prompts are pending, because chunks do not stall its decodes.
    """

    __slots__ = ()
    spill = 2048


def _shortest(replicas: Sequence[Replica], now: float) -> int:
    pending = [replica.pending(now) for replica in replicas]
    return pending.index(min(pending))


PAIRINGS: dict[str, type[DistServe] | type[Splitwise]] = {"distserve": DistServe, "splitwise": Splitwise, "hybrid": Hybrid}


def load(name: str, near: Sequence[Sequence[int]]) -> DistServe | Splitwise:
    """A pairing by its name. Raises ValueError that names the nearest pairing if there is none."""
    if name not in PAIRINGS:
        known = (*PAIRINGS, *MOVERS)
        raise ValueError(f"unknown pairing {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return PAIRINGS[name](near)
