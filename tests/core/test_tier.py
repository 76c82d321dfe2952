"""Evicted KV comes back from host memory: the right bytes, in every order of calls, a bounded amount at a time."""

import pytest
from hypothesis import settings

from stallfree.core import transfer
from stallfree.core.ledger import Limits
from stallfree.core.plan import UNKNOWN, Capacity
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.tier import Tier
from stallfree.policies.sarathi import Sarathi
from tests.core.test_state_machine import SchedulerMachine
from tests.virtual import answer


class Memory:
    """What is in the pool's blocks and in the tier's slots. The content of a position is a hash of all that its KV depends on."""

    def __init__(self, scheduler: Scheduler):
        self.ledger, self.pool = scheduler.ledger, scheduler.ledger.pool
        self.blocks = [[None] * self.pool.block_size for _ in range(self.pool.num_blocks)]
        self.slots = [None] * self.pool.tier.num_slots
        self.loaded = 0

    def move(self) -> None:
        stored, loaded = self.pool.tier.moves()
        for slot, block in stored.items():
            self.slots[slot] = list(self.blocks[block])
        for block, slot in loaded.items():
            self.blocks[block] = list(self.slots[slot])
        self.loaded += len(loaded)

    def write(self, request: Request, blocks, start: int, tokens) -> None:
        """Compute the KV of `tokens`, from `start` on. All before it must be there."""
        content = request.root
        for position in range(start + len(tokens)):
            token = request.prompt[position] if position < len(request.prompt) else position
            content = hash((content, token if position < start or tokens == (UNKNOWN,) else tokens[position - start]))
            block, offset = blocks[position // self.pool.block_size], position % self.pool.block_size
            if position < start:
                assert self.blocks[block][offset] == content, f"{request!r}: wrong KV at {position} of {start}"
            else:
                self.blocks[block][offset] = content

    def run(self, plan) -> None:
        nodes = [self.pool._index[key][1] == node for key, _, node in self.pool.tier.items() if key in self.pool._index]
        assert all(nodes), "a block has another node in host memory than in the pool"
        used = [slot for _, slot, _ in self.pool.tier.items()]
        assert sorted([*used, *self.pool.tier._free]) == list(range(self.pool.tier.num_slots)), "a slot is used twice, or lost"
        for work in plan.work:
            self.write(self.ledger.requests[work.id], work.blocks, work.start, work.tokens)


class TierMachine(SchedulerMachine):
    """The scheduler's machine with a tier, and with bytes that are moved where the engine moves them."""

    leap = None  # the simulator has no bytes

    @property
    def scheduler(self):
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler):
        self._scheduler, pool, adapters = scheduler, scheduler.ledger.pool, scheduler.ledger.adapters
        pool.tier = Tier(1 + pool.num_blocks // 2, 1 + pool.num_blocks % 7)
        self.memory = Memory(scheduler)
        schedule, lost, following = scheduler.schedule, scheduler.lost, adapters.next

        def run(now):
            plan = schedule(now)
            self.memory.move()
            self.memory.run(plan)
            return plan

        def next(spare):
            resident = following(spare)
            if resident is not None:
                self.memory.move()
                for block in resident.blocks:
                    self.memory.blocks[block] = ["weights"] * pool.block_size
            return resident

        def lose(**how):
            self.memory.blocks = [["lost"] * pool.block_size for _ in self.memory.blocks]
            return lost(**how)

        scheduler.schedule, scheduler.lost, adapters.next = run, lose, next

    def come(self, request, fails):
        self.memory.move()
        if not fails:
            self.memory.write(request, request.blocks, request.num_cached, request.prompt[request.num_cached :])
        super().come(request, fails)

    def teardown(self):
        end_one = self.end_load

        def end_all(fails):
            while self.loading:
                end_one(fails=fails)

        self.end_load = end_all  # no load is left over at the end
        super().teardown()


TierMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None, derandomize=True)
TestTier = TierMachine.TestCase


class Run:
    """A scheduler with a tier, run plan by plan."""

    def __init__(self, num_blocks: int, slots: int, most: int = 100, budget: int = 64):
        self.scheduler = Scheduler(Sarathi(budget), Capacity(4, num_blocks, 400), Limits(8, 400))
        self.pool = self.scheduler.ledger.pool
        self.pool.tier = Tier(slots, most)
        self.memory = Memory(self.scheduler)

    def serve(self, id: str, length: int, **fields) -> list:
        """Serve a request whose prompt is 0, 1, 2 and so on. Returns its plans."""
        self.scheduler.submit(Request(id, fields.pop("prompt", range(length)), 1, **fields))
        plans = []
        while self.scheduler.ledger.requests:
            plan = self.scheduler.schedule(0.0)
            self.memory.move()
            self.memory.run(plan)
            plans.append(plan)
            self.scheduler.complete(plan, answer(plan), 0.0)
            self.scheduler.ledger.check()
        return plans

    def fill(self) -> None:
        """Evict all that is in the pool."""
        blocks = self.pool.num_blocks
        self.serve(f"filler {blocks}", 4 * blocks - 2, prompt=[-1] * (4 * blocks - 2))


def test_what_was_evicted_comes_back():
    run = Run(20, 40)
    run.serve("a", 41)
    run.fill()
    (plan,) = run.serve("b", 41)
    assert (("b", 40),) == plan.cached == plan.restored
    assert [(40, 1)] == plan.shape
    assert 10 == run.memory.loaded


def test_a_look_counts_what_would_come_back_and_moves_nothing():
    run = Run(20, 40)
    run.serve("a", 41)
    run.fill()
    request = Request("b", range(41), 1)
    assert 40 == run.pool.look(request)
    assert ({}, {}) == run.pool.tier.moves()
    assert [] == request.blocks


def test_a_prefix_may_lie_in_both_tiers():
    run = Run(20, 40)
    run.serve("a", 41)
    run.serve("filler", 58, prompt=[-1] * 58)  # evicts the end of the other prompt
    (plan,) = run.serve("b", 41)
    assert (("b", 40),) == plan.cached
    assert 0 < dict(plan.restored)["b"] < 40


def test_a_long_prefix_comes_back_in_several_iterations_with_a_token_of_work_each():
    run = Run(40, 400, most=4)
    for start in range(0, 80, 16):  # so few blocks are kept in an iteration that the prompt has to be evicted in pieces
        run.serve(f"a{start}", 81)
    for number in range(1, 41):
        run.serve(f"filler {number}", 18, prompt=[-number] * 18)
    plans = run.serve("b", 81)
    restored = [dict(plan.restored).get("b", 0) for plan in plans]
    assert 80 - sum(restored) < 16
    assert max(restored) == 16
    assert [1] * (len(plans) - 1) == [plan.num_tokens for plan in plans[:-1]]


def test_no_more_is_kept_in_an_iteration_than_may_be_moved():
    run = Run(20, 40, most=3)
    run.serve("a", 41)
    run.fill()
    assert 3 == len(run.pool.tier)


def test_the_least_recently_used_makes_room():
    run = Run(20, 10)
    run.serve("a", 41)
    run.fill()
    run.serve("other", 78, prompt=[-2] * 78)
    run.fill()
    (plan,) = run.serve("b", 41)
    assert () == plan.restored


def test_another_salt_finds_nothing():
    run = Run(20, 40)
    run.serve("a", 41, salt="x")
    run.fill()
    assert [()] == [plan.restored for plan in run.serve("b", 41)]
    run.fill()
    assert [(("c", 40),)] == [plan.restored for plan in run.serve("c", 41, salt="x")]


def test_nothing_comes_back_for_a_request_that_would_not_fit():
    run = Run(20, 40)
    run.serve("a", 41)
    run.fill()
    run.scheduler.submit(Request("long", [-3] * 60, 1))
    plan = run.scheduler.schedule(0.0)
    assert 15 == len(plan.work[0].blocks)
    request = Request("b", range(41), 1)
    assert 0 == run.pool.match(request)
    assert 40 == run.pool.look(request)


def test_what_goes_again_is_not_moved_again():
    run = Run(20, 40)
    run.serve("a", 41)
    run.fill()
    run.serve("b", 41)
    before = dict(run.pool.tier._slots)
    run.fill()
    assert before.items() <= dict(run.pool.tier._slots).items()


def test_a_transfer_asks_for_what_is_in_neither_tier():
    run = Run(20, 40)
    run.serve("a", 41)
    run.fill()
    ledger = run.scheduler.ledger
    transfer.expect(ledger, Request("b", range(61), 1))
    request = transfer.admit(ledger)
    assert 40 == request.num_cached
    assert 10 == len(run.pool.tier.moves().loaded)


def test_with_all_kv_the_tier_is_lost():
    run = Run(20, 40)
    run.serve("a", 41)
    run.fill()
    run.scheduler.lost(restart=True)
    assert 0 == len(run.pool.tier)
    run.scheduler.ledger.check()


@pytest.mark.parametrize(("slots", "most"), [(0, 1), (1, 0)])
def test_a_tier_has_a_slot_and_may_move_a_block(slots, most):
    with pytest.raises(ValueError, match="at least one slot"):
        Tier(slots, most)
