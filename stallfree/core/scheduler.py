"""The scheduler: takes requests, asks a policy what the next iteration is, and applies what the iteration brought.

    plan = scheduler.schedule(now)
    result = ...                          # somebody runs the plan, or pretends to
    done = scheduler.complete(plan, result, now)

It is driven from outside: time comes in as an argument, plans complete in the order in which they were made, and up to
`Capacity.depth` of them may be out at once. It does not know who runs them.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from stallfree.core.draft import Draft
from stallfree.core.kv import BlockPool
from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.core.policy import Policy
from stallfree.core.request import Refused, Request, Status
from stallfree.core.stretch import Stretch

Entry = tuple[tuple[int, float, int], int, Request]


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's own: `max_seqs` running requests, `max_tokens` in one iteration, `watermark` the share of KV blocks that an
    admission leaves free (vLLM and the paper's artifact use 1 %)."""

    max_seqs: int = 256
    max_tokens: int = 8192
    watermark: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.max_seqs <= self.max_tokens:
            raise ValueError(
                f"max_seqs ({self.max_seqs}) must be at least 1 and at most max_tokens ({self.max_tokens}), "
                "so that every ready decode fits in one iteration"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark is a share of the KV blocks, from 0 to below 1, not {self.watermark}")


class Queue:
    """Waiting requests by priority, then arrival, in a heap. An entry whose ticket is no longer its request's is dead."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._tickets = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, request: Request) -> None:
        self._tickets += 1
        request.ticket = self._tickets
        self._live += 1
        heapq.heappush(self._heap, (request.key, request.ticket, request))

    def discard(self, request: Request) -> None:
        """Forget a waiting request; the entries of those forgotten never outnumber the others."""
        request.ticket = 0
        self._live -= 1
        if len(self._heap) > 2 * self._live + 16:
            self._heap = [entry for entry in self._heap if self.live(entry)]
            heapq.heapify(self._heap)

    @staticmethod
    def live(entry: Entry) -> bool:
        return entry[2].ticket == entry[1]

    def head(self) -> Entry | None:
        while self._heap:
            if self.live(self._heap[0]):
                return self._heap[0]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Entry:
        """Take the head's entry out for a while; its request still counts as waiting, and `restore` puts the entry back."""
        return heapq.heappop(self._heap)

    def restore(self, entry: Entry) -> None:
        if self.live(entry):
            heapq.heappush(self._heap, entry)


class Scheduler:
    """`policy` chooses, `capacity` and `limits` bound. `requests` are all that are not finished; `running` those admitted, in order
    of priority, then arrival; `queue` those waiting; `expected` those waiting whose prompt is computed elsewhere, in the order of
    `running`; `num_held` have KV and get no work. `steady`: see `Policy`. `reuse` shares the KV of equal prefixes. `dropped`: ids
    whose part of the plan completed last was for nothing, since they had ended while it was in flight.
    """

    def __init__(self, policy: Policy, capacity: Capacity, limits: Limits | None = None, *, reuse: bool = True):
        self.policy = policy
        self.capacity = capacity
        self.limits = limits or Limits()
        self.pool = BlockPool(capacity.num_blocks, capacity.block_size, reuse=reuse)
        self.max_len = min(capacity.max_model_len, capacity.num_blocks * capacity.block_size)
        self.watermark = int(self.limits.watermark * capacity.num_blocks)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.queue = Queue()
        self.num_held = 0
        self.expected: list[Request] = []
        self.step = 0
        self.dropped: list[str] = []
        self._arrivals = 0
        self._completed = -inf
        self._preempted: list[str] = []
        self.steady: bool = getattr(policy, "steady", False)
        self._stretch: Stretch | None = None
        self._learn: Callable[[Plan, Sequence[Request], float], None] | None = getattr(policy, "learn", None)
        self._in_flight: deque[tuple[Plan, list[Request]]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self.queue) + len(self.expected)

    def validate(self, request: Request) -> None:
        """Raise `Refused` for a request that could never be served. Reads nothing that changes, so any thread may ask."""
        length = len(request.prompt)
        if length == 0:
            raise Refused("the prompt is empty; it needs at least one token", "prompt")
        if request.max_tokens < 1:
            raise Refused(f"max_tokens is {request.max_tokens}; it must be at least 1", "max_tokens")
        if length >= self.max_len:
            raise Refused(
                f"the prompt has {length} tokens; with room for one more, at most {self.max_len - 1} fit "
                f"(context {self.capacity.max_model_len}, KV cache {self.capacity.num_blocks * self.capacity.block_size} tokens)",
                "prompt",
            )
        if length + request.max_tokens > self.max_len:
            raise Refused(
                f"{length} prompt tokens and max_tokens {request.max_tokens} make {length + request.max_tokens}, more than "
                f"the {self.max_len} that fit; ask for at most {self.max_len - length}",
                "max_tokens",
            )

    def submit(self, request: Request) -> None:
        """Queue a new request. Raises `Refused` for one that could never be served; nothing is changed then."""
        self._enter(request)
        self.queue.push(request)

    def adopt(self, request: Request) -> bool:
        """Take in a request with output, released elsewhere, whose KV for all but its last token is about to be copied into
        `request.blocks`: it is a ready decode at the next `schedule`, by which the copy has to be there.

        False, and nothing changed, if there is no room now.
        """
        if request.blocks or not request.output:
            raise ValueError(f"adopt takes a request that has output and holds no blocks, not {request!r}")
        if self.full:
            return False
        self._enter(request)
        if not self.pool.grow(request, request.num_tokens, self.spare):
            del self.requests[request.id]
            return False
        request.num_computed = request.num_planned = request.num_tokens - 1
        self.admitted(request)
        return True

    def hold(self, id: str) -> None:
        """A running request gets no more work, and keeps its KV, until it is released or aborted. KeyError if unknown."""
        request = self.requests[id]
        if request.status is not Status.RUNNING or request.in_flight:
            raise ValueError(f"only a running request that is not in flight can be held, not {request!r}")
        self.running.remove(request)
        request.status = Status.HELD
        self.num_held += 1

    def expect(self, request: Request) -> None:
        """Queue a new request whose prompt is computed elsewhere, once `reserve` has given it room. Raises `Refused`."""
        self._enter(request)
        insort(self.expected, request, key=lambda r: r.key)

    def reserve(self) -> Request | None:
        """Admit the first of the expected: its blocks are to be filled with the KV of its prompt, but for the `num_cached` tokens
        found here. To policies this looks like a prompt that is all in flight, until `deliver` or `recall`.

        None, and nothing changed, if nobody is expected, if there is no room now, or if somebody before it waits in the queue.
        """
        if not self.expected or self.full:
            return None
        request, head = self.expected[0], self.queue.head()
        if head is not None and head[0] < request.key:
            return None
        cached = self.pool.match(request)
        upto = request.num_tokens + (request.max_tokens if self.policy.reserve == "max" else 0)
        if not self.pool.grow(request, upto, self.spare):
            self.pool.release(request)
            return None
        del self.expected[0]
        request.num_cached = request.num_computed = cached
        request.num_planned = request.num_tokens
        request.in_flight, request.reserved = 1, True
        self.admitted(request)
        return request

    def deliver(self, request: Request, token: int, now: float) -> Request | None:
        """The KV of a reserved request is there, and the first token: it is a ready decode from now on, or has ended by this token
        and is returned."""
        request.in_flight, request.reserved = 0, False
        request.num_computed = request.num_planned
        self.pool.commit(request)
        reason = self._append(request, (token,), now)
        if reason is None:
            return None
        self._end(request, reason)
        self._run_on()
        return request

    def recall(self, request: Request) -> None:
        """Nobody elsewhere computes the prompt of a reserved request: it is computed here, from its old place in the queue on."""
        request.in_flight = 0
        self._requeue(request)

    def release(self, id: str) -> Request:
        """Let a request go that is to be continued elsewhere: it keeps its tokens and leaves its KV. KeyError if unknown."""
        request = self.requests[id]
        if request.in_flight:
            raise ValueError(f"{request!r} is in flight; it can be released once its plan is complete")
        self._leave(request)
        self._drop_kv(request)
        request.status = Status.WAITING
        return request

    def abort(self, id: str, reason: str = "abort") -> Request | None:
        """End a request now; None if it has already ended. What is in flight for it is ignored when it comes back.

        Its blocks are free at once: plans run in order, so whoever gets them writes after the last reader.
        """
        request = self.requests.get(id)
        if request is not None:
            self._leave(request)
            self._finish(request, reason)
        return request

    def schedule(self, now: float) -> Plan:
        """The next iteration. A plan without work is not to be run or completed: there is nothing to do at `now`, or nothing that
        can be planned before the iteration in flight has ended.
        """
        if self._in_flight and self.capacity.overlap and not self._foreseeable():
            return Plan(self.step, now, ())
        plan, requests = self._draft(now).seal(self.step, tuple(self._preempted))
        if plan.work:
            for request in requests:
                request.in_flight += 1
            self.step += 1
            self._preempted.clear()
            self._in_flight.append((plan, requests))
        return plan

    def complete(self, plan: Plan, result: StepResult, now: float) -> list[Request]:
        """Apply the oldest outstanding plan's result; returns the requests that it finished."""
        if not self._in_flight or self._in_flight[0][0] is not plan or result.step != plan.step:
            raise ValueError(f"step {plan.step} with the result of step {result.step} is not the oldest plan in flight")
        _, requests = self._in_flight.popleft()
        if self._learn is not None and result.error is None:
            # One that was made ahead began when the one before it ended.
            ahead = self.capacity.overlap and plan.now < self._completed
            self._learn(replace(plan, now=self._completed) if ahead else plan, requests, now)
        self._completed = now
        done: list[Request] = []
        self.dropped = []
        block_size = self.pool.block_size
        tokens, failed = result.tokens, result.error is not None or result.failed
        running = Status.RUNNING
        for work, request in zip(plan.work, requests, strict=True):
            request.in_flight -= 1
            if request.status is not running:
                self.dropped.append(work.id)
                continue
            reason: str | None = None
            if failed and (result.error is not None or work.id in result.failed):
                reason = "error"
            else:
                request.num_computed = computed = work.start + work.count
                if computed >= (request.num_shared + 1) * block_size:
                    self.pool.commit(request)
                if work.samples:
                    reason = self._append(request, tokens[work.id], now)
            if reason is not None:
                done.append(self._end(request, reason))
        if done:
            self._run_on()
        return done

    def lost(self, *, restart: bool) -> list[Request]:
        """All KV is gone, and what is in flight will not come back. Requests that had any return to the queue, to be computed anew;
        or, without `restart`, end with an error: these are returned.
        """
        self._in_flight.clear()
        for request in [r for r in self.requests.values() if r.status is Status.HELD]:
            self.num_held -= 1
            self.admitted(request)
        ended = []
        for request in list(self.running):
            request.in_flight = 0
            if restart:
                self.preempted(request)
            else:
                ended.append(self._end(request, "error"))
        self._run_on()
        self.pool.forget()
        return ended

    def stretch(self, now: float, most: int) -> Stretch:
        """The next iteration, and how many after it would be planned alike, all together at the most `most`; for `leap` to
        complete, before which nothing else may be asked. Raises ValueError unless the policy is steady and nothing is in flight.
        """
        if not self.steady or self._in_flight:
            raise ValueError("a stretch needs a policy that is `steady`, and no plan in flight")
        draft = self._draft(now)
        draft.close()
        stretch = Stretch(self, draft, tuple(self._preempted), most)
        if draft.work:
            self._preempted.clear()
            self._stretch = stretch
        return stretch

    def leap(self, stretch: Stretch, steps: int, tokens: Sequence[Sequence[int]], now: float) -> list[Request]:
        """Complete the first `steps` iterations of `stretch`, in which each request of `stretch.sampling` gets one of its `tokens`
        after the other. Only the last of them may end it. Returns the requests that ended, at `now`.
        """
        if stretch is not self._stretch or not 1 <= steps <= stretch.most:
            raise ValueError(f"{steps} steps are not the beginning of the stretch that is planned")
        self._stretch = None
        self.step += steps
        ending: list[tuple[Request, str]] = []
        for request, sampled in zip(stretch.sampling, tokens, strict=True):
            output = request.output
            if not output:
                request.first_token = now
            request.last_token = now
            output += sampled
            request.num_tokens += steps
            if sampled[-1] in request.stop_ids and len(output) > request.min_tokens:
                ending.append((request, "stop"))
            elif len(output) >= request.max_tokens:
                ending.append((request, "length"))
        stretch.advance(self.pool, steps)
        done = [self._end(request, reason) for request, reason in ending]
        if done:
            self._run_on()
        return done

    @property
    def spare(self) -> int:
        """KV blocks that an admission leaves free."""
        return self.watermark if self.running or self.num_held else 0

    @property
    def full(self) -> bool:
        """Whether as many requests have KV as may run."""
        return len(self.running) + self.num_held >= self.limits.max_seqs

    def check(self) -> None:
        """Raise RuntimeError if the accounts of requests, queue and KV blocks do not agree. For tests and idle moments."""
        self.pool.check(self.requests.values())
        running = [r for r in self.requests.values() if r.status is Status.RUNNING]
        held = [r for r in self.requests.values() if r.status is Status.HELD]
        counts = len(self.running), self.num_waiting, self.num_held
        if set(running) != set(self.running) or sum(counts) != len(self.requests) or len(held) != self.num_held:
            raise RuntimeError(f"{len(self.requests)} requests, but {counts} running, waiting and held")
        if any(a.key >= b.key for line in (self.running, self.expected) for a, b in pairwise(line)):
            raise RuntimeError("the running or the expected requests are out of order")
        for r in (*running, *held):
            most = r.num_tokens + (self.capacity.overlap and r.in_flight > 1)
            if not r.num_computed <= r.num_planned <= most or (r.num_computed < r.num_planned) != (r.in_flight > 0):
                raise RuntimeError(f"{r!r} with {r.in_flight} plans in flight has inconsistent counts")

    def admitted(self, request: Request) -> None:
        """From waiting to running, at its place in the order. For `Draft.admit`."""
        if request.ticket:
            self.queue.discard(request)
        request.status = Status.RUNNING
        insort(self.running, request, key=lambda r: r.key)

    def preempted(self, request: Request) -> None:
        """From running back to waiting, at its old place, without KV. For `Draft.preempt`."""
        request.num_preemptions += 1
        self._preempted.append(request.id)
        self._requeue(request)

    def _foreseeable(self) -> bool:
        """Whether the next iteration can be planned while one is in flight: somebody goes on, and there is KV for all who do. Else
        a decode would be left out that finds room, or somebody to preempt, a moment later.
        """
        size, some, wanted = self.pool.block_size, False, 0
        for r in self.running:
            if r.num_planned < r.num_tokens or r.goes_on:
                some = True
                wanted += r.num_planned >= len(r.blocks) * size
        return some and wanted <= self.pool.num_free

    def _draft(self, now: float) -> Draft:
        if self._stretch is not None:
            raise ValueError(f"the stretch from step {self._stretch.step} on is to be completed first, by `leap`")
        draft = Draft(self, now)
        self.policy.plan(draft)
        return draft

    def _enter(self, request: Request) -> None:
        self.validate(request)
        if request.id in self.requests:
            raise Refused(f"request id {request.id!r} is already in use; choose another", "id")
        self._arrivals += 1
        request.key = (request.priority, request.arrival, self._arrivals)
        request.looked = (-1, request.adapter, 0)  # whatever another pool had of it
        self.requests[request.id] = request

    def _append(self, request: Request, tokens: Sequence[int], now: float) -> str | None:
        """Add the sampled tokens; the finish reason if one of them ends the request."""
        output = request.output
        if not output:
            request.first_token = now
        request.last_token = now
        for token in tokens:
            output.append(token)
            request.num_tokens += 1
            if token in request.stop_ids and len(output) > request.min_tokens:
                return "stop"
            if len(output) >= request.max_tokens:
                return "length"
        return None

    def _leave(self, request: Request) -> None:
        del self.requests[request.id]
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.HELD:
            self.num_held -= 1
        elif request.ticket:
            self.queue.discard(request)
        else:
            self.expected.remove(request)

    def _end(self, request: Request, reason: str) -> Request:
        """A running request is over; `_run_on` takes those out of the list."""
        self._finish(request, reason)
        del self.requests[request.id]
        return request

    def _run_on(self) -> None:
        self.running = [r for r in self.running if r.status is Status.RUNNING]

    def _finish(self, request: Request, reason: str) -> None:
        request.status = Status.FINISHED
        request.finish_reason = reason
        self.pool.release(request)

    def _requeue(self, request: Request) -> None:
        request.reserved = False
        self.running.remove(request)
        self._drop_kv(request)
        request.status = Status.WAITING
        self.queue.push(request)

    def _drop_kv(self, request: Request) -> None:
        self.pool.release(request)
        request.num_computed = request.num_planned = 0
