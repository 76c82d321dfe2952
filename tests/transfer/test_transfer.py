"""A prompt is computed in one engine and continued in another: the tokens are those of one engine, whatever breaks in between."""

import asyncio
import random

import pytest

from stallfree.core.request import Request, Status
from stallfree.core.slo import Slo
from tests.transfer.conftest import (
    GREEDY,
    Remembering,
    breaks,
    decoding,
    engine,
    expected,
    free,
    prefilling,
    read,
    serve,
    served_by_others,
)
from tests.waiting import PATIENCE_S, comes

PROMPTS = [[(7 * i + j) % 251 for j in range(length)] for i, length in enumerate((1, 3, 4, 5, 40, 61, 100))]
EXPECTED = [expected(prompt, 6) for prompt in PROMPTS]


def test_tokens_are_those_of_one_engine(way):
    records = []
    decoder, prefiller = engine(records=records), engine()

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            assert (way == "shared memory") == (asks.peers[0].ring is not None)
            return await serve(thread, asks, PROMPTS)

    assert EXPECTED == asyncio.run(run())
    assert {f"r{i}" for i in range(len(PROMPTS))} == {d.id for r in records for d in r.delivered}
    preempted = {id for r in records for id in r.preempted}  # preempted prompts are computed here again, as anywhere
    computed = [work for r in records for work in r.work if work[2] > 1 and work[0] not in preempted]
    assert not computed, "a prompt was computed in the engine that decodes"
    free(decoder)
    free(prefiller)


def test_a_prefix_that_is_here_already_is_not_sent_again():
    records = []
    decoder, prefiller = engine(records=records), engine()
    first = list(range(40))
    follow = [*first, *expected(first, 6), 5, 5, 5]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return [await serve(thread, asks, [prompt]) for prompt in (first, follow)]

    assert [[expected(first, 6)], [expected(follow, 6)]] == asyncio.run(run())
    transfers = [d for r in records for d in r.delivered]
    assert [0, 44] == [d.cached for d in transfers]
    assert [10 * 64, 2 * 64] == [d.num_bytes for d in transfers]


def test_blocks_go_while_the_prompt_is_still_being_computed(way):
    decoder, prefiller = engine(), engine(Remembering(turns=3))

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            task = asyncio.create_task(serve(thread, asks, [PROMPTS[-1]]))
            await comes(lambda: asks.peers[0].transfers and next(iter(asks.peers[0].transfers.values()))._num_bytes)
            assert not prefiller.scheduler.ledger.running[0].output
            prefiller.executor.go()
            return await task

    assert [EXPECTED[-1]] == asyncio.run(run())


def test_what_does_not_fit_the_shared_memory_goes_by_the_connection(monkeypatch):
    from stallfree.transfer import ring

    monkeypatch.setattr(ring.Ring.__init__, "__defaults__", (500,))
    decoder, prefiller = engine(), engine(budget=100)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, PROMPTS)

    assert EXPECTED == asyncio.run(run())


def test_without_room_nothing_is_asked_and_all_are_served_in_the_end():
    decoder, prefiller = engine(Remembering(blocks=20)), engine()
    prompts = [list(range(i, i + 50)) for i in range(6)]
    counts = []

    class Transfers(dict):
        def __setitem__(self, number, transfer):
            super().__setitem__(number, transfer)
            counts.append(len(self))

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            asks.peers[0].transfers = Transfers()
            return await serve(thread, asks, prompts)

    assert [expected(prompt, 6) for prompt in prompts] == asyncio.run(run())
    assert [1] * len(prompts) == counts
    free(decoder)


def test_a_request_that_is_aborted_is_aborted_there_and_its_late_blocks_go_nowhere(way):
    decoder, prefiller = engine(Remembering(blocks=32)), engine(Remembering(turns=2))

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            outputs = thread.submit([Request("gone", PROMPTS[-1], 6, sampling=GREEDY)], transfer=asks.transfers(None))
            await comes(lambda: prefiller.scheduler.ledger.running)
            outputs.close()
            prefiller.executor.go()
            answers = await serve(thread, asks, PROMPTS)
            await comes(lambda: not prefiller.busy)
            return answers

    assert EXPECTED == asyncio.run(run())
    free(decoder)
    free(prefiller)


def test_without_a_peer_the_prompt_is_computed_here():
    records = []
    decoder = engine(records=records)

    async def run():
        async with decoding(decoder, ("127.0.0.1", 1), wait=False) as (thread, asks):
            return await serve(thread, asks, PROMPTS)

    assert EXPECTED == asyncio.run(run())
    assert {f"r{i}" for i in range(len(PROMPTS))} == {id for r in records for id in r.recalled}
    free(decoder)


@pytest.mark.parametrize("others", [0, 1])
def test_a_peer_that_goes_is_replaced(others, hurried, caplog):
    records = []
    decoder = engine(records=records)
    first, second = engine(Remembering(turns=3)), engine()

    assert [EXPECTED[-1]] == served_by_others(decoder, first, second, others, PROMPTS[-1])
    assert (others, 1 - others) == (sum(len(r.delivered) for r in records), sum(len(r.recalled) for r in records))
    assert "its KV transfer failed" in caplog.text
    free(decoder)
    free(first)


def test_a_peer_that_comes_back_is_asked_again(retried, caplog):
    records = []
    decoder, prefiller = engine(records=records), engine()

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            first = asks.peers[0].link
            assert "connected" not in caplog.text
            first.close()
            await comes(lambda: asks.peers[0].link not in (None, first))
            assert 1 == caplog.text.count("is connected again")
            return await serve(thread, asks, PROMPTS)

    assert EXPECTED == asyncio.run(run())
    assert [] == [id for r in records for id in r.recalled]


def test_an_engine_that_loses_its_kv_computes_what_was_on_its_way(caplog):
    from stallfree.executors.base import Lost

    decoder, prefiller = engine(Remembering(turns=2)), engine(Remembering(turns=4))
    decoder._restart = True

    def lose():
        """All of it in the engine's thread, which goes on at once."""
        decoder.executor.results.clear()
        del decoder.executor.collect
        raise Lost("gone")

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            task = asyncio.create_task(serve(thread, asks, [PROMPTS[4], PROMPTS[-1]], 30))
            await comes(lambda: any(r.output for r in decoder.scheduler.ledger.running) and decoder.prefetch.under_way)
            decoder.executor.collect = lose
            decoder.executor.go()
            await comes(lambda: not decoder.prefetch.under_way)
            prefiller.executor.go()
            return await task

    assert [expected(PROMPTS[4], 30), expected(PROMPTS[-1], 30)] == asyncio.run(run())
    free(decoder)


@pytest.mark.parametrize("overlap", [False, True])
def test_many_requests_with_random_aborts_and_breaks_never_get_a_wrong_token(hurried, way, overlap):
    """There are few blocks, so they change owners all the time."""
    rng = random.Random(0)
    decoder, prefiller = (engine(Remembering(blocks, overlap=overlap)) for blocks in (80, 60))
    other = engine(Remembering(overlap=overlap))
    prompts = [[rng.randrange(251) for _ in range(rng.randrange(1, 120))] for _ in range(120)]
    received: dict[int, list[int]] = {}
    whole: set[int] = set()

    async def client(thread, asks, number):
        await asyncio.sleep(rng.random())
        aborted = rng.random() < 0.3
        if not aborted:
            whole.add(number)
        request = Request(str(number), prompts[number], 12, arrival=number, sampling=GREEDY)
        with thread.submit([request], transfer=asks.transfers(None)) as outputs:
            tokens = received.setdefault(number, [])
            async with asyncio.timeout(rng.random() * 0.3 if aborted else PATIENCE_S):
                async for batch in outputs:
                    tokens += [token for output in batch for token in output.tokens]

    async def run():
        async with prefilling(prefiller) as a, prefilling(other) as b, decoding(decoder, a, b) as (thread, asks):
            breaker = asyncio.create_task(breaks(asks, rng))
            await asyncio.gather(*(client(thread, asks, i) for i in range(len(prompts))), return_exceptions=True)
            breaker.cancel()
            await comes(lambda: not decoder.busy and not prefiller.busy and not other.busy)

    asyncio.run(run())
    assert set(range(len(prompts))) == set(received)
    for number, tokens in received.items():
        assert expected(prompts[number], 12)[: 12 if number in whole else len(tokens)] == tokens
    assert 0 < len(whole) < len(prompts)
    for each in (decoder, prefiller, other):
        free(each)


def test_a_prompt_is_computed_for_its_tenant_and_in_its_class():
    decoder, prefiller = engine(), engine(Remembering(turns=1))
    slo = Slo.parse("ttft=1s,tbt=50ms")
    request = Request("a", PROMPTS[-1], 6, priority=2, sampling=GREEDY)
    request.tenant, request.weight, request.service_class, request.slo = "acme", 3.0, "interactive", slo

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            task = asyncio.create_task(read(thread.submit([request], transfer=asks.transfers(None))))
            await comes(lambda: prefiller.scheduler.ledger.running)
            (there,) = prefiller.scheduler.ledger.running
            prefiller.executor.go()
            await task
            return there.tenant, there.weight, there.service_class, there.slo, there.priority

    assert ("acme", 3.0, "interactive", slo, 2) == asyncio.run(run())


def test_a_first_token_can_be_the_last(way):
    decoder, prefiller = engine(), engine()
    stop = EXPECTED[4][0]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            short = Request("a", PROMPTS[4], 1, sampling=GREEDY)
            stopped = Request("b", PROMPTS[4], 9, stop_ids=frozenset({stop}), sampling=GREEDY)
            outputs = await read(thread.submit([short, stopped], transfer=asks.transfers(None)))
            await comes(lambda: not decoder.busy)
            assert Status.FINISHED is short.status
            return {(o.id, o.tokens, o.finish_reason) for o in outputs}

    assert {("a", (stop,), "length"), ("b", (stop,), "stop")} == asyncio.run(run())
    free(decoder)
