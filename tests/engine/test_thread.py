"""The engine in its thread: every request is answered or refused with a reason, and leaves no KV behind."""

import asyncio
import contextlib
import logging

import pytest

from stallfree import policies
from stallfree.core.plan import Capacity
from stallfree.core.request import Refused, Request
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.thread import EngineThread, Unavailable
from stallfree.executors.simulated import Linear, SimulatedExecutor
from tests.waiting import PATIENCE_S, comes


class Nothing:
    """A policy that plans no work."""

    reserve = "chunk"

    def plan(self, draft):
        pass


def request(id: str = "r", prompt: int = 4, max_tokens: int = 5) -> Request:
    return Request(id, [1] * prompt, max_tokens)


@contextlib.asynccontextmanager
async def started(policy=None, iteration_s: float = 0.0, max_queue: int = 10):
    executor = SimulatedExecutor(Capacity(16, 64, 1024), [97, 98, 99], Linear(iteration_s, 0.0, 0.0))
    thread = EngineThread(Engine(executor, bytes_as_text(), policy or policies.load("sarathi", token_budget=32)), max_queue)
    thread.start()
    try:
        yield thread
    finally:
        await thread.close(0)


async def read(outputs) -> list:
    return [output async for batch in outputs for output in batch]


def test_the_outputs_of_all_requests_come_until_all_have_ended():
    async def run():
        async with started() as thread:
            return await read(thread.submit([request("a"), request("b", max_tokens=2)]))

    outputs = asyncio.run(run())
    assert (5, 2) == tuple(sum(len(o.tokens) for o in outputs if o.id == id) for id in "ab")
    assert {("a", "length"), ("b", "length")} == {(o.id, o.finish_reason) for o in outputs if o.finish_reason}


def test_iterations_that_only_prefill_are_no_reason_to_stop():
    async def run():
        async with started() as thread:
            return await read(thread.submit([request(prompt=500)]))

    assert 5 == len(asyncio.run(run()))


def test_what_piled_up_comes_at_once():
    async def run():
        async with started() as thread:
            outputs = thread.submit([request(max_tokens=20)])
            await comes(lambda: not thread.engine.busy and not thread._streams)
            return [len(batch) async for batch in outputs]

    assert [20] == asyncio.run(run())


def test_closing_aborts_wakes_the_reader_and_frees_the_kv():
    async def run():
        async with started(iteration_s=0.01) as thread:
            requests = [request(max_tokens=900), request("s", max_tokens=900)]
            outputs = thread.submit(requests)
            received = []

            async def reads():
                async for batch in outputs:
                    received.extend(batch)

            reader = asyncio.create_task(reads())
            await comes(lambda: {"r", "s"} == {o.id for o in received})
            outputs.close()
            async with asyncio.timeout(PATIENCE_S):
                await reader
            assert {None} == {o.finish_reason for o in received}
            await comes(lambda: not thread.engine.busy)
            assert ["abort", "abort"] == [request.finish_reason for request in requests]
            thread.engine.scheduler.ledger.check()
            return thread.engine.scheduler.ledger.pool.num_free

    assert 64 == asyncio.run(run())


def test_a_full_queue_takes_none_of_the_requests():
    async def run():
        async with started(iteration_s=0.05, max_queue=3) as thread:
            with thread.submit([request("a"), request("b")]):
                with pytest.raises(Unavailable) as full:
                    thread.submit([request("c"), request("d")])
                assert 2 == len(thread._streams)
                return full.value.retry_after

    assert 1 == asyncio.run(run())


def test_what_can_never_be_served_is_refused():
    async def run():
        async with started(max_queue=3) as thread:
            with pytest.raises(Refused, match="more than the queue holds"):
                thread.submit([request(str(i)) for i in range(4)])
            with pytest.raises(Refused, match="the prompt has 2000 tokens"):
                thread.submit([request("a"), request("b", prompt=2000)])
            assert 0 == len(thread._streams)

    asyncio.run(run())


def test_draining_lets_requests_finish_and_takes_no_new_ones():
    async def run():
        async with started(iteration_s=0.01) as thread:
            reader = asyncio.create_task(read(thread.submit([request(max_tokens=20)])))
            closing = asyncio.create_task(thread.close(PATIENCE_S))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable) as refused:
                thread.submit([request("late")])
            await closing
            return refused.value.retry_after, (await reader)[-1].finish_reason

    assert (None, "length") == asyncio.run(run())


def test_requests_that_outlast_the_drain_end_in_an_error(caplog):
    async def run():
        async with started(iteration_s=0.01) as thread:
            outputs = thread.submit([request(max_tokens=900)])
            await thread.close(0.05)
            return (await read(outputs))[-1]

    last = asyncio.run(run())
    assert ("abort", "the server is shutting down") == (last.finish_reason, last.error)
    assert "1 requests unfinished" in caplog.text


def test_a_policy_that_plans_nothing_fails_the_engine_instead_of_hanging(caplog):
    async def run():
        async with started(policy=Nothing()) as thread:
            (last,) = await read(thread.submit([request()]))
            with pytest.raises(Unavailable, match="restart"):
                thread.submit([request("s")])
            return last

    with caplog.at_level(logging.CRITICAL):
        last = asyncio.run(run())
    assert "error" == last.finish_reason
    assert "plans no work" in last.error
