"""With overlap, plans have tokens that only the torch executor knows; the results equal those without, whatever happens."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.ledger import Limits
from stallfree.core.plan import UNKNOWN, Plan
from stallfree.core.request import Request
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.executors.sampling import Sampling
from stallfree.policies import load
from tests.executors.test_openvino import TOKENS, work
from tests.models import write_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.executors.torch import Options, TorchExecutor

EXACT = Options("f32", "f32", device="cpu")
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=1, seed=3),
    Sampling(temperature=0, repetition_penalty=1.3),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5),
    Sampling(temperature=0, logprobs=2),
    Sampling(temperature=0, logit_bias={7: 2.0}, presence_penalty=0.5),
    Sampling(temperature=0, min_tokens=6, stop_ids=frozenset(range(3, 40))),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    write_folder(folder, "llama")
    return open_checkpoint(folder)


def executor(checkpoint, blocks, overlap):
    torch_executor = TorchExecutor(checkpoint, EXACT, 1 << 22, overlap=overlap)
    torch_executor.capacity = replace(torch_executor.capacity, num_blocks=blocks)
    return torch_executor


def served(checkpoint, seed, blocks, overlap, samplings):
    """What each request got, once all have been served: some end by a stop id, some are aborted after a few tokens."""
    draw = random.Random(seed)
    records, outputs = [], {}
    engine = Engine(
        executor(checkpoint, blocks, overlap),
        bytes_as_text(),
        load("sarathi", token_budget=32),
        Limits(6, 512),
        record=records.append,
    )
    begin, patience = [5, 9, 40] * 9, {}
    for number in range(24):
        prompt = [*(begin if draw.random() < 0.5 else []), *(draw.randrange(3, 150) for _ in range(draw.choice((2, 9, 60))))]
        stop_ids = frozenset(draw.sample(range(150), 6)) if draw.random() < 0.4 else frozenset()
        how = samplings[number % len(samplings)]
        request = Request(f"r{number}", prompt, draw.choice((1, 40, 50)), stop_ids=how.stop_ids | stop_ids, sampling=how)
        request.min_tokens = how.min_tokens
        if draw.random() < 0.2:
            patience[request.id] = draw.randrange(1, 8)
        engine.submit(request)
    while engine.busy:
        for out in engine.step():
            outputs.setdefault(out.id, []).append((out.tokens, out.details is not None, out.finish_reason))
            if len(outputs[out.id]) == patience.get(out.id):
                engine.abort(out.id)
    engine.scheduler.ledger.check()
    return outputs, records


@pytest.mark.parametrize("blocks", [9, 200])
@pytest.mark.parametrize("samplings", [SAMPLINGS[:1], SAMPLINGS], ids=["greedy", "of all kinds"])
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_are_those_without_overlap(checkpoint, seed, samplings, blocks):
    expected, _ = served(checkpoint, seed, blocks, False, samplings)
    outputs, records = served(checkpoint, seed, blocks, True, samplings)
    assert expected == outputs
    assert any(b.t_plan < a.t_end for a, b in pairwise(records))
    assert {"stop", "length", "abort"} <= {f.reason for r in records for f in r.finished}
    assert (blocks == 9) == any(r.preempted for r in records)


def test_a_processor_overlaps_only_if_asked(checkpoint):
    assert (1, False) == (lambda c: (c.depth, c.overlap))(TorchExecutor(checkpoint, EXACT, 1 << 22).capacity)


def test_a_token_that_nobody_sampled_is_refused(checkpoint):
    one_way = executor(checkpoint, 64, True)
    ahead = work([UNKNOWN], 20, id="a")._replace(blocks=(0, 1))
    with pytest.raises(ValueError, match="request a: .* there is none"):
        one_way.submit(Plan(0, 0.0, (ahead,)))
    one_way.submit(Plan(0, 0.0, (work(TOKENS[:20], id="b")._replace(blocks=(0, 1)),)))
    with pytest.raises(ValueError, match="request a: .* samples none"):
        one_way.submit(Plan(1, 0.0, (ahead,)))
    assert 0 == one_way.collect().step


def test_a_token_that_is_to_come_is_refused_without_overlap(checkpoint):
    one_way = executor(checkpoint, 64, False)
    with pytest.raises(ValueError, match="vocabulary"):
        one_way.submit(Plan(0, 0.0, (work([UNKNOWN], 20)._replace(blocks=(0, 1)),)))
