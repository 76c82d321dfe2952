"""Groups that grow for a prompt and shrink after it, and never stop a decode for it: stall-free batching on rings.

It sees prices and instances, and learns nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from stallfree.elastic.policy import Prices, decoding, fewest_with_room, joined, spread
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
    arrival; if none are enough, those on which it comes first. Its KV stays on the fewest of them with room. Of the prompts on the
    same instances, the one whose wait is longest for its size goes first: long ones hold up no short ones, and none starves.
    """

    def __init__(self, prices: Prices, number: int, tbt: float, due: Callable[[Stream], float]):
        self._prices, self._number, self._tbt, self._due = prices, number, tbt, due
        self._rings: dict[Stream, Ring] = {}

    def ended(self, stream: Stream, seconds: float) -> None:
        pass

    def plan(self, instances: Instances, now: float) -> list[Iteration]:
        under_way = {*instances.waiting, *(stream for stream in instances.running if stream.computed < stream.length - 1)}
        self._rings = {stream: ring for stream, ring in self._rings.items() if stream in under_way}
        admitted = self._admitted(instances, now)
        idle, plans = instances.idle, []
        groups = [group for group in joined(instances, [ring.members for ring in self._rings.values()]) if idle.issuperset(group)]

        def free(group: Sequence[int]) -> int:
            return sum(instances.free[member] for member in group)

        while groups:
            group = groups.pop(0)
            decodes = [stream for stream in instances.ready(group) if stream.computed == stream.length - 1]
            if free(group) < len(decodes) and groups:  # they take in another group
                groups.remove(other := max(groups, key=free))
                group += other
            ready = instances.ready(group)
            prompts = [s for s in (*admitted, *ready) if s in self._rings and self._rings[s].members[0] in group]
            decodes = [stream for stream in ready if stream.computed == stream.length - 1]
            if prompts or decodes:
                plans.append(self._iteration(instances, group, prompts, decodes, now))
        begun = [plan for plan in plans if plan is not None]
        return begun if begun or not plans else self.plan(instances, now)  # preempted streams have made room

    def _admitted(self, instances: Instances, now: float) -> list[Stream]:
        """Gives rings to waiting prompts, in the order of their arrival, as long as there is room. All that wait to begin."""
        room, load = self._room(instances), [0.0] * self._number
        for stream, ring in self._rings.items():
            for member in ring.members:
                load[member] += ring.seconds * (1 - stream.computed / stream.length)
        order = sorted(range(self._number), key=lambda member: load[member])
        for stream in instances.waiting:
            if stream in self._rings:
                continue
            best, soonest = None, inf
            for degree in range(1, self._number + 1):
                members = order[:degree]
                if sum(max(0, room[member]) for member in members) <= stream.length:
                    continue
                seconds = self._prices.seconds(degree, [(0, stream.length)])
                end = now + max(load[member] for member in members) + seconds
                if end < soonest:
                    best, soonest = Ring(members, fewest_with_room(stream.length + 1, members, room), seconds), end
                if soonest <= stream.arrival + self._due(stream):
                    break
            if best is None:
                break
            self._rings[stream] = best
            spread(stream.length, best.homes, room)
            for member in best.members:
                load[member] += best.seconds
            order.sort(key=lambda member: load[member])
        return [stream for stream in instances.waiting if stream in self._rings]

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
