"""Engines that take turns do not affect each other's KV or time."""

from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.turns import Clock, Player, Share
from stallfree.executors.simulated import Linear, SimulatedExecutor
from stallfree.policies import load

COST = Linear(iteration_s=0.25, token_s=0.0625, context_s=0.0)


class Time:
    """A clock that advances only when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Watched(SimulatedExecutor):
    """Remembers the KV blocks of every plan."""

    def __init__(self, time: Time):
        super().__init__(Capacity(16, 41, 512), range(97, 107), COST)
        self.sleep = time.sleep
        self.blocks: list[set[int]] = []

    def submit(self, plan):
        self.blocks.append({block for work in plan.work for block in work.blocks})
        super().submit(plan)


def players(*policies: str) -> tuple[list[Player], Watched]:
    time = Time()
    executor = Watched(time)
    return [
        Player(
            Share(executor, number, 2),
            bytes_as_text(),
            load(policy),
            [Request(f"r{i}", range(40), 10, arrival=8.0 * i) for i in range(3)],
            time,
        )
        for number, policy in enumerate(policies)
    ], executor


def played(*policies: str) -> list[Player]:
    everybody, _ = players(*policies)
    while going := [player for player in everybody if not player.done]:
        for player in going:
            player.turn()
    return everybody


def test_a_player_does_the_same_alone_and_in_turns_with_another():
    alone = [played("sarathi")[0].records, played("orca")[0].records]
    assert alone == [player.records for player in played("sarathi", "orca")]


def test_shares_of_the_kv_do_not_overlap():
    (first, second), executor = players("sarathi", "sarathi")
    first.turn()
    second.turn()
    assert [False, False] == [not blocks for blocks in executor.blocks]
    assert set() == executor.blocks[0] & executor.blocks[1]
    assert max(executor.blocks[1]) < executor.capacity.num_blocks


def test_waiting_for_the_next_arrival_costs_no_time_of_the_executor():
    (player,) = played("sarathi")
    assert [0.0, 8.0, 16.0] == [r.t_plan for r in player.records if r.arrived]
    assert {"length"} == {reason for r in player.records for _, reason, _ in r.finished}


def test_a_clock_stands_while_it_is_not_its_turn():
    time = Time()
    clock = Clock(time)
    time.sleep(5)
    clock.go()
    time.sleep(1)
    clock.stand()
    time.sleep(5)
    assert 1 == clock()
    clock.go()
    clock.jump(3)
    time.sleep(1)
    assert 4 == clock()


def test_a_clock_does_not_jump_back():
    clock = Clock(time := Time())
    clock.go()
    time.sleep(5)
    clock.jump(2)
    assert 5 == clock()
