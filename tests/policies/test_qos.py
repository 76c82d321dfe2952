"""Who is served when not all can be, by the slo policy: classes, relegation, priorities that displace, streams that come back."""

from collections.abc import Sequence

from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo as Targets
from stallfree.perf.fitted import Fitted
from stallfree.policies.slo import Slo

BATCH = Targets.parse("ttlt=10min")


class Serving:
    """The slo policy on a machine that takes exactly what its prices say."""

    def __init__(self, slo: str, blocks: int = 4000, *, slack: bool = True):
        self.policy = Slo(Targets.parse(slo), Fitted(), slack=slack)
        self.scheduler = Scheduler(self.policy, Capacity(16, blocks, 8192))
        self.now = 0.0
        self.gaps: dict[str, list[float]] = {}

    def submit(self, *requests: Request) -> Sequence[Request]:
        for request in requests:
            request.arrival = self.now
            self.scheduler.submit(request)
        return requests

    def step(self) -> Plan:
        plan = self.scheduler.schedule(self.now)
        before = {w.id: self.scheduler.ledger.requests[w.id].last_token for w in plan.work if w.decode}
        self.now += self.policy.cost.seconds(plan.shape)
        self.scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), self.now)
        for id, last in before.items():
            self.gaps.setdefault(id, []).append(self.now - last)
        return plan

    def steps(self, number: int) -> list[Plan]:
        return [self.step() for _ in range(number)]


def prompt(id: str, length: int, answer: int = 200, **more: object) -> Request:
    number = sum(map(ord, id)) * 100_000
    return Request(id, range(number, number + length), answer, **more)


def streams(count: int, slo: Targets | None = None) -> list[Request]:
    return [prompt(f"{'loose' if slo else 'tight'} {i}", 400, 2000, slo=slo) for i in range(count)]


def test_streams_of_equal_targets_are_in_every_iteration_beside_prompts():
    serving = Serving("tpot=60ms")
    serving.submit(*streams(8))
    serving.steps(20)
    serving.submit(prompt("long", 4000))
    assert not any(plan.stalled for plan in serving.steps(40))


def test_loose_streams_sit_out_while_prompts_wait_and_all_are_in_time():
    loose = Targets.parse("tbt=500ms")
    sides = {}
    for slack in (True, False):
        serving = Serving("tbt=60ms", slack=slack)
        serving.submit(*streams(4), *streams(12, loose))
        serving.steps(60)
        serving.gaps.clear()
        (long,) = serving.submit(prompt("long", 6000, 5))
        while not long.output:
            serving.step()
        tight = [gap for id, gaps in serving.gaps.items() if id.startswith("tight") for gap in gaps]
        assert max(tight) <= 0.06
        assert max(gap for id, gaps in serving.gaps.items() if id.startswith("loose") for gap in gaps) <= 0.5
        sides[slack] = long.first_token - long.arrival
    assert sides[True] < 0.8 * sides[False]


def test_without_a_prompt_nobody_sits_out():
    serving = Serving("tbt=60ms")
    requests = serving.submit(*streams(4), *streams(4, BATCH))
    while not all(r.output for r in requests):
        serving.step()
    assert not any(plan.stalled for plan in serving.steps(50))


def test_batch_answers_wait_for_interactive_ones_and_end_in_time():
    serving = Serving("ttft=1s,tbt=60ms")
    batch = serving.submit(*[prompt(f"batch {i}", 1500, 20, slo=BATCH, service_class="batch") for i in range(20)])
    chat = serving.submit(prompt("chat", 300, 20))[0]
    while any(r.finish_reason is None for r in batch):
        serving.step()
    assert chat.first_token < sorted(r.first_token for r in batch)[1]
    assert serving.now < 600


def test_a_request_that_cannot_meet_its_target_falls_below_all_that_can_and_is_served_in_the_end():
    serving = Serving("ttft=1s,tbt=100ms")
    serving.submit(*streams(1))
    serving.steps(3)
    (lost,) = serving.submit(prompt("lost", 4000, 5))
    serving.step()
    assert lost.relegated
    hopeful = serving.submit(*[prompt(f"hopeful {i}", 300, 5) for i in range(3)])
    while lost.finish_reason is None:
        serving.step()
    assert all(r.first_token < lost.first_token for r in hopeful)
    assert not any(r.relegated for r in hopeful)


def test_a_higher_priority_takes_the_place_of_a_lower_one_and_never_of_an_equal():
    serving = Serving("tbt=200ms", blocks=135)  # 2,160 tokens
    low = serving.submit(prompt("low", 700, 400, priority=1), prompt("lower", 700, 400, priority=2))
    serving.steps(30)
    assert all(r.output for r in low)
    (equal,) = serving.submit(prompt("equal", 700, 10, priority=2))
    serving.steps(3)
    assert "waiting" == equal.status.value
    (urgent,) = serving.submit(prompt("urgent", 700, 10))
    serving.steps(5)
    assert urgent.output
    assert [0, 1] == [r.num_preemptions for r in low]


def test_an_interrupted_answer_comes_back_before_new_requests():
    serving = Serving("tbt=200ms", blocks=110)
    (stream,) = serving.submit(prompt("stream", 700, 300, priority=1))
    serving.steps(10)
    urgent = serving.submit(prompt("urgent", 1200, 30))[0]
    new = serving.submit(*[prompt(f"new {i}", 600, 30, priority=1) for i in range(3)])
    while urgent.finish_reason is None:
        serving.step()
    assert 1 == stream.num_preemptions
    written = len(stream.output)
    while len(stream.output) == written:
        serving.step()
    assert not any(r.output for r in new)


def test_kv_is_not_given_to_more_answers_than_it_will_hold():
    serving = Serving("tbt=500ms", blocks=200)  # 3,200 tokens
    first = serving.submit(*[prompt(f"first {i}", 200, 400) for i in range(20)])
    while any(r.finish_reason is None for r in first):
        serving.step()
    assert sum(r.num_preemptions for r in first) <= 5


def test_what_is_in_flight_gives_way_an_iteration_later():
    policy = Slo(Targets.parse("tbt=200ms"), Fitted())
    scheduler, now = Scheduler(policy, Capacity(16, 135, 8192, depth=2, overlap=True)), 0.0
    low = prompt("low", 700, 400, priority=1)
    lower = prompt("lower", 700, 400, priority=2)
    urgent = prompt("urgent", 700, 10)
    scheduler.submit(low)
    scheduler.submit(lower)
    ahead: list[Plan] = []
    for step in range(40):
        if step == 20:
            assert low.output
            assert lower.output
            scheduler.submit(urgent)
        while len(ahead) < 2 and (plan := scheduler.schedule(now)).work:
            ahead.append(plan)
        plan = ahead.pop(0)
        now += policy.cost.seconds(plan.shape)
        scheduler.complete(plan, StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0), now)
    assert urgent.output
    assert [0, 1] == [low.num_preemptions, lower.num_preemptions]
