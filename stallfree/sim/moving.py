"""Requests that move between replicas at any token: a prompt is cut, or a stream goes on elsewhere while it decodes.

A cut: the source computes the first tokens of a prompt, and the KV of each chunk leaves layer by layer while it is computed. The
target computes the rest and decodes. If all of the prompt is computed in the source, the first token is sampled there, and is shown
when the KV has arrived, as in `sim.transfer`.

A move of a stream: its KV flows while the source goes on decoding. Once this has arrived, the source stops the stream at the end of
an iteration. The KV of the few tokens since then flows, and the target goes on. The client sees this as a longer gap.

The target reserves room before anything flows. If it has none, nothing moves: no request waits for room elsewhere. It does not know
which request moves, where to, or why (a `Mover` does), or how fast KV moves (the fabric does). The policies of the replicas must
compute prompts in chunks: one that computes only whole prompts never goes on with a part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nextafter
from typing import NamedTuple, Protocol, cast

from stallfree.core.plan import Plan
from stallfree.core.request import Request, Status
from stallfree.core.slo import Slo
from stallfree.metrics.timeline import Timeline
from stallfree.sim.fabric import Fabric, Port
from stallfree.sim.replica import Script
from stallfree.sim.transfer import MakeReplica, Totals, advance, twin


class Place(NamedTuple):
    """Where a request goes: to replica `source`. If `target` is given and has room, the source gets only the first `cut` tokens of
    the prompt, and the target the rest.
    """

    source: int
    target: int | None = None
    cut: int = 0


class Mover(Protocol):
    """Decides which requests move. It sees the replicas as they are when it is asked, and not the future."""

    def place(self, request: Request, cluster: "Moving") -> Place:
        """Where a request goes at its arrival."""

    def stepped(self, number: int, cluster: "Moving", now: float) -> None:
        """Replica `number` has ended an iteration. Its streams may now be moved."""

    def ended(self, request: Request) -> None:
        """A request has ended."""


@dataclass(eq=False, slots=True)
class Move:
    """A request that moves from replica `source` to `target`. `request`: as it is in the source. `twin`: as it is in the target.
    `cut`: the prompt tokens that the source computes; None for a stream. `sent`: tokens whose KV has left; `flows` are under way.
    `since`: when the source stopped it (s).
    """

    source: int
    target: int
    request: Request
    twin: Request
    cut: int | None
    sent: int = 0
    flows: int = 0
    since: float = inf

    @property
    def inside(self) -> bool:
        """Whether the cut is inside the prompt, so that the source samples no token."""
        return self.cut is not None and self.cut < len(self.twin.prompt)


class Moving:
    """`prefill` and `decode` replicas, made with hooks of this class, and numbered in this order. For the other arguments see
    `sim.transfer.Pools`; `path` gives the ports between any two replicas. `targets`: of requests that have none of their own.
    """

    def __init__(
        self,
        prefill: Sequence[MakeReplica],
        decode: Sequence[MakeReplica],
        mover: Mover,
        path: Callable[[int, int], tuple[Port, ...]],
        *,
        kv_bytes: float,
        layers: int,
        latency_s: float,
        ended: Callable[[Request], None],
        targets: Slo = Slo(),  # noqa: B008  # it is frozen
    ):
        self.transfers = Totals()
        self.fabric = Fabric()
        self._mover, self._path, self._targets = mover, path, targets
        self._kv_bytes, self._layers, self._latency_s = kv_bytes, layers, latency_s
        self._moves: dict[str, Move] = {}
        self._on_end = ended
        self._now = 0.0
        self.replicas = [
            make(ended=self._ended, launched=self._launched, completed=partial(self._completed, number), leap=1)
            for number, make in enumerate([*prefill, *decode])
        ]
        self.prefill, self.decode = self.replicas[: len(prefill)], self.replicas[len(prefill) :]

    def requests(self, number: int) -> Iterator[tuple[Request, int]]:
        """The requests of replica `number`, each with the tokens whose KV it has, or will have once its move has ended."""
        for request in self.replicas[number].requests:
            move = self._moves.get(request.id)
            cut = move.cut if move is not None and move.twin is request else None
            yield request, request.num_planned if cut is None else cut

    def streams(self, number: int) -> list[Request]:
        """The requests of replica `number` that decode and do not move."""
        running = self.replicas[number].scheduler.ledger.running
        return [r for r in running if r.output and r.num_tokens - r.num_planned <= 1 and r.id not in self._moves]

    def used(self, number: int) -> float:
        """The share of the KV blocks of replica `number` that are in use or reserved."""
        pool = self.replicas[number].scheduler.ledger.pool
        return 1 - pool.num_free / pool.num_blocks

    def leaving(self, number: int) -> bool:
        """Whether a stream of replica `number` is moving away."""
        return any(move.source == number and move.cut is None for move in self._moves.values())

    def move(self, request: Request, source: int, target: int, now: float) -> bool:
        """Begin to move a stream to another replica. Returns False, and changes nothing, if that one has no room now."""
        copy = twin(request)
        copy.output, copy.num_tokens = [*request.output], request.num_tokens
        copy.first_token, copy.last_token = request.first_token, request.last_token
        if not self._reserve(target, copy, now, len(request.prompt)):
            return False
        self._moves[request.id] = move = Move(source, target, request, copy, None, request.num_computed)
        self._send(move, request.num_computed, now)
        return True

    def serve(self, requests: Iterable[Request]) -> None:
        """Serve `requests` to their ends. They have a `Script` and come in the order of their arrivals. Raises ValueError if one
        waits for ever.
        """
        for request in requests:
            self._run(request.arrival)
            self._now = request.arrival
            self._place(request)
        self._run(inf)
        if left := sum(replica.num_requests for replica in self.replicas):
            raise ValueError(f"{left} requests wait for ever: no policy plans work for them")

    def _run(self, until: float) -> None:
        """Run all replicas and flows up to `until`. Two prompts may wait for room that is reserved for each other's rests. Once
        nothing else is under way, one of them is not cut after all.
        """
        advance(self.replicas, self.fabric, until)
        while self._moves and self.fabric.due == min([replica.due for replica in self.replicas]) == inf:
            self._join(next(iter(self._moves.values())))
            advance(self.replicas, self.fabric, until)

    def _place(self, request: Request) -> None:
        source, target, cut = self._mover.place(request, self)
        taken = request if target is None else self._cut(request, source, target, cut)
        self.transfers.local += taken.id not in self._moves
        self.replicas[source].take(taken)
        self.replicas[source].run(nextafter(request.arrival, inf))

    def _cut(self, request: Request, source: int, target: int, cut: int) -> Request:
        """The part of `request` that the source computes; all of it if the target has no room."""
        whole = cut == len(request.prompt)
        copy = twin(request)
        if (whole and request.max_tokens == 1) or not self._reserve(target, copy, request.arrival, cut):
            return request
        part = request if whole else _first(request, cut, self._targets)
        self._moves[request.id] = Move(source, target, part, copy, cut)
        return part

    def _reserve(self, target: int, copy: Request, now: float, cut: int) -> bool:
        """Reserve room for a request in replica `target`, or do nothing. Prompts that wait there for their turn do not count: at
        capacity some always do.
        """
        replica = self.replicas[target]
        replica.expect(copy, now, cut)
        if replica.admit(now, ahead=True) is copy:
            return True
        replica.forgo(copy.id, now)
        return False

    def _join(self, move: Move) -> None:
        """Undo a cut. The source computes the whole request, from its first token on."""
        self._call_off(move, self._now)
        self.replicas[move.source].forgo(move.request.id, self._now)
        self.transfers.local += 1
        self.replicas[move.source].enter(twin(move.twin), self._now)

    def _call_off(self, move: Move, now: float) -> None:
        """Forget a move. The request stays where it is."""
        del self._moves[move.request.id]
        self.replicas[move.target].forgo(move.twin.id, now)

    def _launched(self, plan: Plan, begin: float, end: float) -> None:
        """An iteration begins. The KV of prompts that are cut leaves layer by layer."""
        for work in plan.work:
            move = self._moves.get(work.id)
            # A preempted request computes KV again that was sent before.
            if move is not None and move.cut is not None and (tokens := work.start + work.count - move.sent) > 0:
                move.sent += tokens
                share = 1 / self._layers
                self._send(move, tokens * (1 - share), begin + (end - begin) * share)
                self._send(move, tokens * share, end)

    def _completed(self, number: int, plan: Plan, end: float) -> None:
        """An iteration has ended. What shall go on elsewhere stops here."""
        self._now = end
        for work in plan.work:
            move = self._moves.get(work.id)
            if move is None:
                continue
            if move.cut is None:
                if not move.flows:
                    self._stop(move, end)
            elif work.samples:
                if move.inside:
                    _line(move.twin).tokens.pop()  # sampled after a part of the prompt, so it is no token of the answer
                self._stop(move, end)
        self._mover.stepped(number, self, end)

    def _stop(self, move: Move, now: float) -> None:
        """Stop a request in its source, and send the rest of its KV. A stream that lost its KV meanwhile stays."""
        request = move.request
        if request.status is not Status.RUNNING or request.num_computed < move.sent:
            self._call_off(move, now)
            return
        self.replicas[move.source].hold(request.id)
        tokens = request.num_computed - move.sent
        move.sent += tokens
        move.since = now
        self._send(move, tokens, now)

    def _send(self, move: Move, tokens: float, begin: float) -> None:
        size = tokens * self._kv_bytes
        move.flows += 1
        self.transfers.bytes += size
        path = self._path(move.source, move.target)
        self.fabric.send(size, path, begin + self._latency_s, lambda now: self._arrived(move, now))

    def _arrived(self, move: Move, now: float) -> None:
        self._now = now
        move.flows -= 1
        if move.flows or self._moves.get(move.request.id) is not move:
            return
        if move.since < inf:
            self._go_on(move, now)
        elif move.cut is None and not move.request.in_flight:
            self._stop(move, now)

    def _go_on(self, move: Move, now: float) -> None:
        """All KV is in the target."""
        request, line = move.request, _line(move.twin)
        del self._moves[request.id]
        self.transfers.transferred += 1
        self.transfers.streams += move.cut is None
        self.transfers.exposed_s += now - move.since
        if move.cut == len(move.twin.prompt):
            line.tokens[0] = request.first_token = request.last_token = now
        computed = request.num_computed
        self.replicas[move.source].release(request.id, now)
        self.replicas[move.target].resume(move.twin, computed, None if move.inside else request, now)

    def _ended(self, request: Request) -> None:
        move = self._moves.get(request.id)
        if move is not None:  # it ended in its source
            self._call_off(move, request.last_token)
        tokens = _line(request).tokens
        self.transfers.decode_s += tokens[-1] - tokens[0]
        self._mover.ended(request)
        self._on_end(request)


def _first(request: Request, cut: int, targets: Slo) -> Request:
    """The first tokens of a prompt as a request of their own. They are due after their share of the time for the first token. It
    samples a token and does not end with it.
    """
    slo = targets if request.slo is None else request.slo.within(targets)
    if slo.ttft is not None:
        slo = replace(slo, ttft=replace(slo.ttft, seconds=slo.ttft.seconds * cut / len(request.prompt)))
    part = Request(
        request.id,
        request.prompt[:cut],
        2,
        arrival=request.arrival,
        priority=request.priority,
        tenant=request.tenant,
        weight=request.weight,
        slo=slo,
        service_class=request.service_class,
    )
    part.sampling = Script((request.prompt[0],) * 2, _line(request), cut + 2)
    return part


def _line(request: Request) -> Timeline:
    return cast(Script, request.sampling).line
