"""Groups that grow and shrink with every iteration, with whole prompts (LoongServe, arXiv 2404.09526, section 5).

It sees prices and instances, and learns how long outputs are.
"""

from collections.abc import Mapping, Sequence
from math import ceil, inf
from typing import NamedTuple

from stallfree.elastic.policy import Prices, decoding, fewest_with_room, fitting, joined, saturating, spread
from stallfree.elastic.state import Instances, Iteration, Stream

WORTH = 0.9
"""Another instance joins decodes if their iteration takes at most this share of its time then."""


class Batch(NamedTuple):
    """Prompts that a group computes together."""

    prompts: Sequence[Stream]
    members: Sequence[int]


class Allocation(NamedTuple):
    """Prompts and the instances for them; and the instance that each decode moves to, to make room."""

    prompts: Sequence[Stream]
    members: Sequence[int]
    moves: Mapping[Stream, int]


class LoongServe:
    """LoongServe's four steps, in every plan.

    1. Dispatching: waiting prompts in the order of their arrival, as many as saturate all instances.
    2. Allocation: instances without decodes; and others if their decodes lose less than the prompts gain. They wait, or their KV
       moves to other instances, whichever costs them less.
    3. Batching: prompts of similar lengths together, on as many instances as make the sum of times per prompt token least.
    4. Scaling: a prompt's KV stays on the fewest instances with room, so a group shrinks without moving any. Decodes that run out
       of room, or that would be faster, take in another instance.

    Times are weighed as there: a second of a prompt per token of it, a second of a decode per token of its output. How long outputs
    are, and how long decodes take, is learned from `ended`.
    """

    def __init__(self, prices: Prices, number: int):
        self._prices = prices
        self._saturated = saturating(prices, number)
        self._ended, self._output, self._decoded_s = 0, 0, 0.0

    def ended(self, stream: Stream, seconds: float) -> None:
        self._ended += 1
        self._output += stream.output
        self._decoded_s += seconds

    def plan(self, instances: Instances, now: float) -> list[Iteration]:
        prompts, members, moves = self._allocated(instances, now)
        moved = sum(stream.computed for stream in moves)
        for stream, target in moves.items():
            instances.move(stream, target)
        plans = []
        for batch in self._batches(prompts, members, instances):
            room = self._room(instances)
            kept: dict[Stream, Mapping[int, int]] = {}
            for stream in batch.prompts:
                fewest = fewest_with_room(stream.length, batch.members, room)
                kept[stream] = spread(stream.length, fewest, room)
            plans.append(Iteration(frozenset(batch.members), kept, moved=moved))
        taken = {member for plan in plans for member in plan.members}
        return plans + self._decodes(instances, taken)

    @property
    def _usual(self) -> float:
        """The usual number of tokens of an output."""
        return self._output / self._ended if self._ended else 1.0

    def _room(self, instances: Instances) -> dict[int, int]:
        """The room of each instance for prompts, beside the tokens that its streams will usually still get."""
        room = dict(enumerate(instances.free))
        for stream in instances.running:
            for member in stream.held:
                room[member] -= ceil(max(1.0, self._usual - stream.output) / len(stream.held))
        return room

    def _allocated(self, instances: Instances, now: float) -> Allocation:
        """Steps 1 and 2."""
        nothing = Allocation([], [], {})
        if not instances.waiting:
            return nothing
        room, idle = self._room(instances), instances.idle
        groups = [group for group in joined(instances) if idle.issuperset(group)]
        on = {group: instances.ready(group) for group in groups}
        members = [member for group in groups if not on[group] for member in group]
        others = sorted((group for group in groups if on[group]), key=lambda group: len(on[group]))
        prefilling = {member for iteration in instances.computing if iteration.chunks for member in iteration.members}
        moves: dict[Stream, int] = {}

        def prompts() -> list[Stream]:
            return fitting(instances.waiting, sum(max(0, room[member]) for member in members), self._saturated)

        def leaving(group: tuple[int, ...], seconds: float) -> tuple[float, dict[Stream, int]]:
            """What the decodes of a group lose if it computes prompts for seconds; and where they go if that costs less."""
            weight = sum(1 / max(stream.output, self._usual) for stream in on[group])
            targets = set(room) - {*members, *group} - prefilling
            moving = self._prices.moving(sum(stream.computed for stream in on[group]))
            if len(group) > 1 or moving >= seconds or not targets:
                return weight * seconds, {}
            left, away = dict(room), {}
            for stream in on[group]:
                away[stream] = target = max(targets, key=lambda number: left[number])
                left[target] -= stream.computed
            return (weight * seconds, {}) if min(left[target] for target in targets) < 0 else (weight * moving, away)

        def join(group: tuple[int, ...], away: Mapping[Stream, int]) -> None:
            for stream, target in away.items():
                room[target] -= stream.computed
                room[group[0]] += stream.computed
                for other in groups:
                    if target in other:
                        on[other].append(stream)
            moves.update(away)
            members.extend(group)
            others.remove(group)

        if not (batch := prompts()):
            # The first has no room on empty instances. It waits for decodes to end, if they would lose more by it.
            price = 0.0
            for group in sorted(others, key=lambda group: -sum(room[member] for member in group)):
                loss, away = leaving(group, self._seconds(instances.waiting[:1], len(members) + len(group)))
                price += loss
                join(group, away)
                if batch := prompts():
                    break
            wait = self._decoded_s / self._ended if self._ended else inf
            if not batch or sum(max(wait, now - stream.arrival) / stream.length for stream in batch) < price:
                return nothing
        seconds = self._seconds(batch, len(members))
        for group in list(others):
            faster = self._seconds(batch, len(members) + len(group))
            loss, away = leaving(group, faster)
            if sum((seconds - faster) / stream.length for stream in batch) <= loss:
                break
            join(group, away)
            seconds = faster
        return Allocation(batch, members, moves)

    def _batches(self, prompts: Sequence[Stream], members: Sequence[int], instances: Instances) -> list[Batch]:
        """Step 3: the prompts, longest first, cut into batches, and the instances, those with the most room first, into groups."""
        room = self._room(instances)
        prompts = sorted(prompts, key=lambda stream: -stream.length)
        members = sorted(members, key=lambda member: -room[member])
        best: dict[tuple[int, int], tuple[float, list[Batch]]] = {(0, 0): (0.0, [])}
        for to in range(1, len(members) + 1):
            for end in range(len(prompts) + 1):
                choice = best.get((to - 1, end), (inf, []))  # this instance has no prompt
                for since in range(to):
                    group = members[since:to]
                    most = sum(room[member] for member in group)
                    for begin in range(end - 1, -1, -1):
                        before = best.get((since, begin))
                        batch = prompts[begin:end]
                        if sum(stream.length for stream in batch) + len(group) * len(batch) > most:
                            break
                        if before is None or before[0] >= choice[0]:
                            continue
                        seconds = self._seconds(batch, len(group))
                        weight = before[0] + sum(seconds / stream.length for stream in batch)
                        if weight < choice[0]:
                            choice = weight, [*before[1], Batch(batch, group)]
                if choice[0] < inf:
                    best[to, end] = choice
        return best.get((len(members), len(prompts)), (inf, []))[1]

    def _decodes(self, instances: Instances, taken: set[int]) -> list[Iteration]:
        """Step 4: an iteration for each group of instances that share streams, unless some of it still decode."""
        idle = instances.idle - taken
        decoding_now = {member for iteration in instances.computing if iteration.decodes for member in iteration.members}
        groups = [
            [member for member in group if member in idle] for group in joined(instances) if not decoding_now.intersection(group)
        ]
        with_streams = [group for group in groups if instances.ready(group)]
        empty = sorted(
            (member for group in groups if not instances.ready(group) for member in group), key=lambda m: -instances.free[m]
        )
        plans = []
        for group in with_streams:
            streams = instances.ready(group)
            short = sum(instances.free[member] for member in group) < len(streams)
            if empty and (short or self._faster(streams, len(group))):
                group = [*group, empty.pop(0)]
            plans.append(decoding(instances, group, streams))
        return plans

    def _faster(self, streams: Sequence[Stream], degree: int) -> bool:
        shape = [(stream.length - 1, 1) for stream in streams]
        return self._prices.seconds(degree + 1, shape) <= WORTH * self._prices.seconds(degree, shape)

    def _seconds(self, prompts: Sequence[Stream], degree: int) -> float:
        return self._prices.seconds(degree, [(0, stream.length) for stream in prompts])
