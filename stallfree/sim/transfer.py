"""Disaggregation: a prefill pool and a decode pool of replicas with the same scheduler, and the KV transfers between them.

A prefill replica computes a request up to its first token and holds it until a decode replica has reserved room. The request goes
on when its KV has arrived. Only then is its first token shown, as in the live engine. Otherwise TTFT would look good while the
second token waits for the transfer. If the decode pool is full, prefill replicas keep their KV, and in the end admit no request. It
does not know who goes where (a `Pairing` does) or how fast KV moves (the fabric does).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, nextafter
from typing import Any, Protocol

from stallfree.core.plan import Plan
from stallfree.core.request import Request
from stallfree.sim.fabric import Fabric, Port
from stallfree.sim.replica import Replica, Script

MakeReplica = Callable[..., Replica]
"""Makes a replica from its hooks and `leap`."""


@dataclass(eq=False, slots=True)
class Transfer:
    """One KV transfer of a request, from replica `source` to `target` (None: not chosen yet), by number. `twin`: the request in the
    target, once it is expected there; `room`: its blocks are reserved. `computed`, `sent`: tokens of KV; `flows` are under way.
    `since`: when the first token was sampled (s).
    """

    request: Request
    source: int
    target: int | None
    twin: Request | None = None
    room: bool = False
    computed: int = 0
    sent: int = 0
    flows: int = 0
    since: float = inf


class Pairing(Protocol):
    """Who computes a request's prompt, and who decodes. `overlap`: KV leaves layer by layer, while the prompt is computed; else
    after it. `early`: the decode replica is chosen at the request's arrival; else when it has its first token.
    """

    overlap: bool
    early: bool

    def prefill(self, request: Request, pools: "Pools") -> int | Replica:
        """The number of the replica that takes the prompt, at the request's arrival. If there shall be no KV transfer, the replica
        that takes the whole request.
        """

    def decode(self, source: int, pools: "Pools") -> int:
        """The number of the replica that decodes after prefill replica `source`."""


@dataclass(slots=True)
class Totals:
    """Totals of all KV transfers: `transferred` requests, `bytes` moved, and seconds from a first token's sampling until its KV
    arrived (`exposed_s`). `decode_s`: seconds from first to last token. `local`: requests that one replica computed entirely.
    If requests move (`sim.moving`), `transferred` and `exposed_s` count each move, from the moment at which the source stopped;
    `streams` of these moves were of decoding streams; and `local` requests were placed whole.
    """

    transferred: int = 0
    streams: int = 0
    bytes: float = 0.0
    exposed_s: float = 0.0
    decode_s: float = 0.0
    local: int = 0


class Pools:
    """`prefill` and `decode` replicas, made with hooks of this class. `path` gives the ports between two of them. A token has
    `kv_bytes` of KV in `layers` layers. Each flow begins after `latency_s`. `ended`: called with each request that ended.
    """

    def __init__(
        self,
        prefill: Sequence[MakeReplica],
        decode: Sequence[MakeReplica],
        pairing: Pairing,
        path: Callable[[int, int], tuple[Port, ...]],
        *,
        kv_bytes: float,
        layers: int,
        latency_s: float,
        ended: Callable[[Request], None],
    ):
        self.transfers = Totals()
        self.fabric = Fabric()
        self._pairing, self._path = pairing, path
        self._kv_bytes, self._layers, self._latency_s = kv_bytes, layers, latency_s
        self._transfers: dict[str, Transfer] = {}
        self._on_end = ended
        self._now = 0.0
        hooks: Any = {"ended": self._ended, "launched": self._launched, "completed": self._computed}
        self.prefill = [make(**hooks, leap=1) for make in prefill]
        self._promised: list[set[Transfer]] = [set() for _ in decode]
        self.decode = [
            make(ended=self._ended, freed=partial(self._admit, number), loaded=partial(self._admit, number))
            for number, make in enumerate(decode)
        ]
        self._block_size = self.decode[0].scheduler.ledger.capacity.block_size

    def load(self, number: int) -> int:
        """Requests that decode replica `number` has or expects, or for which it was chosen."""
        return self.decode[number].num_requests + len(self._promised[number])

    def kv(self, number: int) -> int:
        """KV blocks that decode replica `number` has in use, or needs for requests that it expects or for which it was chosen."""
        replica = self.decode[number]
        ledger = replica.scheduler.ledger
        coming = (*ledger.expected, *(transfer.request for transfer in self._promised[number]))
        return ledger.capacity.num_blocks - replica.num_free(self._now) + sum([self._blocks(request) for request in coming])

    def fits(self, number: int, request: Request) -> bool:
        """Whether decode replica `number` has room for the prompt of `request`, after all others for which it was chosen."""
        scheduler = self.decode[number].scheduler
        most = scheduler.ledger.capacity.num_blocks - scheduler.ledger.watermark
        return self.load(number) < scheduler.ledger.limits.max_seqs and self.kv(number) + self._blocks(request) <= most

    def _blocks(self, request: Request) -> int:
        return -(-len(request.prompt) // self._block_size)

    def serve(self, requests: Iterable[Request]) -> None:
        """Serve `requests` to their ends. They have a `Script` and come in the order of their arrivals. Raises ValueError if one
        waits for ever.
        """
        for request in requests:
            self._run(request.arrival)
            self._place(request)
        self._run(inf)
        if left := sum(replica.num_requests for replica in (*self.prefill, *self.decode)):
            raise ValueError(f"{left} requests wait for ever: no policy plans work for them, or no decode replica has room")

    def _run(self, until: float) -> None:
        advance((*self.prefill, *self.decode), self.fabric, until)

    def _place(self, request: Request) -> None:
        self._now = request.arrival
        source = self._pairing.prefill(request, self)
        if isinstance(source, Replica):
            replica = source
            self.transfers.local += 1
        else:
            replica = self.prefill[source]
            target = self._pairing.decode(source, self) if self._pairing.early else None
            if request.max_tokens > 1:
                self._transfers[request.id] = transfer = Transfer(request, source, target)
                if target is not None:
                    self._promised[target].add(transfer)
        replica.take(request)
        replica.run(nextafter(request.arrival, inf))

    def _launched(self, plan: Plan, begin: float, end: float) -> None:
        """An iteration of a prefill replica begins. Its KV leaves layer by layer, if the pairing says so and there is room."""
        if not self._pairing.overlap:
            return
        for work in plan.work:
            transfer = self._transfers.get(work.id)
            if transfer is None:
                continue
            self._expect(transfer, begin)
            # A preempted request computes KV again that was sent before.
            if transfer.room and (tokens := work.start + work.count - transfer.sent) > 0:
                transfer.sent += tokens
                share = 1 / self._layers
                self._send(transfer, tokens * (1 - share), begin + (end - begin) * share)
                self._send(transfer, tokens * share, end)

    def _computed(self, plan: Plan, end: float) -> None:
        """An iteration of a prefill replica has ended. Requests with their first token now wait for their KV transfer."""
        for work in plan.work:
            transfer = self._transfers.get(work.id)
            if transfer is None:
                continue
            transfer.computed = work.start + work.count
            if work.samples:
                self.prefill[transfer.source].hold(work.id)
                if transfer.room:
                    self._rest(transfer, end)
                transfer.since = end
                self._expect(transfer, end)

    def _expect(self, transfer: Transfer, now: float) -> None:
        """Queue the request in its decode replica, once. It is admitted there when there is room."""
        if transfer.twin is not None:
            return
        request = transfer.request
        if transfer.target is None:
            transfer.target = self._pairing.decode(transfer.source, self)
        self._promised[transfer.target].discard(transfer)
        transfer.twin = twin(request)
        self.decode[transfer.target].expect(transfer.twin, now)
        self._admit(transfer.target, now)

    def _admit(self, number: int, now: float) -> None:
        """Give the room in a decode replica to the requests that it expects, in order."""
        while (twin := self.decode[number].admit(now)) is not None:
            transfer = self._transfers[twin.id]
            transfer.room = True
            if transfer.since < inf:
                self._rest(transfer, now)

    def _rest(self, transfer: Transfer, now: float) -> None:
        """The prompt is computed, and there is room: send the rest of its KV."""
        tokens = transfer.computed - transfer.sent
        transfer.sent += tokens
        self._send(transfer, tokens, now)

    def _send(self, transfer: Transfer, tokens: float, begin: float) -> None:
        assert transfer.target is not None
        size = tokens * self._kv_bytes
        transfer.flows += 1
        self.transfers.bytes += size
        path = self._path(transfer.source, transfer.target)
        self.fabric.send(size, path, begin + self._latency_s, lambda now: self._arrived(transfer, now))

    def _arrived(self, transfer: Transfer, now: float) -> None:
        transfer.flows -= 1
        if transfer.flows or transfer.since == inf or transfer.sent < transfer.computed:
            return
        assert transfer.target is not None
        assert transfer.twin is not None
        id, script = transfer.request.id, transfer.twin.sampling
        assert isinstance(script, Script)
        del self._transfers[id]
        self.transfers.transferred += 1
        self.transfers.exposed_s += now - transfer.since
        script.line.tokens[0] = now
        self.prefill[transfer.source].release(id, now)
        self.decode[transfer.target].deliver(transfer.twin, script.answer[0], now)

    def _ended(self, request: Request) -> None:
        transfer = self._transfers.pop(request.id, None)
        if transfer is not None and transfer.target is not None:  # it ended where its prompt was computed
            self._promised[transfer.target].discard(transfer)
            if transfer.twin is not None:
                self.decode[transfer.target].forgo(request.id, request.last_token)
                self._admit(transfer.target, request.last_token)
        tokens = request.sampling.line.tokens  # type: ignore[attr-defined]
        self.transfers.decode_s += tokens[-1] - tokens[0]
        self._on_end(request)


def advance(replicas: Sequence[Replica], fabric: Fabric, until: float) -> None:
    """Run all replicas and flows up to `until`, event by event."""
    while True:
        first = min(replicas, key=_due)
        if fabric.due <= first.due:
            if fabric.due >= until:
                return
            fabric.run()
        elif first.due >= until:
            return
        else:
            first.run(nextafter(first.due, inf))


def twin(request: Request) -> Request:
    """The same request for another replica, without any token computed."""
    return Request(
        request.id,
        request.prompt,
        request.max_tokens,
        stop_ids=request.stop_ids,
        arrival=request.arrival,
        priority=request.priority,
        tenant=request.tenant,
        weight=request.weight,
        slo=request.slo,
        service_class=request.service_class,
        adapter=request.adapter,
        sampling=request.sampling,
    )


def _due(replica: Replica) -> float:
    return replica.due
