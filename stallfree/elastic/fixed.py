"""Groups of instances that stay, to compare with those that form anew."""

from collections.abc import Iterable, Sequence

from stallfree.elastic.policy import Prices, decoding, fitting, saturating, spread
from stallfree.elastic.state import Instances, Iteration, Stream


class Fixed:
    """`groups` of instances that never change: each computes waiting prompts first, whole and in the order of their arrival, and
    else decodes. KV is spread over all members in proportion to their room."""

    def __init__(self, prices: Prices, groups: Iterable[Sequence[int]]):
        self._groups = [list(group) for group in groups]
        self._saturated = {len(group): saturating(prices, len(group)) for group in self._groups}

    def ended(self, stream: Stream, seconds: float) -> None:
        pass

    def plan(self, instances: Instances, now: float) -> list[Iteration]:
        idle, waiting, plans = instances.idle, list(instances.waiting), []
        # The group with the most room is first: together they have one queue.
        for group in sorted(self._groups, key=lambda group: -sum(instances.free[member] for member in group)):
            if not idle.issuperset(group):
                continue
            room = {member: instances.free[member] for member in group}
            decodes = instances.ready(group)
            prompts = fitting(waiting, sum(room.values()) - len(decodes), self._saturated[len(group)])
            if prompts:
                waiting = waiting[len(prompts) :]
                plans.append(Iteration(frozenset(group), {stream: spread(stream.length, group, room) for stream in prompts}))
            elif decodes:
                plans.append(decoding(instances, group, decodes))
        return plans
