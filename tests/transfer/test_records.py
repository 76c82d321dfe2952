"""Records of requests whose prompts another engine computed."""

import asyncio
from itertools import pairwise

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Run, StepRecord
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.metrics.explain import Explained
from stallfree.metrics.stalls import StallAccount
from stallfree.metrics.timeline import timelines
from stallfree.sim.replay import difference
from stallfree.transfer.cut import Cut
from tests.transfer.conftest import GREEDY, decoding, engine, prefilling, read, serve

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


def cut_at(*cuts: int, max_tokens: int = 9) -> list[StepRecord]:
    """The records of requests of 40 tokens, cut at these."""
    lines: list[StepRecord] = []

    async def run():
        async with prefilling(engine()) as address, decoding(engine(records=lines), address) as (thread, asks):
            for number, cut in enumerate(cuts):
                prompt = [number, *range(39)]
                request = Request(f"r{number}", prompt, max_tokens, arrival=thread.engine.clock(), sampling=GREEDY)
                await read(thread.submit([request], transfer=asks.transfers(None, Cut(cut))))

    asyncio.run(run())
    return lines


def test_a_part_brings_no_token_and_shown_tokens_are_counted_once():
    records = cut_at(20, 40, 45, 2)
    assert records == [StepRecord.from_json(r.to_json()) for r in records]
    lines = timelines(records)
    assert [9] * 4 == [len(line.tokens) for line in lines.values()]
    for line in lines.values():
        assert line.scheduled <= line.tokens[0] < line.tokens[-1] <= line.finished
        assert line.tokens == sorted(line.tokens)
    assert [("r0", 20), ("r1", None), ("r2", None), ("r3", 2)] == [(d.id, d.cut) for r in records for d in r.delivered]
    assert ["r2"] * 5 == [id for r in records for id, _ in r.shown]
    account, gaps, ttfts = StallAccount(Slo.parse("ttft=100s,tbt=100s")), [], []
    ended = []
    for record in records:
        account.record(record)
        gaps += account.gaps
        ttfts += account.ttfts
        ended += account.ended
    assert (4, 4 * 8) == (len(ttfts), len(gaps))
    assert [(9, True)] * 4 == [(each.output_tokens, each.in_time) for each in ended]


def test_a_token_that_comes_late_from_elsewhere_is_late_and_nobody_here_is_blamed():
    records = cut_at(45)
    shown = [(id, t) for r in records for id, t in r.shown]
    slowest = max(b - a for (_, a), (_, b) in pairwise(shown))
    account = StallAccount(Slo.parse(f"tbt={0.9 * slowest}s"))
    stalls = [stall for record in records for stall in account.record(record) if stall.t in [t for _, t in shown]]
    assert stalls
    assert {("late", "unexpected", ())} == {(stall.kind, stall.cause, stall.culprits) for stall in stalls}


def test_cuts_are_explained():
    records = cut_at(20, 45, 1)
    explanation = Explained(RUN, records)
    whole = "\n".join(explanation.on_the_whole())
    assert "3 requests arrived and got 27 tokens" in whole
    assert "3 prompts computed by other engines, 2 of them in part; 0 computed here" in whole
    assert "5 tokens of other engines shown while KV was on its way." in whole
    part, first, one = ("\n".join(explanation.request(id)) for id in ("r0", "r1", "r2"))
    assert "The first 20 tokens of its prompt were computed by another engine" in part
    assert "The first 1 token of its prompt was computed by another engine" in one
    assert "Another engine sampled its first 5 tokens while KV was on its way." in first
    assert "9 tokens in all" in first
    step = next(r.step for r in records if r.shown)
    assert "Tokens of other engines shown since the step before: r1" in "\n".join(explanation.step(step))


def test_a_request_that_ended_in_its_first_tokens_is_explained():
    records = cut_at(45, 2, max_tokens=3)
    assert ["r0"] * 3 == [id for r in records for id, _ in r.shown]
    sentences = list(Explained(RUN, records).request("r0"))
    assert "Another engine sampled its first 3 tokens while KV was on its way." in sentences
    assert not any("never scheduled" in sentence for sentence in sentences)
    with pytest.raises(ValueError, match="transferred by another engine"):
        difference(RUN, records)
