"""Records of requests whose prompts another engine computed."""

import asyncio

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Run, StepRecord
from stallfree.metrics.explain import Explained
from stallfree.metrics.timeline import timelines
from stallfree.sim.replay import difference
from tests.transfer.conftest import decoding, engine, prefilling, serve

RUN = Run("sarathi", Capacity(4, 64, 512), Limits(), reuse=False)


@pytest.fixture(scope="module")
def records() -> list[StepRecord]:
    lines: list[StepRecord] = []

    async def run():
        async with prefilling(engine()) as address, decoding(engine(records=lines), address) as (thread, asks):
            await serve(thread, asks, [range(40), range(90)])

    asyncio.run(run())
    return lines


def test_a_line_is_read_back(records):
    assert records == [StepRecord.from_json(r.to_json()) for r in records]


def test_the_first_token_came_before_the_iteration_that_decodes(records):
    lines = timelines(records)
    assert {"r0": 6, "r1": 6} == {id: len(line.tokens) for id, line in lines.items()}
    for line in lines.values():
        assert line.scheduled < line.tokens[0] < line.tokens[1] <= line.finished
        assert line.tokens == sorted(line.tokens)


def test_it_is_explained(records):
    explanation = Explained(RUN, records)
    whole = "\n".join(explanation.on_the_whole())
    assert "2 requests arrived and got 12 tokens" in whole
    assert "2 prompts computed by other engines; 0 computed here after a KV transfer failed." in whole
    text = "\n".join(explanation.request("r0"))
    assert "Its prompt was computed by another engine" in text
    assert "640 bytes of KV" in text
    assert "6 tokens in all" in text
    first = next(r for r in records if r.delivered)
    assert "KV transfers delivered since the step before: r0" in "\n".join(explanation.step(first.step)).replace("r1, r0", "r0")


def test_a_prompt_that_did_not_come_is_explained():
    lines: list[StepRecord] = []

    async def run():
        async with decoding(engine(records=lines), ("127.0.0.1", 1), wait=False) as (thread, asks):
            await serve(thread, asks, [range(40)])

    asyncio.run(run())
    explanation = Explained(RUN, lines)
    assert "0 prompts computed by other engines; 1 computed here after a KV transfer failed." in list(explanation.on_the_whole())
    sentences = list(explanation.request("r0"))
    at = sentences.index("Its KV transfer failed, so this engine computed its prompt.")
    assert sentences[at + 1].startswith("It waited")


def test_a_replay_says_that_it_cannot(records):
    with pytest.raises(ValueError, match="transferred by another engine"):
        difference(RUN, records)
