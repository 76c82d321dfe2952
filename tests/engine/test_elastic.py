"""Instances whose groups form anew serve requests with the tokens of one rank."""

import os
import signal

import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Plan, Work
from stallfree.core.request import Refused, Request
from stallfree.elastic.fixed import Fixed
from stallfree.elastic.loongserve import LoongServe
from stallfree.elastic.stall_free import StallFree
from tests.models import write_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.engine.elastic import Elastic
from stallfree.executors.torch import Options, TorchExecutor
from stallfree.executors.torch.driver import Local
from stallfree.executors.torch.elastic import Cluster

EXACT = Options("f32", "f32", threads=2)
INSTANCES, ROOM = 2, 64
PROMPTS = [[(17 * i + 7 * p) % 150 + 3 for p in range(length)] for i, length in enumerate((5, 90, 1, 30, 20))]


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
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    write_folder(folder, "llama")
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def cluster(checkpoint):
    size = 2 * checkpoint.config.num_layers * checkpoint.config.num_kv_heads * checkpoint.config.head_dim * 4
    cluster = Cluster(checkpoint, EXACT, ROOM * size, instances=INSTANCES, workers=Local())
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The greedy tokens of one rank after each prompt."""
    executor, outputs = TorchExecutor(checkpoint, EXACT, 1 << 22), []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(8):
            work = Work("0", 0, len(tokens), True, False, tuple(tokens), tuple(range(8)), None, "", prompt, ())
            executor.submit(Plan(0, 0.0, (work,)))
            tokens += executor.collect().tokens["0"]
        outputs.append(tokens[len(prompt) :])
    executor.close()
    return outputs


def requests(**options):
    return [Request(str(i), prompt, 8, **options) for i, prompt in enumerate(PROMPTS)]


def test_a_cluster_has_the_room_of_each_instance(cluster):
    assert [ROOM] * INSTANCES == cluster.rooms


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_serves_prompts_of_all_lengths_with_the_tokens_of_one_rank(cluster, expected, policy):
    engine, given = Elastic(cluster, POLICIES[policy]()), requests()
    tokens = list(engine.serve(given))
    assert expected == [request.output for request in given]  # the second fits no single instance
    assert all(request.finish_reason == "length" for request in given)
    assert 8 * len(given) == len([token for token in tokens if token.token is not None])
    assert cluster.rooms == engine.instances.free


def test_a_stop_id_ends_a_request_once_min_tokens_are_out(cluster, expected):
    stop = frozenset({expected[0][2]})
    engine, request = Elastic(cluster, POLICIES["elastic"]()), Request("0", PROMPTS[0], 8, stop_ids=stop)
    list(engine.serve([request]))
    assert "stop" == request.finish_reason
    assert expected[0][: len(request.output)] == request.output


def test_an_aborted_request_gives_its_room_back(cluster):
    engine, given = Elastic(cluster, POLICIES["elastic"]()), requests()
    for request in given:
        engine.add(request)
    engine.step()
    for request in given:
        engine.abort(request)
    while engine.pending:
        engine.step()
    assert {"abort"} == {request.finish_reason for request in given}
    assert cluster.rooms == engine.instances.free


def test_a_prompt_that_fits_no_group_is_refused_with_the_length_that_would(cluster):
    with pytest.raises(Refused, match="the prompt has 126 tokens; with room for one more, at most 125 fit"):
        Elastic(cluster, POLICIES["elastic"]()).add(Request("0", [3] * 126, 8))


@pytest.mark.parametrize(("wrong", "message"), [({"adapter": "x"}, "have no adapters"), ({"scored": True}, "log-prob")])
def test_what_groups_do_not_have_is_refused_by_name(cluster, wrong, message):
    with pytest.raises(Refused, match=message):
        Elastic(cluster, POLICIES["elastic"]()).add(Request("0", [3], 8, **wrong))


def test_bad_parts_are_refused_and_change_nothing(cluster):
    work = Work("0", 0, 2, True, False, (3, 4), (), None, "", (3, 4), ())
    for members, parts, message in (
        ([0], [], "without work"),
        ([0], [(work, {1: 2})], "no members"),
        ([0], [(work, {0: 1})], "do not follow"),
        ([0], [(work._replace(tokens=(3, 999)), {0: 2})], "vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster.submit(0, members, parts)


def test_after_a_lost_rank_all_requests_are_computed_again(cluster, expected):
    engine, given = Elastic(cluster, POLICIES["loongserve"]()), requests()
    for request in given:
        engine.add(request)
    engine.step()
    os.kill(cluster._ranks._workers._processes[1].pid, signal.SIGKILL)
    while engine.pending:
        engine.step()
    assert 1 == engine.losses
    assert expected == [request.output for request in given]
