"""In any order of calls the accounts agree, the promise holds, and every request gets its own tokens."""

import random
from collections import deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from stallfree.core import transfer
from stallfree.core.leap import Stretch
from stallfree.core.ledger import Limits
from stallfree.core.plan import UNKNOWN, Capacity, StepResult
from stallfree.core.request import Refused, Request, Status
from stallfree.core.scheduler import Scheduler
from stallfree.policies import load, names
from tests.virtual import answer


class Reckless:
    """A policy that calls any verb with any request (waiting, running, planned or ended) and any number of tokens."""

    reserve = "prompt"
    stall_free = False

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.seen = []

    def plan(self, draft):
        rng = self.rng
        self.seen = [*self.seen[-20:], *draft.running, *draft.waiting]
        for _ in range(rng.randrange(2 * len(self.seen) + 2)):
            r = rng.choice(self.seen) if self.seen else None
            match rng.randrange(6) if r is not None else 5:
                case 0 | 1:
                    draft.decode(r)
                case 2:
                    draft.prefill(r, rng.choice([None, -1, 0, 1, 5, 1000]))
                case 3:
                    draft.admit(r, rng.choice([None, -1, 0, 1, 5, 1000]), whole=rng.random() < 0.3)
                case 4 if rng.random() < 0.2 and r.status is Status.RUNNING and not r.in_flight:
                    draft.preempt(r)
                case 5 if rng.random() < 0.2:
                    draft.cap(rng.randrange(-3, 60), "a whim")
        if draft.empty:  # so that somebody is served in the end
            for r in draft.decoding:
                draft.decode(r)
            for r in draft.prefilling:
                draft.prefill(r)
            for r in draft.waiting:
                draft.admit(r, whole=True)


class Guessing:
    """A drafter that guesses anything for anybody, right or wrong."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def add(self, draft):
        for r in draft.guessable:
            right = self.rng.randrange(8)
            draft.guess(r, [r.num_tokens + i if i < right else -1 for i in range(self.rng.randrange(8))])

    def learn(self, request, before, tokens):
        assert list(tokens) == list(range(before, before + len(tokens)))


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.one_of(st.sampled_from(names()), st.integers(0, 1000)),
        depth=st.sampled_from([1, 2, 3, "overlap"]),
        num_blocks=st.integers(6, 60),
        block_size=st.sampled_from([1, 4, 16]),
        max_seqs=st.integers(1, 8),
        max_tokens=st.integers(8, 40),
        watermark=st.sampled_from([0, 0.01, 0.2]),
        adapters=st.lists(st.integers(1, 5), max_size=4),
        guesses=st.booleans(),
    )
    def start(self, policy, depth, num_blocks, block_size, max_seqs, max_tokens, watermark, adapters, guesses):
        stages, overlap = (2, True) if depth == "overlap" else (depth, False)
        capacity = Capacity(block_size, num_blocks, 200, stages, overlap)
        self.scheduler = Scheduler(
            load(policy) if isinstance(policy, str) else Reckless(policy),
            capacity,
            Limits(max_seqs, max_tokens, watermark),
            speculation=Guessing(num_blocks) if guesses else None,
        )
        self.ledger = self.scheduler.ledger
        self.adapters = self.ledger.adapters
        self.adapters.known |= {str(number): (blocks, blocks) for number, blocks in enumerate(adapters)}
        self.loading = []
        self.out = deque()
        self.everybody: list[Request] = []
        self.reserved: list[Request] = []
        self.now = 0.0

    @rule(
        length=st.integers(0, 60),
        max_tokens=st.integers(1, 30),
        priority=st.integers(0, 2),
        family=st.integers(0, 2),
        stop=st.booleans(),
        elsewhere=st.booleans(),
        cut=st.sampled_from([0.3, 0.9, 1, 1, 1.3]),
        adapter=st.integers(0, 6),
        tenant=st.sampled_from(["", "", "other"]),
    )
    def submit(self, length, max_tokens, priority, family, stop, elsewhere, cut, adapter, tenant):
        # Prompts of one family begin alike, so that prefixes are shared.
        self.now += 1
        prompt = [1000 * family + i for i in range(length // 2)] + [len(self.everybody)] * (length - length // 2)
        stop_ids = frozenset({length + 3}) if stop else frozenset()
        key = str(adapter) if str(adapter) in self.adapters.known else ""
        request = Request(
            str(len(self.everybody)),
            prompt,
            max_tokens,
            stop_ids=stop_ids,
            priority=priority,
            arrival=self.now,
            adapter=key,
            tenant=tenant,
        )
        try:
            if elsewhere:
                most = length + max_tokens - 1
                least = 1 if getattr(self.scheduler.policy, "chunks", False) else length
                transfer.expect(self.ledger, request, max(least, min(most, int(cut * length))))
            else:
                self.scheduler.submit(request)
        except Refused:
            assert request.id not in self.ledger.requests
        else:
            self.everybody.append(request)
        self.ledger.check()

    @rule()
    def load(self):
        while (resident := self.adapters.next(self.ledger.spare)) is not None:
            assert len(resident.blocks) == self.adapters.known[resident.key][0]
            self.loading.append(resident)
        self.ledger.check()

    @precondition(lambda self: self.loading)
    @rule(fails=st.booleans())
    def end_load(self, fails):
        resident = self.loading.pop(0)
        if fails:
            for request in self.adapters.failed(resident.key):
                self.scheduler.abort(request.id, "error")
        else:
            self.adapters.loaded(resident.key)
        self.ledger.check()

    @rule()
    def reserve(self):
        request = transfer.admit(self.ledger)
        if request is not None:
            assert len(request.blocks) * self.ledger.capacity.block_size >= max(len(request.prompt), request.cut)
            self.reserved.append(request)
        self.ledger.check()

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), fails=st.booleans())
    def arrive(self, data, fails):
        request = data.draw(st.sampled_from(self.reserved))
        self.reserved.remove(request)
        self.come(request, fails)
        self.ledger.check()

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def show(self, data):
        """The other engine has sampled a token of output."""
        request = data.draw(st.sampled_from(self.reserved))
        if request.num_tokens < request.cut and transfer.extend(self.ledger, request, request.num_tokens, self.now) is not None:
            assert "stop" == request.finish_reason, "the last token comes with the KV"
            self.reserved.remove(request)
        self.ledger.check()

    def come(self, request, fails):
        """The expected KV transfer is delivered, or fails."""
        if fails:
            transfer.recall(self.ledger, request)
            assert request.status is Status.WAITING
        elif request.cut < len(request.prompt):
            cut = max(request.cut, request.num_cached)
            transfer.resume(self.ledger, request, cut)
            assert len(request.prompt) - cut == request.remaining
        elif transfer.deliver(self.ledger, request, request.num_tokens, self.now) is not None:
            assert request.finish_reason in ("stop", "length")
        else:
            assert request.remaining == 1

    @rule()
    def schedule(self):
        if len(self.out) == self.ledger.capacity.depth:
            return
        overlap = self.ledger.capacity.overlap
        ready = [r for r in self.ledger.running if (r.output and r.remaining == 1) or (overlap and r.goes_on)]
        plan = self.scheduler.schedule(self.now)
        self.ledger.check()
        ahead = overlap and bool(self.out)
        if ahead and not plan.work:
            return
        for work in plan.work:
            request = self.ledger.requests[work.id]
            assert work.start + work.count < len(request.prompt) + request.max_tokens, "planned beyond its known end"
            assert (work.tokens == (UNKNOWN,)) == (work.start == request.num_tokens)
            assert self.adapters.ready(request), "it runs without its adapter"
        used = {work.adapter for work in plan.work if work.adapter}
        assert plan.ranks == sum(map(self.adapters.rank, used))
        planned = {w.id for w in plan.work}
        preempted = {r.id for r in ready if r.status is Status.WAITING}
        assert set(plan.stalled) == {r.id for r in ready} - planned
        if self.scheduler.policy.stall_free and plan.stalled:
            assert not ahead, "a decode was left out that could have waited for the iteration that runs"
            short = self.ledger.pool.num_free == 0
            assert preempted or short, "a ready decode was left out while there was KV for it"
        assert len(plan.work) <= self.ledger.limits.max_seqs
        assert plan.num_tokens <= self.ledger.limits.max_tokens or len(plan.work) == 1
        if plan.work:
            self.out.append(plan)

    @precondition(lambda self: self.out)
    @rule(fails=st.integers(0, 20))
    def complete(self, fails):
        plan = self.out.popleft()
        result = StepResult(plan.step, {}, 0, error="boom") if fails == 0 else answer(plan)
        had = {work.id: len(work.output) for work in plan.work}
        done, dropped = self.scheduler.complete(plan, result, self.now)
        for request in done:
            assert request.finish_reason in ("stop", "length", "error")
            assert not request.blocks
        assert all((len(w.output) == had[w.id]) for w in plan.work if w.id in dropped)
        self.ledger.check()

    @precondition(lambda self: self.scheduler.steady and not self.out)
    @rule(most=st.integers(1, 20))
    def leap(self, most):
        stretch = Stretch(self.scheduler, self.now, most)
        if not stretch.draft.work:
            return
        ends = [min([r.max_tokens - len(r.output), *(stop + 1 - r.num_tokens for stop in r.stop_ids if stop >= r.num_tokens)])
                for r in stretch.sampling]  # fmt: skip
        steps = min([stretch.most, *ends])
        before, free = self.scheduler.step, self.ledger.pool.num_free
        tokens = [range(r.num_tokens, r.num_tokens + steps) for r in stretch.sampling]
        done = stretch.leap(steps, tokens, self.now)
        self.ledger.check()
        assert before + steps == self.scheduler.step
        assert done or sum(stretch.grown) == free - self.ledger.pool.num_free
        assert {r.finish_reason for r in done} <= {"stop", "length"}

    @rule(restart=st.booleans())
    def lose(self, restart):
        running = [r for r in self.ledger.requests.values() if r.status is not Status.WAITING]
        self.out.clear()
        self.reserved.clear()
        self.loading.clear()
        ended = self.scheduler.lost(restart=restart)
        self.ledger.check()
        assert set([] if restart else running) == set(ended)
        assert all(r.status is Status.WAITING if restart else r.finish_reason == "error" for r in running)
        assert self.ledger.pool.num_free == self.ledger.capacity.num_blocks

    @precondition(lambda self: self.everybody)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.everybody))
        self.scheduler.abort(request.id)
        self.reserved = [r for r in self.reserved if r is not request]
        assert request.id not in self.ledger.requests
        self.ledger.check()

    @precondition(lambda self: any(not r.in_flight for r in self.ledger.requests.values()))
    @rule(data=st.data())
    def release(self, data):
        idle = [r for r in self.ledger.requests.values() if not r.in_flight]
        transfer.release(self.ledger, data.draw(st.sampled_from(idle)).id)
        self.ledger.check()

    @precondition(lambda self: any(not r.in_flight for r in self.ledger.running))
    @rule(data=st.data())
    def hold(self, data):
        transfer.hold(self.ledger, data.draw(st.sampled_from([r for r in self.ledger.running if not r.in_flight])).id)
        self.ledger.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for request in list(self.ledger.requests.values()):
            if request.status is Status.HELD:
                self.scheduler.abort(request.id)
        for number in range(20_000):
            self.load()
            if self.loading:
                self.end_load(fails=False)
            if (request := transfer.admit(self.ledger)) is not None:
                self.reserved.append(request)
            if self.reserved:
                self.come(self.reserved.pop(0), fails=number % 3 == 0)
            plan = self.scheduler.schedule(self.now)
            if plan.work:
                self.out.append(plan)
            if self.out and (not plan.work or len(self.out) == self.ledger.capacity.depth):
                plan = self.out.popleft()
                self.scheduler.complete(plan, answer(plan), self.now)
            if not self.ledger.requests and not self.out and not self.loading:
                break
        assert not self.ledger.requests, "somebody starved"
        assert not self.adapters.num_parked
        assert self.ledger.pool.num_free == self.ledger.capacity.num_blocks
        for request in self.everybody:
            first = len(request.prompt)
            assert request.output == list(range(first, first + len(request.output)))


SchedulerMachine.TestCase.settings = settings(max_examples=500, stateful_step_count=50, deadline=None, derandomize=True)
TestScheduler = SchedulerMachine.TestCase
