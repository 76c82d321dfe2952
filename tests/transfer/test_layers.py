"""KV leaves layer by layer: what arrives is exact, it leaves while the iteration runs, and nothing that breaks gives wrong KV."""

import asyncio
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from stallfree.core.plan import UNKNOWN, StepResult
from stallfree.core.request import Request
from stallfree.executors.base import Lost
from stallfree.transfer import sending, serving
from stallfree.transfer.frames import Link, send
from stallfree.transfer.ring import Room
from tests.transfer.conftest import (
    GREEDY,
    Remembering,
    breaks,
    decoding,
    engine,
    expected,
    free,
    prefilling,
    serve,
    served_by_others,
    terms,
)
from tests.transfer.test_peers import Peer, close, done
from tests.waiting import PATIENCE_S, comes

LAYERS = 4
PROMPTS = [[(7 * i + j) % 251 for j in range(length)] for i, length in enumerate((1, 3, 4, 5, 40, 61, 100))]
EXPECTED = [expected(prompt, 6) for prompt in PROMPTS]


class Whole(Remembering):
    """A layer's KV of a token is the token, plus the layer's number, and the position. With `steps` it computes that many layers,
    and more only after `go`. It moves only whole blocks.
    """

    def __init__(self, blocks: int = 64, steps: int | None = None, overlap: bool = False):
        super().__init__(blocks, overlap=overlap)
        self.layout, self.block_bytes = "layered", LAYERS * self.block_bytes
        self.kv = np.zeros((LAYERS, *self.kv.shape), np.int64)
        self.steps = None if steps is None else threading.Semaphore(steps)

    def submit(self, plan):
        size = self.capacity.block_size
        tokens = {w.id: (self.last[w.id],) if w.tokens == (UNKNOWN,) else w.tokens for w in plan.work}
        for layer in range(LAYERS):
            steps = self.steps
            if steps is not None:
                steps.acquire()
            self.before(layer)
            for w in plan.work:
                for position, token in enumerate(tokens[w.id], w.start):
                    self.kv[layer, w.blocks[position // size], position % size] = token + layer, position
            self.after(plan, layer)
        self.last = {w.id: self.sampled(w) for w in plan.work if w.samples}
        self.results.append(StepResult(plan.step, {id: (token,) for id, token in self.last.items()}, 0.001))

    def before(self, layer):
        """Called before each layer."""

    def after(self, plan, layer):
        """Called after each layer."""

    def sampled(self, w):
        end, size = w.start + w.count, self.capacity.block_size
        seen = self.kv[:, list(w.blocks[: -(-end // size)])].reshape(LAYERS, -1, 2)[:, :end]
        for layer, kv in enumerate(seen):
            assert list(range(end)) == kv[:, 1].tolist()
            assert (seen[0, :, 0] + layer).tolist() == kv[:, 0].tolist()
        return int((seen[0, :, 0] * (seen[0, :, 1] + 7)).sum()) % 251

    def go(self):
        """Compute all layers from now on."""
        steps, self.steps = self.steps, None
        steps.release()

    def read_blocks(self, blocks, memory):
        memory[:] = self.kv[:, list(blocks)].tobytes()

    def write_blocks(self, blocks, memory):
        self.kv[:, list(blocks)] = np.frombuffer(memory, np.int64).reshape(LAYERS, len(blocks), -1, 2)


class Layered(Whole):
    """It moves single layers, too."""

    num_layers = LAYERS

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.followers = {}

    def after(self, plan, layer):
        for w in plan.work:
            if w.id in self.followers:
                self.followers[w.id](w, layer + 1)

    def follow(self, id, computed):
        if computed is None:
            self.followers.pop(id, None)
        else:
            self.followers[id] = computed

    def read_layers(self, blocks, layers, memory):
        done = Future()
        memory[:] = self.kv[layers.start : layers.stop, list(blocks)].tobytes()
        done.set_result(None)
        return done

    def write_layers(self, blocks, layers, memory):
        self.kv[layers.start : layers.stop, list(blocks)] = np.frombuffer(memory, np.int64).reshape(len(layers), len(blocks), -1, 2)


class Late(Layered):
    """Like a GPU: what a plan computes can be read only when its result is collected, in another thread."""

    def __init__(self, blocks: int = 64):
        super().__init__(blocks, overlap=True)
        self.computed = [threading.Event()]
        self.thread = ThreadPoolExecutor(1)

    def submit(self, plan):
        super().submit(plan)
        self.computed.append(threading.Event())

    def collect(self):
        self.computed.pop(0).set()
        return super().collect()

    def read_layers(self, blocks, layers, memory):
        computed = self.computed[-1]

        def wait():
            computed.wait()
            super(Late, self).read_layers(blocks, layers, memory)

        return self.thread.submit(wait)

    def close(self):
        super().close()
        self.thread.shutdown()


def pieces(monkeypatch):
    """The headers of the frames with KV that are sent from now on."""
    headers, link_send = [], Link.send

    def note(self, header, body=b"", **how):
        if header["type"] == "blocks":
            headers.append(header)
        link_send(self, header, body, **how)

    monkeypatch.setattr(Link, "send", note)
    return headers


@pytest.mark.parametrize("make", [Layered, Late])
@pytest.mark.parametrize("budget", [16, 300])
def test_tokens_are_those_of_one_engine(way, budget, make, monkeypatch):
    """Prompts in several iterations, and all in one."""
    records, sent = [], pieces(monkeypatch)
    decoder, prefiller = engine(Layered(80), records=records), engine(make(80), budget)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            tokens = await serve(thread, asks, PROMPTS)
            await comes(lambda: not prefiller.executor.followers)
            return tokens

    assert EXPECTED == asyncio.run(run())
    assert {f"r{i}" for i in range(len(PROMPTS))} == {d.id for r in records for d in r.delivered}
    assert any(0 < header["layers"] < LAYERS for header in sent)
    free(decoder)
    free(prefiller)


def test_layers_arrive_while_the_iteration_that_computes_the_prompt_runs(way, monkeypatch):
    decoder, prefiller = engine(Layered()), engine(Layered(steps=LAYERS - 1), budget=200)
    prompt = list(range(96))

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            task = asyncio.create_task(serve(thread, asks, [prompt]))
            try:
                await comes(lambda: asks.peers[0].transfers)
                transfer = next(iter(asks.peers[0].transfers.values()))
                await comes(lambda: transfer._num_bytes == 24 * 64 * (LAYERS - 1))
                assert [] == prefiller.executor.results
                kv = decoder.executor.kv[:, list(transfer._request.blocks)].reshape(LAYERS, -1, 2)
            finally:
                prefiller.executor.go()
            return kv[:, :, 0].tolist(), await task

    kv, tokens = asyncio.run(run())
    assert [[token + layer for token in prompt] for layer in range(LAYERS - 1)] == kv[:-1]
    assert [expected(prompt, 6)] == tokens


def test_small_prompts_leave_whole_and_large_ones_in_frames_of_some_layers(monkeypatch):
    sent = pieces(monkeypatch)
    decoder, prefiller = engine(Layered()), engine(Layered(), budget=200)
    monkeypatch.setattr(sending, "FRAME", 10 * prefiller.executor.block_bytes)

    async def run(length):
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            await serve(thread, asks, [list(range(length))])

    asyncio.run(run(100))
    assert [(0, 2), (2, 2)] == [(header["layer"], header["layers"]) for header in sent]
    sent.clear()
    decoder, prefiller = engine(Layered()), engine(Layered(), budget=200)
    asyncio.run(run(39))
    assert [(0, LAYERS)] == [(header["layer"], header["layers"]) for header in sent]


def test_a_prefix_that_is_here_already_is_not_sent_again():
    records = []
    decoder, prefiller = engine(Layered(), records=records), engine(Layered(), budget=200)
    first = list(range(40))
    follow = [*first, *expected(first, 6), 5, 5, 5]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return [await serve(thread, asks, [prompt]) for prompt in (first, follow)]

    assert [[expected(first, 6)], [expected(follow, 6)]] == asyncio.run(run())
    assert [10 * 64 * LAYERS, 2 * 64 * LAYERS] == [d.num_bytes for r in records for d in r.delivered]


@pytest.mark.parametrize(("prefill", "decode"), [(Whole, Layered), (Layered, Whole), (Whole, Whole)])
def test_with_an_engine_that_moves_no_layers_blocks_go_whole(prefill, decode, way, monkeypatch):
    sent, records = pieces(monkeypatch), []
    decoder, prefiller = engine(decode(), records=records), engine(prefill(), budget=200)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, PROMPTS)

    assert EXPECTED == asyncio.run(run())
    assert len(PROMPTS) == sum(len(r.delivered) for r in records)
    assert not any("layer" in header for header in sent)
    free(decoder)


def test_an_engine_whose_terms_name_no_layers_is_of_an_older_release():
    own = terms(engine(Layered()))
    assert LAYERS == own.num_layers == own.layers_with({"num_layers": LAYERS})
    assert [0] * 3 == [own.layers_with(other) for other in ({}, {"num_layers": 3}, {"num_layers": "4"})]
    assert not own.against({"model": "m", "block_size": 4, "block_bytes": 256, "layout": "layered"})


def layers(sock, header, layer, number, first=0, count=13, size=None):
    body = bytes(64 * count * number if size is None else size)
    fields = {"number": header["number"], "first": first, "count": count, "layer": layer, "layers": number}
    send(sock, {"type": "blocks"} | fields, body)


PROMPT = [i % 251 for i in range(50)]
MISDEEDS = {
    "goes in the middle of the layers": lambda sock, header: (layers(sock, header, 0, 2), close(sock)),
    "skips a layer": lambda sock, header: (layers(sock, header, 0, 1), layers(sock, header, 2, 2)),
    "repeats a layer": lambda sock, header: (layers(sock, header, 0, 2), layers(sock, header, 1, 3)),
    "begins in the middle": lambda sock, header: layers(sock, header, 2, 2),
    "sends layers that there are not": lambda sock, header: layers(sock, header, 3, 2),
    "sends no layer": lambda sock, header: layers(sock, header, 0, 0),
    "sends less than it says": lambda sock, header: layers(sock, header, 0, 2, size=64 * 13),
    "changes the blocks": lambda sock, header: (layers(sock, header, 0, 2), layers(sock, header, 2, 2, count=12)),
    "sends too many blocks": lambda sock, header: layers(sock, header, 0, 4, count=14),
    "ends before the last layer": lambda sock, header: (layers(sock, header, 0, 3), done(sock, header)),
}


@pytest.mark.parametrize("misdeed", MISDEEDS.values(), ids=MISDEEDS)
def test_layers_that_do_not_come_as_they_must_are_computed_here(misdeed, hurried):
    records = []
    decoder = engine(Layered(), records=records)

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT])

    with Peer(terms(decoder), misdeed) as peer:
        assert [expected(PROMPT, 6)] == asyncio.run(run(peer.address))
    assert ["r0"] == [id for r in records for id in r.recalled]
    free(decoder)


def test_an_engine_that_takes_only_whole_blocks_takes_no_layers(hurried):
    records = []
    decoder = engine(records=records)

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT])

    with Peer(terms(decoder), lambda sock, header: layers(sock, header, 0, 1)) as peer:
        assert [expected(PROMPT, 6)] == asyncio.run(run(peer.address))
    assert ["r0"] == [id for r in records for id in r.recalled]


@pytest.mark.parametrize("others", [0, 1])
def test_a_peer_that_goes_between_two_layers_is_replaced(others, hurried, way):
    records = []
    decoder = engine(Layered(), records=records)
    first, second = engine(Layered(steps=2), budget=200), engine(Layered(), budget=200)

    assert [EXPECTED[-1]] == served_by_others(decoder, first, second, others, PROMPTS[-1])
    assert (others, 1 - others) == (sum(len(r.delivered) for r in records), sum(len(r.recalled) for r in records))
    free(decoder)
    free(first)


def test_a_request_that_is_aborted_between_two_layers_leaves_nothing(way):
    decoder, prefiller = engine(Layered(blocks=32)), engine(Layered(steps=2), budget=200)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            outputs = thread.submit([Request("gone", PROMPTS[-1], 6, sampling=GREEDY)], transfer=asks.transfers(None))
            await comes(lambda: asks.peers[0].transfers and next(iter(asks.peers[0].transfers.values()))._num_bytes)
            outputs.close()
            prefiller.executor.go()
            answers = await serve(thread, asks, PROMPTS)
            await comes(lambda: not prefiller.busy and not prefiller.executor.followers)
            return answers

    assert EXPECTED == asyncio.run(run())
    free(decoder)
    free(prefiller)


class Breaking(Layered):
    """`error` is raised once, before the layer `at`."""

    def __init__(self, error: Exception, at: int = 2):
        super().__init__()
        self.error, self.at = error, at

    def before(self, layer):
        if layer == self.at and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize(("error", "outcome"), [(Lost("gone"), "delivered"), (RuntimeError("broken"), "recalled")])
def test_an_iteration_that_breaks_between_two_layers_gives_no_wrong_kv(error, outcome):
    """After a loss of all KV, the prefill engine computes the prompt again, and sends only the layers that it had not sent."""
    records = []
    decoder, prefiller = engine(Layered(), records=records), engine(Breaking(error), budget=200)
    prefiller._restart = True

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPTS[-1]])

    assert [EXPECTED[-1]] == asyncio.run(run())
    assert outcome == ("delivered" if any(r.delivered for r in records) else "recalled")
    free(decoder)


class Unreadable(Layered):
    """Its second read of layers fails, at once or in the future."""

    def __init__(self, *, at_once: bool):
        super().__init__()
        self.at_once, self.reads = at_once, 0

    def read_layers(self, blocks, layers, memory):
        self.reads += 1
        if self.reads != 2:
            return super().read_layers(blocks, layers, memory)
        if self.at_once:
            raise OSError("no memory")
        failed = Future()
        failed.set_exception(OSError("no memory"))
        return failed


@pytest.mark.parametrize("at_once", [True, False])
def test_layers_that_cannot_be_read_fail_their_request_and_no_other(at_once, caplog, monkeypatch):
    """And the memory that both share is free afterwards."""
    records, rooms = [], []
    decoder, prefiller = engine(Layered(), records=records), engine(Unreadable(at_once=at_once), budget=200)
    monkeypatch.setattr(serving, "Room", lambda size: rooms.append(Room(size)) or rooms[-1])

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            answers = [await serve(thread, asks, [prompt]) for prompt in (PROMPTS[-1], PROMPTS[-2])]
            await comes(lambda: not rooms[0]._taken)
            return answers

    assert [[EXPECTED[-1]], [EXPECTED[-2]]] == asyncio.run(run())
    assert (1, 1) == (sum(len(r.delivered) for r in records), sum(len(r.recalled) for r in records))
    assert "its KV could not be read: OSError" in caplog.text
    assert "is lost" not in caplog.text


@pytest.mark.parametrize("make", [Layered, Late])
def test_many_requests_with_random_aborts_and_breaks_never_get_a_wrong_token(make, hurried, way):
    """There are few blocks, so they change owners all the time."""
    rng = random.Random(0)
    decoder, prefiller = engine(Layered(80)), engine(make(60), budget=40)
    prompts = [[rng.randrange(251) for _ in range(rng.randrange(1, 120))] for _ in range(80)]
    received: dict[int, list[int]] = {}
    aborted = {number for number in range(len(prompts)) if rng.random() < 0.3}

    async def client(thread, asks, number):
        await asyncio.sleep(rng.random())
        request = Request(str(number), prompts[number], 12, arrival=number, sampling=GREEDY)
        with thread.submit([request], transfer=asks.transfers(None)) as outputs:
            tokens = received.setdefault(number, [])
            async with asyncio.timeout(rng.random() * 0.3 if number in aborted else PATIENCE_S):
                async for batch in outputs:
                    tokens += [token for output in batch for token in output.tokens]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            breaker = asyncio.create_task(breaks(asks, rng))
            await asyncio.gather(*(client(thread, asks, i) for i in range(len(prompts))), return_exceptions=True)
            breaker.cancel()
            await comes(lambda: not decoder.busy and not prefiller.busy)

    asyncio.run(run())
    assert set(range(len(prompts))) == set(received)
    for number, tokens in received.items():
        assert expected(prompts[number], 12)[: len(tokens) if number in aborted else 12] == tokens
    free(decoder)
    free(prefiller)
