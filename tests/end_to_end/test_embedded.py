"""The whole embedded model: its answer is right, and its greedy tokens do not depend on the batch.

Exactness is a promise of f32 weights and KV. Products of lower precision round differently in different batch sizes.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from stallfree import LLM
from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.request import Request
from stallfree.engine.assemble import Options, assemble
from stallfree.engine.engine import Engine
from stallfree.executors.sampling import Sampling
from stallfree.policies import load
from tests.adapters import made_adapter

PROMPTS = [
    "Once upon a time, in a small village by the sea, there lived an old fisherman who had never caught a single fish. " * 3,
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
]


@pytest.fixture(scope="module")
def exact() -> Engine:
    return assemble(Options(weights="f32", kv="f32", kv_memory=256 << 20, max_model_len=512)).engine


class Smaller:
    """An executor that reports fewer KV blocks than it holds."""

    def __init__(self, executor, num_blocks):
        self.capacity = replace(executor.capacity, num_blocks=num_blocks)
        self.submit, self.collect, self.close = executor.submit, executor.collect, executor.close


def outputs(
    engine: Engine, policy: str = "sarathi", budget: int | None = None, num_blocks: int | None = None, one_by_one: bool = False
):
    """The output tokens of each prompt, and how often one was preempted."""
    executor = engine.executor if num_blocks is None else Smaller(engine.executor, num_blocks)
    fresh = Engine(executor, engine.text, load(policy, token_budget=budget), reuse=False)
    sampling = Sampling(temperature=0)
    requests = [Request(str(i), engine.text.encode(p), 24, arrival=i, sampling=sampling) for i, p in enumerate(PROMPTS)]
    for request in requests:
        fresh.submit(request)
        while one_by_one and fresh.busy:
            fresh.step()
    while fresh.busy:
        fresh.step()
    fresh.scheduler.ledger.check()
    assert {"length"} == {r.finish_reason for r in requests}
    return [r.output for r in requests], sum(r.num_preemptions for r in requests)


@pytest.fixture(scope="module")
def alone(exact):
    return outputs(exact, "orca", one_by_one=True)[0]


def test_greedy_tokens_are_the_same_batched_and_alone(exact, alone):
    assert alone == outputs(exact, "orca")[0]


@pytest.mark.parametrize("budget", [5, 32])
def test_greedy_tokens_are_the_same_chunked_and_whole(exact, alone, budget):
    assert alone == outputs(exact, "sarathi", budget)[0]


def test_greedy_tokens_are_the_same_after_preemption(exact, alone):
    tokens, preemptions = outputs(exact, "sarathi", 32, num_blocks=6)
    assert alone == tokens
    assert preemptions > 0


def test_greedy_tokens_are_the_same_with_prefixes_shared(exact, alone):
    engine = Engine(exact.executor, exact.text, load("sarathi"))
    outputs = []
    for turn in range(2):
        requests = [
            Request(f"{turn}.{i}", exact.text.encode(p), 24, sampling=Sampling(temperature=0)) for i, p in enumerate(PROMPTS)
        ]
        for request in requests:
            engine.submit(request)
        while engine.busy:
            engine.step()
        outputs.append([r.output for r in requests])
    assert requests[0].num_cached > 0
    assert [alone, alone] == outputs


@pytest.fixture(scope="module")
def llm():
    with LLM(kv_memory=256 << 20) as llm:
        yield llm


def test_the_default_configuration_knows_the_capital_of_france(llm):
    assert "Paris" in llm.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=30)


def test_a_seed_gives_the_same_text_again_and_another_seed_another(llm):
    texts = [llm.generate("My favourite", max_tokens=30, temperature=1.0, seed=seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_left_early_frees_its_kv(llm):
    stream = llm.stream("Count to a thousand: 1 2 3", max_tokens=200, temperature=0)
    next(stream)
    stream.close()
    scheduler = llm._engine.scheduler
    scheduler.ledger.check()
    assert scheduler.ledger.capacity.num_blocks == scheduler.ledger.pool.num_free


def test_a_stop_string_ends_the_text_before_it(llm):
    (done,) = llm.generate(["The capital of France is"], max_tokens=30, temperature=0, stop=["Paris"])
    assert ("stop", " ") == (done.finish_reason, done.text)


def test_an_unknown_sampling_argument_is_a_type_error(llm):
    with pytest.raises(TypeError, match="'temprature'"):
        llm.generate("x", temprature=1)


def test_generate_answers_with_an_adapter(tmp_path):
    checkpoint = open_checkpoint(locate(None, lambda _: None))
    folder = made_adapter(tmp_path / "a", checkpoint.config, rank=8)
    command = [
        sys.executable,
        "-m",
        "stallfree",
        "generate",
        "The capital of France is",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
    ]
    done = [subprocess.run([*command, *more], capture_output=True, check=True) for more in ((), ("--adapter", f"x={folder}"))]
    assert done[0].stdout != done[1].stdout


def test_generate_prints_a_result_as_json():
    command = [
        sys.executable,
        "-m",
        "stallfree",
        "generate",
        "The capital of France is",
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--json",
    ]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ("length", 5, True) == (result["finish_reason"], len(result["tokens"]), "Paris" in result["text"])
