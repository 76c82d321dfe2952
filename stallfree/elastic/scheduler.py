"""The scheduler of groups of instances. It keeps a ledger as `core.scheduler.Scheduler` does, and is driven in the same way; but a
policy of `stallfree.elastic` says which instances compute what, and plans on different instances run at once and end in any order.

The simulator runs the same policies with the same `Instances`. It does not know who runs the plans.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from stallfree.core.ledger import Ledger, Limits
from stallfree.core.plan import Capacity, GroupPlan, Plan, StepResult, Work
from stallfree.core.request import Refused, Request, Status
from stallfree.core.scheduler import Completed
from stallfree.elastic.policy import Policy
from stallfree.elastic.state import Instances, Iteration, Stream


class Cluster(Protocol):
    """What keeps the KV. `capacity` has blocks of one token; `rooms`: the tokens that fit each instance."""

    capacity: Capacity
    rooms: Sequence[int]

    def move(self, id: str, target: int) -> None:
        """All KV of a request that is in no plan goes to one instance."""

    def drop(self, id: str) -> None:
        """A request that is in no plan gives its KV back."""


class Kept(Instances):
    """Instances whose KV a `cluster` has, and whose streams are requests of `ledger`: what moves, leaves or is preempted here does
    so there, too."""

    def __init__(self, cluster: Cluster, ledger: Ledger):
        super().__init__(cluster.rooms)
        self._cluster, self._ledger = cluster, ledger

    def move(self, stream: Stream, target: int) -> None:
        super().move(stream, target)
        self._cluster.move(stream.id, target)

    def leave(self, stream: Stream) -> None:
        super().leave(stream)
        self._cluster.drop(stream.id)

    def preempt(self, stream: Stream) -> None:
        super().preempt(stream)
        self._cluster.drop(stream.id)
        self._ledger.preempt(self._ledger.requests[stream.id])


class GroupScheduler:
    """`policy` plans for the instances of `cluster`; `ledger` keeps the accounts. Of `limits`, the tokens of an iteration are not
    bounded: the policy bounds them by time, or plans whole prompts.

    A request that ends while a plan has it gives its KV back when that plan completes.
    """

    speculation = None

    def __init__(self, policy: Policy, cluster: Cluster, limits: Limits | None = None):
        self.policy = policy
        self.ledger = Ledger(cluster.capacity, limits, reserve="chunk", reuse=False)
        self.instances = Kept(cluster, self.ledger)
        self.step = 0
        self._requests: dict[Stream, Request] = {}
        self._outside: list[Stream] = []
        """Streams that wait until fewer run: the policy does not see them."""
        self._planned: deque[tuple[Iteration, list[str]]] = deque()
        """Iterations that have begun and are no plans yet, with the ids of requests that they admit."""
        self._in_flight: dict[int, Iteration] = {}

    def submit(self, request: Request) -> None:
        """Queue a new request. Raises `Refused`, and changes nothing, if it could never be served."""
        if any(stream.id == request.id for stream in self._requests):
            raise Refused(f"request id {request.id!r} is already in use; choose another", "id")
        self.ledger.enter(request)
        self.ledger.wait(request)
        stream = Stream(request.id, request.arrival, len(request.prompt))
        self._requests[stream] = request
        self._outside.append(stream)

    def abort(self, id: str, reason: str = "abort") -> Request | None:
        """End a request now. Returns None if it has already ended. The results of its plans in flight will be ignored."""
        request = self.ledger.requests.get(id)
        if request is not None:
            self.ledger.leave(request)
            self.ledger.finish(request, reason)
            stream = next(stream for stream, other in self._requests.items() if other is request)
            if not self.instances.busy(stream):
                self._forget(stream)
        return request

    def schedule(self, now: float) -> Plan:
        """The next iteration to run. Do not run or complete a plan without work: nothing can begin at `now`."""
        if not self._planned:
            self._offer()
            for iteration in self.policy.plan(self.instances, now):
                self._planned.append((iteration, self._begin(iteration)))
        if not self._planned:
            return GroupPlan(self.step, now, ())
        plan = self._plan(*self._planned.popleft(), now)
        self.step += 1
        return plan

    def complete(self, plan: Plan, result: StepResult, now: float) -> Completed:
        """Apply the result of a plan in flight. Raises ValueError if `plan` is none."""
        if plan.step not in self._in_flight or result.step != plan.step:
            raise ValueError(f"step {plan.step} with the result of step {result.step} is no plan in flight")
        iteration = self._in_flight.pop(plan.step)
        self.instances.end(iteration)
        done: list[Request] = []
        dropped: list[str] = []
        for work, stream in zip(plan.work, (*iteration.chunks, *iteration.decodes), strict=True):
            request = self._requests[stream]
            request.in_flight -= 1
            if request.status is Status.FINISHED:
                dropped.append(work.id)
                self._forget(stream)
                continue
            reason: str | None = None
            if result.error is not None or work.id in result.failed:
                reason = "error"
            else:
                request.num_computed = work.start + work.count
                if work.samples:
                    reason = request.append(result.tokens[work.id], now)
            if reason is not None:
                self.ledger.end(request, reason)
                self._forget(stream)
                done.append(request)
        if done:
            self.ledger.sweep()
        return Completed(done, dropped)

    def lost(self, *, restart: bool) -> list[Request]:
        """All KV is lost, and no plan in flight will complete. With `restart`, requests that had KV return to the queue and are
        computed again. Without it, they end with an error and are returned."""
        self._in_flight.clear()
        self._planned.clear()
        ended = []
        for stream in list(self.instances.running):
            request = self._requests[stream]
            request.in_flight = 0
            if request.status is Status.RUNNING and not restart:
                self.ledger.end(request, "error")
                ended.append(request)
            if request.status is Status.FINISHED:
                self._forget(stream)
        self.ledger.sweep()
        self.instances.lose()
        return ended

    def _offer(self) -> None:
        """Let the policy see as many waiting streams as may run, in the order of the ledger: by priority, then by arrival."""
        instances = self.instances
        waiting = sorted([*instances.waiting, *self._outside], key=lambda stream: self._requests[stream].key)
        room = max(0, self.ledger.limits.max_seqs - len(instances.running))
        instances.waiting, self._outside = waiting[:room], waiting[room:]

    def _begin(self, iteration: Iteration) -> list[str]:
        """Take room and instances. Returns the ids of requests that are admitted by it."""
        self.instances.begin(iteration)
        admitted = []
        for stream, count in _counts(iteration):
            request = self._requests[stream]
            if request.status is Status.WAITING:
                self.ledger.run(request)
                admitted.append(request.id)
            request.num_planned += count
            request.in_flight += 1
            self.ledger.pool.grow(request, request.num_planned)
        return admitted

    def _plan(self, iteration: Iteration, admitted: Sequence[str], now: float) -> GroupPlan:
        kept: list[Mapping[int, int]] = [*iteration.chunks.values(), *({member: 1} for member in iteration.decodes.values())]
        work = tuple(self._work(stream, count, stream in iteration.decodes) for stream, count in _counts(iteration))
        stalled = [
            stream.id
            for stream in self.instances.running
            if stream.computed == stream.length - 1
            and not self.instances.busy(stream)
            and iteration.members.intersection(stream.held)
        ]
        members = tuple(sorted(iteration.members))
        preempted = tuple(self.ledger.preempted)
        self.ledger.preempted.clear()
        self._in_flight[self.step] = iteration
        of = f"instance{'s' * (len(members) > 1)} {', '.join(map(str, members))} of {len(self.instances.rooms)}"
        return GroupPlan(
            self.step, now, work, preempted, tuple(stalled), tuple((id, 0) for id in admitted),
            sum(w.count for w in work), of, members=members, kept=tuple(kept),
        )  # fmt: skip

    def _work(self, stream: Stream, count: int, decode: bool) -> Work:
        request, start = self._requests[stream], stream.computed
        stop = start + count
        return Work(
            request.id, start, count, stop == stream.length, decode, request.tokens(start, stop), (), request.sampling, "",
            request.prompt, request.output,
        )  # fmt: skip

    def _forget(self, stream: Stream) -> None:
        """The request of a stream has ended, and no plan has it."""
        request = self._requests.pop(stream)
        for waiting in (self._outside, self.instances.waiting):
            if stream in waiting:
                waiting.remove(stream)
        if stream in self.instances.running:
            self.instances.leave(stream)
        if request.output:
            self.policy.ended(stream, request.last_token - request.first_token)


def _counts(iteration: Iteration) -> list[tuple[Stream, int]]:
    """The streams of an iteration with their tokens in it."""
    return [*((stream, sum(kept.values())) for stream, kept in iteration.chunks.items()), *((s, 1) for s in iteration.decodes)]
