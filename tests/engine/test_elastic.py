"""Instances whose groups form anew serve requests with the tokens of one rank."""

import asyncio
import os
import signal
import threading
from dataclasses import replace

import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Capacity, GroupPlan, Plan, StepResult, Work
from stallfree.core.request import Refused, Request
from stallfree.elastic.fixed import Fixed
from stallfree.elastic.loongserve import LoongServe
from stallfree.elastic.stall_free import StallFree
from stallfree.engine import groups
from stallfree.engine.assemble import Options as EngineOptions
from stallfree.engine.assemble import assemble, bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.thread import EngineThread
from stallfree.executors.sampling import Sampling
from tests.models import write_folder
from tests.waiting import comes

pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.executors.torch import Options, TorchExecutor
from stallfree.executors.torch.driver import Local
from stallfree.executors.torch.elastic import Cluster

EXACT = Options("f32", "f32", threads=2)
INSTANCES, ROOM = 2, 64
PROMPTS = [[(17 * i + 7 * p) % 150 + 3 for p in range(length)] for i, length in enumerate((5, 90, 1, 30, 20))]
DRAWN = [Sampling(temperature=0.8, seed=7, presence_penalty=0.5), Sampling(temperature=1.0, top_p=0.9, seed=3, logprobs=2)]
TEXT = bytes_as_text()


class Prices:
    """Such that a long prompt is worth a ring."""

    def seconds(self, degree, shape):
        return sum(0.001 + count * (1 + (start + count) / 10) * 1e-3 / degree for start, count in shape)

    def moving(self, tokens):
        return 1e-6 * tokens


POLICIES = {
    "elastic": lambda: StallFree(Prices(), INSTANCES, 0.05, lambda stream: 0.1),
    "loongserve": lambda: LoongServe(Prices(), INSTANCES),
    "fixed": lambda: Fixed(Prices(), [[0, 1]]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    write_folder(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return open_checkpoint(folder)


def made(checkpoint, tp):
    heads = max(1, checkpoint.config.num_kv_heads // tp)
    size = 2 * checkpoint.config.num_layers * heads * checkpoint.config.head_dim * 4
    return Cluster(checkpoint, replace(EXACT, threads=1), ROOM * size, tp=tp, instances=INSTANCES, workers=Local())


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def cluster(request, checkpoint):
    cluster = made(checkpoint, request.param)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The tokens of one rank after each prompt, which depend on how they are drawn."""
    executor = TorchExecutor(checkpoint, EXACT, 1 << 22)

    def tokens(prompt, sampling):
        output: list[int] = []
        for _ in range(8):
            both = (*prompt, *output)
            work = Work("0", 0, len(both), True, False, both, tuple(range(8)), sampling, "", prompt, tuple(output))
            executor.submit(Plan(0, 0.0, (work,)))
            output += executor.collect().tokens["0"]
        return output

    yield [tokens(request.prompt, request.sampling) for request in requests()]
    executor.close()


def requests(**options):
    """Of each prompt one with the likeliest tokens, and one with tokens that are drawn."""
    samplings = [None, *DRAWN]
    return [
        Request(f"{i} {number}", prompt, 8, sampling=sampling, **options)
        for number, sampling in enumerate(samplings)
        for i, prompt in enumerate(PROMPTS)
    ]


def served(engine, given):
    """The outputs of `given`, in which they may have arrived before."""
    for request in given:
        if request.id not in engine.scheduler.ledger.requests:
            engine.submit(request)
    outputs = []
    while engine.busy:
        outputs += engine.step()
    engine.scheduler.ledger.check()
    assert [ROOM] * INSTANCES == engine.scheduler.instances.free
    return outputs


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_serves_prompts_of_all_lengths_with_the_tokens_of_one_rank(cluster, expected, policy):
    assert [ROOM] * INSTANCES == cluster.rooms
    records = []
    engine, given = Engine(cluster, TEXT, POLICIES[policy](), record=records.append), requests()
    outputs = served(engine, given)
    assert expected == [request.output for request in given]  # the second prompt fits no single instance
    assert all(request.finish_reason == "length" for request in given)
    assert 8 * len(given) == sum(len(output.tokens) for output in outputs)
    assert 8 * len(given) == sum(len(record.emitted) for record in records)


def test_a_stop_id_ends_a_request(cluster, expected):
    request = Request("0", PROMPTS[0], 8, stop_ids=frozenset({expected[0][2]}))
    served(Engine(cluster, TEXT, POLICIES["elastic"]()), [request])
    assert ("stop", expected[0][: len(request.output)]) == (request.finish_reason, request.output)


def test_log_probabilities_of_a_prompt_are_those_of_one_rank(cluster, checkpoint):
    given = Request("0", PROMPTS[3], 1, sampling=Sampling(prompt_logprobs=1))
    one = TorchExecutor(checkpoint, EXACT, 1 << 22)
    work = Work("0", 0, 30, True, False, tuple(PROMPTS[3]), (0, 1), given.sampling, "", PROMPTS[3], ())
    one.submit(Plan(0, 0.0, (work,)))
    ((start, wanted),) = one.collect().scores.values()
    one.close()
    outputs = served(Engine(cluster, TEXT, POLICIES["elastic"]()), [given])
    scores = [score for output in outputs for score in output.scores]
    assert start == 1
    assert [score.logprob for score in wanted] == pytest.approx([score.logprob for score in scores], abs=1e-4)


def test_an_aborted_request_gives_its_room_back(cluster):
    engine, given = Engine(cluster, TEXT, POLICIES["elastic"]()), requests()
    for request in given:
        engine.submit(request)
    engine.step()
    for request in given:
        engine.abort(request.id)
    assert not served(engine, [])
    assert {"abort"} == {request.finish_reason for request in given}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Request("0", [3] * 126, 8), "the prompt has 126 tokens; with room for one more, at most 125 fit"),
        (Request("0", [3], 8, adapter="x"), "adapter 'x' is not loaded"),
    ],
)
def test_what_fits_no_group_is_refused_at_its_arrival(cluster, wrong, message):
    with pytest.raises(Refused, match=message):
        Engine(cluster, TEXT, POLICIES["elastic"]()).submit(wrong)


def test_bad_plans_are_refused_and_change_nothing(cluster):
    work = Work("0", 0, 2, True, False, (3, 4), (), None, "", (3, 4), ())
    for members, works, kept, message in (
        ((0,), (), (), "without work"),
        ((0,), (work,), ({1: 2},), "no members"),
        ((0,), (work,), ({0: 1},), "do not follow"),
        ((0,), (work._replace(tokens=(3, 999)),), ({0: 2},), "vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster.submit(GroupPlan(0, 0.0, works, members=members, kept=kept))
    with pytest.raises(ValueError, match="step 0 does not say which instances"):
        cluster.submit(Plan(0, 0.0, (work,)))


@pytest.mark.parametrize("restart", [True, False])
def test_after_a_lost_rank_requests_are_computed_again_or_end_with_an_error(cluster, expected, restart):
    engine, given = Engine(cluster, TEXT, POLICIES["loongserve"](), restart=restart), requests()
    for request in given:
        engine.submit(request)
    engine.step()
    os.kill(cluster._ranks._workers._processes[1].pid, signal.SIGKILL)
    served(engine, [])
    if restart:
        assert expected == [request.output for request in given]
    else:
        reasons = {request.finish_reason for request in given}
        assert "error" in reasons
        assert reasons <= {"error", "length"}
    other = requests()[:1]
    served(engine, other)
    assert expected[:1] == [request.output for request in other]


class Slow:
    """Two instances, of which the first never ends a prompt that is longer than 10 tokens until it is `released`."""

    def __init__(self):
        self.rooms = [100, 100]
        self.capacity = Capacity(1, 200, 198, depth=2)
        self.released = False
        self._plans: list[GroupPlan] = []
        self._news = threading.Condition()
        self._woken = False

    def submit(self, plan):
        with self._news:
            self._plans.append(plan)

    def _ready(self):
        return [plan for plan in self._plans if self.released or all(work.count <= 10 for work in plan.work)]

    def wait(self):
        with self._news:
            self._news.wait_for(lambda: self._ready() or self._woken)
            self._woken = False
            return bool(self._ready())

    def wake(self):
        with self._news:
            self._woken = True
            self._news.notify()

    def collect(self):
        plan = self._ready()[0]
        self._plans.remove(plan)
        return StepResult(plan.step, {work.id: (65,) for work in plan.work if work.samples}, 0.01)

    def move(self, id, target):
        raise AssertionError("nothing has to move")

    def drop(self, id):
        pass

    def ring(self, degree):
        raise AssertionError("nothing is timed")

    def close(self):
        pass


def test_what_arrives_while_an_instance_computes_begins_on_another_at_once():
    cluster = Slow()
    thread = EngineThread(Engine(cluster, TEXT, Fixed(Prices(), [[0], [1]])), 8)

    async def run():
        thread.start()
        long = thread.submit([Request("long", range(50), 1)])
        await comes(lambda: thread.num_running)
        short = [o async for some in thread.submit([Request("short", range(5), 3)]) for o in some]
        cluster.released = True
        cluster.wake()
        rest = [o async for some in long for o in some]
        await thread.close(60)
        return short, rest

    short, rest = asyncio.run(asyncio.wait_for(run(), 60))
    assert ("length", 3) == (short[-1].finish_reason, sum(len(output.tokens) for output in short))
    assert "length" == rest[-1].finish_reason


def test_nobody_is_held_up_by_waking_a_cluster_that_is_busy_or_closed(checkpoint):
    cluster = made(checkpoint, 1)
    for _ in range(100_000):  # more than a socket keeps
        cluster.wake()
    engine, request = Engine(cluster, TEXT, POLICIES["elastic"]()), Request("0", PROMPTS[0], 2)
    served(engine, [request])
    assert 2 == len(request.output)
    cluster.close()
    cluster.wake()


def test_prices_are_measured_once_for_each_number_of_instances(checkpoint, tmp_path):
    cluster, said = made(checkpoint, 1), []
    try:
        first = groups.prices(cluster, {"model": "tiny"}, tmp_path, said.append, lambda done, of: None)
        assert [f"on {degree} of 2 instances" in line for degree, line in enumerate(said, 1)] == [True, True]
        again = groups.prices(cluster, {"model": "tiny"}, tmp_path, said.append, lambda done, of: None)
        assert (2, [cost.state() for cost in first.costs]) == (len(said), [cost.state() for cost in again.costs])
        for degree in (1, 2):
            assert first.seconds(degree, [(20, 1)]) > 0
            assert first.seconds(degree, [(0, 60)]) > first.seconds(degree, [(0, 1)])
        assert first.moving(10) >= 0
        assert cluster.rooms == [cluster._slots.free(number) for number in range(INSTANCES)]
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sp": 1}, "give --executor torch --sp 2 or more"),
        ({"executor": "openvino"}, "give --executor torch --sp 2 or more"),
        ({"pp": 2}, "leave out --pp 2"),
        ({"policy": "elastik"}, "unknown policy 'elastik' .did you mean 'elastic'"),
        ({"token_budget": 64}, "no token budget; leave out --token-budget"),
        ({"speculate": "ngram"}, "no drafts; leave out --speculate"),
        ({"kv_host_memory": 1 << 20}, "leave out --kv-host-memory"),
        ({"adapter": ["a=/nowhere"]}, "leave out --adapter"),
        ({"policy_option": ["x=1"]}, "leave out --policy-option"),
    ],
)
def test_options_that_groups_do_not_have_are_refused_before_a_model_is_opened(wrong, message):
    with pytest.raises(ValueError, match=message):
        assemble(EngineOptions(**{"model": "/nowhere", "policy": "elastic", "executor": "torch", "sp": 2} | wrong))
