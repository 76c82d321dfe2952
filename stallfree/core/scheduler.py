"""The scheduler: takes requests, lets a policy write the next iteration, and applies the result of the iteration.

    plan = scheduler.schedule(now)
    result = ...                          # an executor runs the plan, or simulates it
    done, dropped = scheduler.complete(plan, result, now)

The caller drives it: time is an argument, plans complete in the order in which they were made, and up to `Capacity.depth` plans may
be in flight at once. It does not know who runs them.
"""

from collections import deque
from dataclasses import replace
from math import inf
from typing import NamedTuple

from stallfree.core.draft import Draft
from stallfree.core.ledger import Ledger, Limits, by_arrival
from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.core.policy import Fair, Learner, Ordered, Policy, Steady
from stallfree.core.request import Request, Status
from stallfree.core.speculation import Drafter


class Completed(NamedTuple):
    """The outcome of a plan: `done`, the requests that it finished; `dropped`, ids of requests that had ended while the plan was in
    flight, so that their part of it was wasted."""

    done: list[Request]
    dropped: list[str]


class Scheduler:
    """`policy` chooses; `capacity` and `limits` bound; `ledger` keeps the accounts; `step` is the number of the next plan.
    `steady`: the policy is, so leaps are possible. With `reuse`, equal prefixes share KV. `speculation` adds drafts to iterations.
    """

    def __init__(
        self,
        policy: Policy,
        capacity: Capacity,
        limits: Limits | None = None,
        *,
        reuse: bool = True,
        speculation: Drafter | None = None,
    ):
        self.policy = policy
        self.speculation = speculation
        key = policy.key if isinstance(policy, Ordered) else by_arrival
        turn = policy.turn if isinstance(policy, Fair) else None
        self.ledger = Ledger(capacity, limits, reserve=policy.reserve, reuse=reuse, key=key, turn=turn)
        self.steady = isinstance(policy, Steady) and policy.steady and speculation is None
        self.step = 0
        self.tables = True
        """Whether plans name the blocks of their decodes."""
        self.open: Draft | None = None
        """The draft that is neither sealed nor leapt over yet."""
        self._in_flight: deque[tuple[Plan, list[Request]]] = deque()
        self._completed = -inf
        self._learner = policy if isinstance(policy, Learner) else None

    @property
    def num_in_flight(self) -> int:
        """The number of plans that have not completed."""
        return len(self._in_flight)

    def submit(self, request: Request) -> None:
        """Queue a new request. Raises `Refused`, and changes nothing, if it could never be served."""
        self.ledger.enter(request)
        self.ledger.wait(request)

    def abort(self, id: str, reason: str = "abort") -> Request | None:
        """End a request now. Returns None if it has already ended. The results of its plans in flight will be ignored.

        Its blocks are free at once: plans run in order, so their next owner writes after the last read.
        """
        request = self.ledger.requests.get(id)
        if request is not None:
            self.ledger.leave(request)
            self.ledger.finish(request, reason)
        return request

    def schedule(self, now: float) -> Plan:
        """The next iteration. Do not run or complete a plan without work: there is nothing to do at `now`, or nothing can be
        planned before the iteration in flight has ended.
        """
        if self._in_flight and self.ledger.capacity.overlap and not self._foreseeable():
            return Plan(self.step, now, ())
        plan, requests = self.draft(now).seal(self.step, tables=self.tables)
        self.open = None
        if plan.work:
            for request in requests:
                request.in_flight += 1
            self.step += 1
            self.ledger.preempted.clear()
            self._in_flight.append((plan, requests))
        return plan

    def draft(self, now: float) -> Draft:
        """The next iteration, written but not sealed. Until it is sealed or leapt over, call nothing else of the scheduler."""
        if self.open is not None:
            raise ValueError(f"the iterations from step {self.step} on are only drafted; complete them first with `leap`")
        draft = Draft(self.ledger, now)
        self.policy.plan(draft)
        if self.speculation is not None:
            self.speculation.add(draft)
        self.open = draft
        return draft

    def complete(self, plan: Plan, result: StepResult, now: float) -> Completed:
        """Apply the result of the oldest plan in flight. Raises ValueError if `plan` is not that plan."""
        if not self._in_flight or self._in_flight[0][0] is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} with the result of step {result.step} is not the oldest plan in flight")
        _, requests = self._in_flight.popleft()
        if self._learner is not None and result.error is None:
            # A plan that was made ahead began when the plan before it ended.
            ahead = self.ledger.capacity.overlap and plan.now < self._completed
            self._learner.learn(replace(plan, now=self._completed) if ahead else plan, requests, now)
        self._completed = now
        done: list[Request] = []
        dropped: list[str] = []
        ledger, pool = self.ledger, self.ledger.pool
        block_size = pool.block_size
        tokens, deferred, failed = result.tokens, result.deferred, result.error is not None or result.failed
        running = Status.RUNNING
        for work, request in zip(plan.work, requests, strict=True):
            request.in_flight -= 1
            if request.status is not running:
                dropped.append(work.id)
                continue
            reason: str | None = None
            if failed and (result.error is not None or work.id in result.failed):
                reason = "error"
            else:
                computed = work.start + work.count
                samples = work.samples
                if samples and work.id in deferred:
                    samples, computed = False, work.start if work.decode else computed - 1
                    request.num_planned = computed
                if samples:
                    before = request.num_tokens
                    reason = request.append(tokens[work.id], now)
                    if self.speculation is not None:
                        self.speculation.learn(request, before, request.output[before - len(request.prompt) :])
                    if request.drafts:
                        computed = request.num_planned = work.start + request.num_tokens - before
                if request.drafts:
                    request.drafts = ()
                    if ledger.reserve != "max":
                        pool.shrink(request, request.num_tokens)
                request.num_computed = computed
                if computed >= (request.num_shared + 1) * block_size:
                    pool.commit(request)
            if reason is not None:
                ledger.end(request, reason)
                done.append(request)
        if done:
            ledger.sweep()
        return Completed(done, dropped)

    def lost(self, *, restart: bool) -> list[Request]:
        """All KV is lost, and no plan in flight will complete. With `restart`, requests that had KV return to the queue and are
        recomputed. Without it, they end with an error and are returned.
        """
        self._in_flight.clear()
        ledger = self.ledger
        for request in [r for r in ledger.requests.values() if r.status is Status.HELD]:
            ledger.num_held -= 1
            ledger.run(request)
        ended = []
        for request in list(ledger.running):
            request.in_flight = 0
            if restart:
                ledger.preempt(request)
            else:
                ledger.end(request, "error")
                ended.append(request)
        ledger.sweep()
        ledger.adapters.lost()
        ledger.pool.forget()
        return ended

    def _foreseeable(self) -> bool:
        """Whether the next iteration can be planned while one is in flight: a request goes on, and there is KV for all that do.
        Otherwise a decode could be left out that would find room, or a request to preempt, a moment later.
        """
        size, any_goes_on, wanted = self.ledger.pool.block_size, False, 0
        for r in self.ledger.running:
            if r.num_planned < r.num_tokens or r.goes_on:
                any_goes_on = True
                wanted += r.num_planned >= len(r.blocks) * size
        return any_goes_on and wanted <= self.ledger.pool.num_free
