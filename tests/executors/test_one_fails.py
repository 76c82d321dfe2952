"""Work that cannot be run fails only its own request; the rest of the iteration is as if it were not there."""

import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import UNKNOWN, Plan
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.sampling import Sampling
from tests.executors.test_openvino import TOKENS, work
from tests.models import write_folder

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama")
    return open_checkpoint(folder)


@pytest.fixture(scope="module", params=["openvino", "torch", "torch, overlapping", "two ranks"])
def executor(request, checkpoint):
    if request.param == "openvino":
        executor = OpenVINOExecutor(checkpoint, weights="f32", kv="f32", kv_bytes=1 << 22)
    else:
        from stallfree.executors.torch import Options, ParallelExecutor, TorchExecutor, workers

        exact = Options("f32", "f32")
        if request.param == "two ranks":
            executor = ParallelExecutor(checkpoint, exact, 1 << 22, tp=1, pp=2, workers=workers("local"))
        else:
            executor = TorchExecutor(checkpoint, exact, 1 << 22, overlap="overlapping" in request.param)
    yield executor
    executor.close()


def piece(id, tokens, first_block, sampling=GREEDY, start=0):
    blocks = tuple(range(first_block, first_block + 6))
    return work(tokens, start, id=id)._replace(blocks=blocks, sampling=sampling, prompt=tuple(tokens), output=[])


def run(executor, *pieces):
    executor.submit(Plan(0, 0.0, pieces))
    return executor.collect()


BAD = {
    "a token that the model lacks": lambda w: w._replace(tokens=(*w.tokens[:-1], 160)),
    "a token below zero": lambda w: w._replace(tokens=(-7, *w.tokens[1:])),
    "a block that there is not": lambda w: w._replace(blocks=(10**6,) * 6),
    "fewer tokens than it says": lambda w: w._replace(tokens=w.tokens[1:]),
    "a position beyond the context": lambda w: w._replace(start=250),
    "a bias for a token that the model lacks": lambda w: w._replace(sampling=Sampling(logit_bias={3: 1.0, 160: 1.0})),
    "a bias for a token below zero": lambda w: w._replace(sampling=Sampling(logit_bias={-1: 100.0})),
    "a stop id that the model lacks": lambda w: w._replace(sampling=Sampling(stop_ids=frozenset({160}), min_tokens=9)),
}


@pytest.mark.parametrize("bad", BAD)
def test_only_the_request_fails_whose_work_cannot_be_run(executor, bad):
    good = [piece("first", TOKENS[:20], 0), piece("last", TOKENS[:9], 12)]
    alone = run(executor, *good)
    result = run(executor, good[0], BAD[bad](piece("bad", TOKENS[:30], 6)), good[1])
    assert alone.tokens == result.tokens
    assert result.error is None
    assert ["bad"] == list(result.failed)
    assert any(word in result.failed["bad"] for word in ("vocabulary", "block number", "token ids", "max_model_len"))


def test_a_plan_of_which_nothing_can_be_run_names_each_request(executor):
    lacking = [BAD["a token that the model lacks"](piece(id, TOKENS[:9], 0)) for id in "ab"]
    with pytest.raises(ValueError, match=r"request a: .*vocabulary of 160; request b: "):
        executor.submit(Plan(0, 0.0, tuple(lacking)))


def test_stop_ids_that_the_model_lacks_do_no_harm_where_they_are_not_masked(executor):
    result = run(executor, piece("a", TOKENS[:9], 0, Sampling(temperature=0, stop_ids=frozenset({160}))))
    assert {} == result.failed


def test_a_request_that_failed_fails_in_the_iteration_that_was_planned_ahead(checkpoint):
    from stallfree.executors.torch import Options, TorchExecutor

    executor = TorchExecutor(checkpoint, Options("f32", "f32"), 1 << 22, overlap=True)
    good, bad = piece("good", TOKENS[:20], 0), BAD["a token that the model lacks"](piece("bad", TOKENS[:20], 6))
    executor.submit(Plan(0, 0.0, (good, bad)))
    ahead = [piece(id, [UNKNOWN], at, start=20) for id, at in (("good", 0), ("bad", 6))]
    executor.submit(Plan(1, 0.0, tuple(ahead)))
    first, second = executor.collect(), executor.collect()
    assert ["bad"] == list(first.failed) == list(second.failed)
    assert ["good"] == list(first.tokens) == list(second.tokens)
    executor.close()
