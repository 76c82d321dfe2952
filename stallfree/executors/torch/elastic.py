"""Instances on several ranks whose groups form anew for every iteration. Rank number i x TP + p is rank p of instance i. Iterations
on different instances run at the same time. It knows where the KV of each token is, and no policy.
"""

from collections.abc import Mapping, Sequence

from stallfree.checkpoint import Checkpoint
from stallfree.core.plan import Plan, StepResult, Work
from stallfree.executors.torch import wire
from stallfree.executors.torch.driver import ANSWER_S, ParallelExecutor, Workers
from stallfree.executors.torch.runner import Options
from stallfree.executors.torch.slots import Kept, Slots

Part = tuple[Work, Mapping[int, int]]
"""One request's part of an iteration of instances: its work, without blocks, and how many of its new tokens each instance keeps."""


class Cluster:
    """`instances` groups of `tp` ranks, each with the whole model of `checkpoint` and with KV of its own, `kv_bytes` on each rank
    (None, only on GPUs: the rest of their memory). `rooms`: the tokens of KV that fit each instance. Raises as `ParallelExecutor`
    does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        kv_bytes: int | None,
        *,
        tp: int = 1,
        instances: int,
        workers: Workers,
        answer_s: float = ANSWER_S,
    ):
        self._ranks = _Ranks(checkpoint, options, kv_bytes, tp=tp, sp=instances, pp=1, workers=workers, answer_s=answer_s)
        self._tp, self._vocab_size = tp, checkpoint.config.vocab_size
        self.max_model_len = options.length(checkpoint.config)
        self.rooms = [self._ranks.capacity.num_blocks * self._ranks.capacity.block_size // instances] * instances
        self._slots = Slots(self.rooms)

    def submit(self, step: int, members: Sequence[int], parts: Sequence[Part]) -> None:
        """Run an iteration on `members`. Raises ValueError, and changes nothing, for parts that cannot run; `Lost` if a rank is
        gone, and all KV with it."""
        self._check(members, parts)
        members = sorted(members)
        pasts = [[_copied(self._slots.of(work.id).get(member, Kept())) for member in members] for work, _ in parts]
        keepers = [[members.index(m) for m in self._slots.keep(work.id, work.start, kept)] for work, kept in parts]
        message = wire.of_placed(Plan(step, 0.0, tuple(work for work, _ in parts)), members, pasts, keepers)
        for number, member in enumerate(members):
            slots = [past[number].slots for past in pasts]
            now = (self._slots.of(work.id).get(member, Kept()).slots for work, _ in parts)
            kept = [after[len(before) :] for before, after in zip(slots, now, strict=True)]
            self._send(member, message | wire.for_member(slots, kept))

    def collect(self) -> StepResult:
        """The result of the iteration that ends first. Raises `Lost` as `submit` does."""
        try:
            return self._ranks.collect()
        except Exception:
            self._slots = Slots(self.rooms)
            raise

    def move(self, id: str, target: int) -> None:
        """All KV of a request, which is in no iteration, goes to one instance. Raises as `submit` does."""
        sources, into = self._slots.move(id, target)
        for member in (*sources, target) if into else ():
            self._send(member, wire.of_move(sources, target, into))

    def drop(self, id: str) -> None:
        """A request, which is in no iteration, gives its slots back."""
        self._slots.drop(id)

    def close(self) -> None:
        self._ranks.close()

    def _send(self, member: int, message: dict[str, object]) -> None:
        try:
            self._ranks.send(range(member * self._tp, (member + 1) * self._tp), message)
        except Exception:
            self._slots = Slots(self.rooms)
            raise

    def _check(self, members: Sequence[int], parts: Sequence[Part]) -> None:
        if not parts:
            raise ValueError("an iteration without work cannot be run")
        needed = dict.fromkeys(range(len(self.rooms)), 0)
        for work, kept in parts:
            have = self._slots.of(work.id)
            if not {*kept, *have} <= {*members} <= {*needed}:
                raise ValueError(f"request {work.id} has or gets KV on instances that are no members: {sorted({*kept, *have})}")
            if work.start != sum(len(each.slots) for each in have.values()) or work.count != sum(kept.values()):
                raise ValueError(f"request {work.id}: {work.count} tokens from {work.start} do not follow the KV that there is")
            if work.start + work.count > self.max_model_len:
                raise ValueError(f"request {work.id} has more than the {self.max_model_len} tokens of the context")
            if len(work.tokens) != work.count or min(work.tokens) < 0 or max(work.tokens) >= self._vocab_size:
                raise ValueError(f"request {work.id}: a token id is outside the vocabulary of {self._vocab_size}")
            for member, count in kept.items():
                needed[member] += count
        for member, count in needed.items():
            if count > self._slots.free(member):
                raise ValueError(f"instance {member} has {self._slots.free(member)} free slots, not {count}")


class _Ranks(ParallelExecutor):
    """The processes, which are started, watched and started again as those of a ring are."""

    elastic = True

    def send(self, ranks: Sequence[int], message: dict[str, object]) -> None:
        """Send a message to some ranks. Raises `Lost`."""
        try:
            for rank in ranks:
                wire.send(self._socks[rank], message)
        except OSError as error:
            self._lost(f"a rank is gone ({error})")

    def collect(self) -> StepResult:
        try:
            (answer,) = self._next()
        except OSError as error:
            self._lost(str(error))
        return wire.to_result(answer, 0.0)


def _copied(kept: Kept) -> Kept:
    """As it is before the iteration."""
    return Kept(list(kept.positions), list(kept.slots))
