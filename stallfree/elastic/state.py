"""Who holds which tokens. An instance is a tensor-parallel group of devices with room for KV. A request's KV may be on several,
token by token: each new token goes to any instance that takes part in its iteration.

It knows neither time nor policy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Stream:
    """A request of `prompt` tokens that arrived at `arrival`, as far as it has come: `output` tokens are out. `held`: the tokens of
    its KV on each instance, `computed` in all. A stream that was preempted holds nothing, and computes the prompt and its output
    again.
    """

    id: str
    arrival: float
    prompt: int
    output: int = 0
    held: dict[int, int] = field(default_factory=dict)
    computed: int = 0

    @property
    def length(self) -> int:
        """Tokens so far. The last one that came out has no KV yet."""
        return self.prompt + self.output


@dataclass(frozen=True, slots=True, eq=False)
class Iteration:
    """What the instances `members` compute together. `chunks`: streams whose prompts are computed, with the tokens of each whose KV
    goes to each member; `decodes`: streams that get one token, with the member that keeps its KV. `moved`: tokens whose KV moves
    between instances before it begins.
    """

    members: frozenset[int]
    chunks: Mapping[Stream, Mapping[int, int]] = field(default_factory=dict)
    decodes: Mapping[Stream, int] = field(default_factory=dict)
    moved: int = 0


class Instances:
    """The instances, by their number, with the tokens of KV for which each has `free` room. `computing`: the iterations under way.
    `waiting`: streams without KV, in the order in which they are to be served; `running`: those with KV, in the order of admission.
    """

    def __init__(self, rooms: Sequence[int]):
        self.rooms = tuple(rooms)
        self.free = list(rooms)
        self.computing: list[Iteration] = []
        self.waiting: list[Stream] = []
        self.running: list[Stream] = []
        self._busy: set[Stream] = set()

    @property
    def idle(self) -> set[int]:
        """Instances that compute nothing now."""
        return set(range(len(self.rooms))) - {member for iteration in self.computing for member in iteration.members}

    def arrive(self, stream: Stream) -> None:
        """Raises ValueError if all instances together have no room for the prompt and a token."""
        if stream.prompt >= (most := sum(self.rooms)):
            raise ValueError(
                f"the prompt has {stream.prompt:,} tokens; with room for one more, at most {most - 1:,} fit all instances"
            )
        self.waiting.append(stream)

    def ready(self, within: Iterable[int]) -> list[Stream]:
        """Streams whose KV is all on instances of `within`, and which no iteration computes now."""
        members, busy = frozenset(within), self._busy
        return [stream for stream in self.running if stream not in busy and members.issuperset(stream.held)]

    def busy(self, stream: Stream) -> bool:
        """Whether an iteration computes the stream now."""
        return stream in self._busy

    def begin(self, iteration: Iteration) -> None:
        """Takes the room and the instances. Raises ValueError if the iteration is not possible; nothing has changed then."""
        taken: dict[int, int] = {}
        for stream, kept in iteration.chunks.items():
            if stream.computed + sum(kept.values()) > stream.length or not sum(kept.values()):
                raise ValueError(
                    f"{stream.id} has {stream.length} tokens; {stream.computed} are kept, and {sum(kept.values())} would be"
                )
            for member, tokens in kept.items():
                taken[member] = taken.get(member, 0) + tokens
        for member in iteration.decodes.values():
            taken[member] = taken.get(member, 0) + 1
        streams = (*iteration.chunks, *iteration.decodes)
        holders = {member for stream in streams for member in stream.held}
        if not iteration.members <= self.idle or not holders | taken.keys() <= iteration.members:
            raise ValueError(f"of the instances {sorted(holders | taken.keys() | iteration.members)}, some are busy or no members")
        if not self._busy.isdisjoint(streams) or any(stream.computed != stream.length - 1 for stream in iteration.decodes):
            raise ValueError("a stream is in another iteration, or decodes before its prompt is computed")
        for member, tokens in taken.items():
            if tokens > self.free[member]:
                raise ValueError(f"instance {member} has room for {self.free[member]} tokens, not for {tokens}")
        self.computing.append(iteration)
        self._busy.update(streams)
        for member, tokens in taken.items():
            self.free[member] -= tokens
        coming = [stream for stream in iteration.chunks if not stream.held]
        self.waiting = [stream for stream in self.waiting if stream not in coming]
        self.running += coming

    def end(self, iteration: Iteration) -> list[Stream]:
        """The iteration is over. Gives the streams that got a token: decodes, and those whose last chunk this was."""
        self.computing.remove(iteration)
        self._busy.difference_update(iteration.chunks, iteration.decodes)
        for stream, kept in iteration.chunks.items():
            for member, tokens in kept.items():
                stream.held[member] = stream.held.get(member, 0) + tokens
                stream.computed += tokens
        for stream, member in iteration.decodes.items():
            stream.held[member] = stream.held.get(member, 0) + 1
            stream.computed += 1
        got = [stream for stream in (*iteration.chunks, *iteration.decodes) if stream.computed == stream.length]
        for stream in got:
            stream.output += 1
        return got

    def leave(self, stream: Stream) -> None:
        """The stream has ended, between two iterations of it."""
        self._give_back(stream)

    def preempt(self, stream: Stream) -> None:
        """The stream gives its room back, and waits before all others."""
        self._give_back(stream)
        self.waiting.insert(0, stream)

    def lose(self) -> None:
        """All KV is lost, and no iteration will end: streams that had room wait again, the first to come first."""
        self.computing.clear()
        self._busy.clear()
        for stream in sorted(self.running, key=lambda stream: -stream.arrival):
            self.preempt(stream)
        # An iteration that had begun had taken room for tokens that never came.
        self.free = list(self.rooms)

    def move(self, stream: Stream, target: int) -> None:
        """All KV of the stream, which no iteration computes now, goes to one instance. Raises ValueError if that has no room."""
        coming = stream.computed - stream.held.get(target, 0)
        if stream in self._busy or coming > self.free[target]:
            raise ValueError(f"{stream.id} cannot move {coming} tokens to instance {target}, with room for {self.free[target]}")
        for member, tokens in stream.held.items():
            self.free[member] += tokens
        stream.held = {target: stream.computed}
        self.free[target] -= stream.computed

    def _give_back(self, stream: Stream) -> None:
        self.running.remove(stream)
        for member, tokens in stream.held.items():
            self.free[member] += tokens
        stream.held.clear()
        stream.computed = 0
