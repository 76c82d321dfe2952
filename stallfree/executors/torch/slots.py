"""Which tokens of which requests are in which slots of the instances. A slot has the KV of one token, so any token may be on any
instance. It knows no tensors and no policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Kept:
    """Tokens of a request on one instance: their positions, and the slot of each."""

    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class Slots:
    """Instance number i has `rooms[i]` slots."""

    def __init__(self, rooms: Sequence[int]):
        self._free = [list(range(room)) for room in rooms]
        self._kept: dict[str, dict[int, Kept]] = {}

    def of(self, id: str) -> Mapping[int, Kept]:
        """What each instance has of a request."""
        return self._kept.get(id, {})

    def free(self, instance: int) -> int:
        """The free slots of an instance."""
        return len(self._free[instance])

    def keep(self, id: str, start: int, counts: Mapping[int, int]) -> list[int]:
        """Takes slots for the tokens from position `start`, so many on each instance. Returns the instance of each token. Raises
        ValueError if `start` is not the next position, or if there is no room; nothing has changed then."""
        have = sum(len(kept.slots) for kept in self.of(id).values())
        if start != have:
            raise ValueError(f"request {id} has KV of {have} tokens, so position {start} is not its next one")
        for instance, count in counts.items():
            if count > self.free(instance):
                raise ValueError(f"instance {instance} has {self.free(instance)} free slots, not {count}")
        owners = mixed(counts)
        for position, instance in enumerate(owners, start):
            kept = self._kept.setdefault(id, {}).setdefault(instance, Kept())
            kept.positions.append(position)
            kept.slots.append(self._free[instance].pop())
        return owners

    def move(self, id: str, target: int) -> tuple[dict[int, list[int]], list[int]]:
        """Moves all tokens of a request to one instance. Returns the slots that each other instance had, and the new ones for all
        of these together, in the same order. Raises ValueError if there is no room; nothing has changed then."""
        sources = {instance: kept for instance, kept in self.of(id).items() if instance != target}
        if (coming := sum(len(kept.slots) for kept in sources.values())) > self.free(target):
            raise ValueError(f"instance {target} has {self.free(target)} free slots, not {coming} for request {id}")
        into = [self._free[target].pop() for _ in range(coming)]
        home = self._kept.setdefault(id, {}).setdefault(target, Kept())
        home.slots += into
        for instance, kept in sources.items():
            home.positions += kept.positions
            self._free[instance] += kept.slots
            del self._kept[id][instance]
        return {instance: kept.slots for instance, kept in sources.items()}, into

    def drop(self, id: str) -> None:
        """Gives the slots of a request back."""
        for instance, kept in self._kept.pop(id, {}).items():
            self._free[instance] += kept.slots


def mixed(counts: Mapping[int, int]) -> list[int]:
    """The owners of consecutive tokens, so many for each, as evenly mixed as the counts allow. Equal counts give stripes."""
    places = [((2 * number + 1) / (2 * count), owner) for owner, count in counts.items() for number in range(count)]
    return [owner for _, owner in sorted(places)]
