"""Groups that grow for a prompt and shrink after it, and never stop a decode for it: stall-free batching on rings.

It sees prices and instances, and learns nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stallfree.elastic.policy import MOST_PROMPTS, Prices, decoding, fewest_with_room, joined, spread
from stallfree.elastic.state import Instances, Iteration, Stream

ALONE = 10.0
"""An iteration without decodes may take so many times the target for decodes: only prompts that arrive wait for its end."""
LEAST = 64
"""The fewest tokens of a chunk, however late the decodes are: prompts go on."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The instances that compute a prompt, and those of them that keep its KV. `seconds`: of the whole prompt, as priced."""

    members: Sequence[int]
    homes: Sequence[int]
    seconds: float


class StallFree:
    """Groups that grow for a prompt and shrink after it, and never stop a decode for it: every iteration has all ready decodes of
    its instances, and chunks of prompts for the time that is left up to `tbt` seconds.

    A prompt gets the fewest instances, those with the least work, on which its first token would come within `due` seconds of its
    arrival, or on which it takes one iteration. If none are enough, it gets the fewest with room: it is late, but others lose
    least. Its KV stays on the fewest of them with room. Of the prompts on the same instances, the one whose wait is longest for its
    size goes first: long ones hold up no short ones, and none starves. Past a prompt that has no room, only those go that take one
    iteration.
    """

    def __init__(self, prices: Prices, number: int, tbt: float, due: Callable[[Stream], float]):
        self._prices, self._number, self._tbt, self._due = prices, number, tbt, due
        self._rings: dict[Stream, Ring] = {}

    def ended(self, stream: Stream, seconds: float) -> None:
        pass

    def plan(self, instances: Instances, now: float) -> list[Iteration]:
        waiting = set(instances.waiting)
        self._rings = {
            stream: ring
            for stream, ring in self._rings.items()
            if stream in waiting or (stream.computed < stream.length - 1 and (stream.held or instances.busy(stream)))
        }
        if any(stream not in self._rings for stream in instances.waiting):
            self._admit(instances, now)
        admitted = [stream for stream in instances.waiting if stream in self._rings]
        idle, plans = instances.idle, []
        groups = [group for group in joined(instances, [ring.members for ring in self._rings.values()]) if idle.issuperset(group)]

        def free(group: Sequence[int]) -> int:
            return sum(instances.free[member] for member in group)

        while groups:
            group = groups.pop(0)
            ready, decodes = self._ready(instances, group)
            if free(group) < len(decodes) and groups:  # they take in another group
                groups.remove(other := max(groups, key=free))
                group += other
                ready, decodes = self._ready(instances, group)
            prompts = [s for s in (*admitted, *ready) if s in self._rings and self._rings[s].members[0] in group]
            if prompts or decodes:
                plans.append(self._iteration(instances, group, prompts, decodes, now))
        begun = [plan for plan in plans if plan is not None]
        return begun if begun or not plans else self.plan(instances, now)  # preempted streams have made room

    @staticmethod
    def _ready(instances: Instances, group: Sequence[int]) -> tuple[list[Stream], list[Stream]]:
        """The streams that a group can go on with, and those of them that decode."""
        ready = instances.ready(group)
        return ready, [stream for stream in ready if stream.computed == stream.prompt + stream.output - 1]

    def _admit(self, instances: Instances, now: float) -> None:
        """Gives rings to waiting prompts, in the order of their arrival."""
        room, load = self._room(instances), [0.0] * self._number
        for stream, ring in self._rings.items():
            for member in ring.members:
                load[member] += ring.seconds * (1 - stream.computed / stream.length)
        order, full = sorted(range(self._number), key=lambda member: load[member]), False
        for stream in [stream for stream in instances.waiting if stream not in self._rings][:MOST_PROMPTS]:
            best = None
            for degree in range(1, self._number + 1):
                members = order[:degree]
                if sum(max(0, room[member]) for member in members) <= stream.length:
                    continue
                seconds = self._seconds(degree, stream.length)
                ring = Ring(members, fewest_with_room(stream.length + 1, members, room), seconds)
                in_time = now + max(load[member] for member in members) + seconds <= stream.arrival + self._due(stream)
                best = ring if best is None or in_time else best
                if seconds <= self._tbt or in_time:
                    break
            if best is None or (full and best.seconds > self._tbt):
                full = True
                continue
            self._rings[stream] = best
            spread(stream.length, best.homes, room)
            for member in best.members:
                load[member] += best.seconds
            order.sort(key=lambda member: load[member])

    def _room(self, instances: Instances) -> dict[int, int]:
        """The room of each instance, beside the rest of the prompts that were given to it, and a token of each stream there."""
        room = dict(enumerate(instances.free))
        for stream, ring in self._rings.items():
            rest = stream.length - stream.computed
            for member in ring.homes:
                room[member] -= -(-rest // len(ring.homes))
        for stream in instances.running:
            for member in stream.held:
                room[member] -= 1
        return room

    def _iteration(
        self, instances: Instances, group: Sequence[int], prompts: Sequence[Stream], decodes: Sequence[Stream], now: float
    ) -> Iteration | None:
        """The next iteration of a group. None: parts of prompts have filled its room; the last to come has given its own back."""
        kept = decoding(instances, group, decodes).decodes
        room = {member: instances.free[member] for member in group}
        for member in kept.values():
            room[member] -= 1
        shape = [(stream.computed, 1) for stream in kept]
        limit = self._tbt if kept else ALONE * self._tbt
        chunks: dict[Stream, Mapping[int, int]] = {}
        for stream in sorted(prompts, key=lambda stream: (stream.arrival - now) / self._rings[stream].seconds):
            homes = self._rings[stream].homes
            most = min(stream.length - stream.computed, sum(max(0, room[member]) for member in homes))
            if most < 1:  # decodes have filled its room
                continue
            tokens = self._tokens(len(group), shape, stream.computed, most, limit)
            if not chunks:
                tokens = max(tokens, min(LEAST, most))
            if tokens < 1:
                break
            chunks[stream] = spread(tokens, homes, room)
            shape.append((stream.computed, tokens))
            if tokens < most:
                break
        if not chunks and not kept:
            if holding := [stream for stream in prompts if stream.held]:
                last = max(holding, key=lambda stream: stream.arrival)
                instances.preempt(last)
                del self._rings[last]
            return None
        return Iteration(frozenset(group), chunks, kept)

    def _seconds(self, degree: int, tokens: int) -> float:
        """Of a prompt in chunks that take `tbt` each. A ring of many instances is slow at small chunks with much before them."""
        chunk = max(LEAST, self._tokens(degree, [], tokens // 2, tokens, self._tbt))
        return max(self._prices.seconds(degree, [(0, tokens)]), tokens / chunk * self._tbt if chunk < tokens else 0.0)

    def _tokens(self, degree: int, shape: list[tuple[int, int]], before: int, most: int, limit: float) -> int:
        """The most tokens of a chunk beside `shape` within `limit` seconds, in steps of `LEAST`, or all of `most`."""
        if self._prices.seconds(degree, [*shape, (before, most)]) <= limit:
            return most
        low, high = 0, most // LEAST
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._prices.seconds(degree, [*shape, (before, middle * LEAST)]) <= limit
            low, high = (middle, high) if fits else (low, middle)
        return low * LEAST
