"""What plans groups of instances, and what all such policies need: prices, prompts that fit, KV spread over members, decodes.

It keeps no clock.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from stallfree.core.plan import Shape
from stallfree.elastic.state import Instances, Iteration, Stream

SATURATED = 1.05
"""A batch of prompts saturates a group if its seconds per token are at most so many times the least possible."""
MOST_PROMPTS = 32
"""The most waiting prompts that a plan looks at. The search for the best batches grows with the square."""


class Prices(Protocol):
    """What groups of instances cost, in seconds."""

    def seconds(self, degree: int, shape: Shape) -> float:
        """An iteration with this shape on `degree` instances."""

    def moving(self, tokens: int) -> float:
        """The KV of so many tokens, from one instance to another."""


class Policy(Protocol):
    """What runs on idle instances next, and who gives room up."""

    def plan(self, instances: Instances, now: float) -> list[Iteration]:
        """Iterations to begin at once, on different instances. Streams that lack room are preempted here."""

    def ended(self, stream: Stream, seconds: float) -> None:
        """A stream has had its whole output, in so many seconds from its first token to its last."""


def joined(instances: Instances, rings: Iterable[Collection[int]] = ()) -> list[tuple[int, ...]]:
    """The instances in groups: those that have KV of one stream, or are in one of `rings`, are together, directly or not."""
    groups = [{number} for number in range(len(instances.rooms))]
    held = {tuple(stream.held) for stream in instances.running if len(stream.held) > 1}
    for ring in (*held, *rings):
        if len(ring) > 1:
            together = set().union(*(group for group in groups if group.intersection(ring)))
            groups = [group for group in groups if not group & together] + [together]
    return [tuple(sorted(group)) for group in groups]


def saturating(prices: Prices, degree: int, each: int = 512) -> int:
    """The fewest tokens of a batch of prompts of `each` tokens that saturate a group."""
    sizes = [each << power for power in range(8)]
    per_token = {size: prices.seconds(degree, [(0, each)] * (size // each)) / size for size in sizes}
    least = min(per_token.values())
    return next(size for size in sizes if per_token[size] <= SATURATED * least)


def fitting(waiting: Sequence[Stream], room: int, most: int) -> list[Stream]:
    """The first of `waiting` that have `room`, with `most` tokens or less; one alone may have more."""
    taken: list[Stream] = []
    tokens = 0
    for stream in waiting[:MOST_PROMPTS]:
        tokens += stream.length
        if tokens + len(taken) >= room or (taken and tokens > most):
            break
        taken.append(stream)
    return taken


def fewest_with_room(tokens: int, members: Sequence[int], room: Mapping[int, int]) -> list[int]:
    """The fewest members with room for so many tokens, those with the most room first; all if they have less together."""
    chosen: list[int] = []
    for member in sorted(members, key=lambda member: -room[member]):
        chosen.append(member)
        if sum(room[member] for member in chosen) >= tokens:
            break
    return chosen


def spread(tokens: int, members: Sequence[int], room: dict[int, int]) -> dict[int, int]:
    """So many tokens over the members, in proportion to their `room`, which is less afterwards. Raises ValueError if it is too
    small."""
    if (whole := sum(max(0, room[member]) for member in members)) < tokens:
        raise ValueError(f"{tokens} tokens do not fit the instances {sorted(members)}, which have room for {whole}")
    parts: dict[int, int] = {}
    left = tokens
    for member in sorted(members, key=lambda member: room[member]):
        mine = max(0, room[member])
        parts[member] = min(mine, left, -(-mine * tokens // whole))
        left -= parts[member]
    for member in parts:
        more = min(left, max(0, room[member]) - parts[member])
        parts[member] += more
        left -= more
        room[member] -= parts[member]
    return {member: part for member, part in parts.items() if part}


def decoding(instances: Instances, group: Sequence[int], streams: Sequence[Stream]) -> Iteration:
    """The next token of each stream; its KV goes to the member with the most room. Without room, the last to come are preempted."""
    room = {member: instances.free[member] for member in group}
    left = list(streams)
    while left and sum(room.values()) < len(left):
        last = max(left, key=lambda stream: stream.arrival)
        left.remove(last)
        for member, tokens in last.held.items():
            room[member] += tokens
        instances.preempt(last)
    decodes = {}
    for stream in left:
        member = max(group, key=lambda member: room[member])
        decodes[stream] = member
        room[member] -= 1
    return Iteration(frozenset(group), decodes=decodes)
