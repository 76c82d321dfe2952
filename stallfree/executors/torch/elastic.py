"""Instances on several ranks whose groups form anew for every iteration. Rank number i x TP + p is rank p of instance i. Iterations
on different instances run at the same time. It knows where the KV of each token is, and no policy.
"""

import select
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from stallfree.checkpoint import Checkpoint
from stallfree.core.plan import Capacity, GroupPlan, Plan, StepResult, Work
from stallfree.executors.sampling import begin_constraints
from stallfree.executors.torch import wire
from stallfree.executors.torch.adapters import BLOCK
from stallfree.executors.torch.driver import ANSWER_S, ParallelExecutor, Workers
from stallfree.executors.torch.runner import Options
from stallfree.executors.torch.slots import Kept, Slots


class Piece(NamedTuple):
    """One request's part of an iteration. `past`: what each member has of it; `keepers`: for each new token, the member that keeps
    it, by its place among the members; `into`: the slots of those tokens on each member."""

    work: Work
    past: Sequence[Kept]
    keepers: Sequence[int]
    into: Sequence[Sequence[int]]


class Cluster:
    """`instances` groups of `tp` ranks, each with the whole model of `checkpoint` and with KV of its own, `kv_bytes` on each rank
    (None, only on GPUs: the rest of their memory). An executor that runs groups (`base.RunsGroups`). Raises as `ParallelExecutor`
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
        self.tp, self._vocab_size = tp, checkpoint.config.vocab_size
        self._longest = options.length(checkpoint.config)
        self.rooms = [self._ranks.capacity.num_blocks * self._ranks.capacity.block_size // instances] * instances
        # LoongServe leaves a token of room on each instance when it places a whole prompt.
        longest = min(self._longest, sum(self.rooms) - instances)
        self.capacity = Capacity(1, sum(self.rooms), longest, depth=instances)
        self._slots = Slots(self.rooms)
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)

    def submit(self, plan: Plan) -> None:
        """Run an iteration. Raises ValueError, and changes nothing, for one that cannot run; `Lost` if a rank is gone, and all KV
        with it."""
        if not isinstance(plan, GroupPlan):
            raise ValueError(f"step {plan.step} does not say which instances run it")
        self._check(plan)
        begin_constraints(plan.work)
        members, pieces = sorted(plan.members), []
        for work, kept in zip(plan.work, plan.kept, strict=True):
            past = [_copied(self._slots.of(work.id).get(member, Kept())) for member in members]
            keepers = [members.index(member) for member in self._slots.keep(work.id, work.start, kept)]
            now = [self._slots.of(work.id).get(member, Kept()).slots for member in members]
            into = [after[len(before.slots) :] for before, after in zip(past, now, strict=True)]
            pieces.append(Piece(work, past, keepers, into))
        self.run(plan.step, members, pieces)

    def run(self, step: int, members: Sequence[int], pieces: Sequence[Piece]) -> None:
        """Run pieces whose KV is in the slots that they name. Raises `Lost` as `submit` does."""
        plan, pasts = Plan(step, 0.0, tuple(piece.work for piece in pieces)), [piece.past for piece in pieces]
        message = wire.of_placed(plan, members, pasts, [piece.keepers for piece in pieces])
        self._ranks.begun[step] = time.monotonic()
        for number, member in enumerate(members):
            slots, into = [past[number].slots for past in pasts], [piece.into[number] for piece in pieces]
            self._send(member, message | wire.for_member(slots, into))

    def wait(self) -> bool:
        try:
            return self._ranks.wait(self._bell)
        except Exception:
            self._slots = Slots(self.rooms)
            raise

    def wake(self) -> None:
        with suppress(OSError):  # many have called already, or the cluster is closed
            self._rope.send(b".")

    def collect(self) -> StepResult:
        """The result of the iteration that ends first. Raises `Lost` as `submit` does."""
        while not self.wait():
            pass
        return self._ranks.collect()

    def move(self, id: str, target: int) -> None:
        """All KV of a request, which is in no iteration, goes to one instance. Raises as `submit` does."""
        sources, into = self._slots.move(id, target)
        for member in (*sources, target) if into else ():
            self._send(member, wire.of_move(sources, target, into))

    def drop(self, id: str) -> None:
        """A request, which is in no iteration, gives its slots back."""
        self._slots.drop(id)

    def ring(self, degree: int) -> "Ring":
        return Ring(self, degree)

    def close(self) -> None:
        self._ranks.close()
        self._bell.close()
        self._rope.close()

    def _send(self, member: int, message: dict[str, object]) -> None:
        try:
            self._ranks.send(range(member * self.tp, (member + 1) * self.tp), message)
        except Exception:
            self._slots = Slots(self.rooms)
            raise

    def _check(self, plan: GroupPlan) -> None:
        if not plan.work:
            raise ValueError("an iteration without work cannot be run")
        needed = dict.fromkeys(range(len(self.rooms)), 0)
        for work, kept in zip(plan.work, plan.kept, strict=True):
            have = self._slots.of(work.id)
            if not {*kept, *have} <= {*plan.members} <= {*needed}:
                raise ValueError(f"request {work.id} has or gets KV on instances that are no members: {sorted({*kept, *have})}")
            if work.start != sum(len(each.slots) for each in have.values()) or work.count != sum(kept.values()):
                raise ValueError(f"request {work.id}: {work.count} tokens from {work.start} do not follow the KV that there is")
            if work.start + work.count > self._longest:
                raise ValueError(f"request {work.id} has more than the {self._longest} tokens of the context")
            if len(work.tokens) != work.count or min(work.tokens) < 0 or max(work.tokens) >= self._vocab_size:
                raise ValueError(f"request {work.id}: a token id is outside the vocabulary of {self._vocab_size}")
            for member, count in kept.items():
                needed[member] += count
        for member, count in needed.items():
            if count > self._slots.free(member):
                raise ValueError(f"instance {member} has {self._slots.free(member)} free slots, not {count}")


class Ring:
    """The first `degree` instances of `cluster`, which runs nothing else, as an executor of plans with blocks: the tokens of a
    block are spread over the instances in turn. Requests may share blocks, so it times shapes for which there is no room."""

    def __init__(self, cluster: Cluster, degree: int):
        self._cluster, self._degree = cluster, degree
        self.capacity = Capacity(degree * BLOCK, min(cluster.rooms) // BLOCK, cluster.capacity.max_model_len)

    def submit(self, plan: Plan) -> None:
        members = range(self._degree)
        pieces = []
        for work in plan.work:
            new = range(work.start, work.start + work.count)
            past = [self._kept(work, range(member, work.start, self._degree)) for member in members]
            into = [self._kept(work, [p for p in new if p % self._degree == member]).slots for member in members]
            pieces.append(Piece(work, past, [position % self._degree for position in new], into))
        self._cluster.run(plan.step, members, pieces)

    def collect(self) -> StepResult:
        return self._cluster.collect()

    def close(self) -> None:
        """The cluster goes on."""

    def _kept(self, work: Work, positions: Sequence[int]) -> Kept:
        size, each = self.capacity.block_size, self._degree
        return Kept(list(positions), [work.blocks[position // size] * BLOCK + position % size // each for position in positions])


class _Ranks(ParallelExecutor):
    """The processes, which are started, watched and started again as those of a ring are."""

    elastic = True

    def _start(self) -> int:
        self.begun: dict[int, float] = {}
        """When each iteration under way was sent (s)."""
        return super()._start()

    def send(self, ranks: Sequence[int], message: Mapping[str, object]) -> None:
        """Send a message to some ranks. Raises `Lost`."""
        try:
            for rank in ranks:
                wire.send(self._socks[rank], dict(message))
        except OSError as error:
            self._lost(f"a rank is gone ({error})")

    def wait(self, bell: socket.socket) -> bool:
        """Wait for a result, or for something to read at `bell`. Returns whether a result is there. Raises `Lost`."""
        try:
            while not all(self._messages):
                end = min(self.begun.values()) + self._answer_s
                ready, _, _ = select.select([*self._socks, bell], [], [], max(0.0, end - time.monotonic()))
                if not ready:
                    raise ConnectionError(f"an iteration has not ended within {self._answer_s:g} s")
                self._sort([sock for sock in ready if sock is not bell])
                if bell in ready:
                    bell.recv(4096)
                    return all(self._messages)
        except OSError as error:
            self._lost(str(error))
        return True

    def collect(self) -> StepResult:
        """A result that is there."""
        (answer,) = self._next()
        result = wire.to_result(answer, 0.0)
        del self.begun[result.step]
        return result


def _copied(kept: Kept) -> Kept:
    """As it is before the iteration."""
    return Kept(list(kept.positions), list(kept.slots))
