"""Engines whose tokens depend on every byte of KV, in one process: one prefills, one decodes."""

import asyncio
import contextlib
import socket
import threading

import numpy as np
import pytest

from stallfree import policies
from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import UNKNOWN, Capacity, StepResult
from stallfree.core.request import Request
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.thread import EngineThread
from stallfree.executors.sampling import Sampling
from stallfree.transfer import asking, frames, ring, sending
from stallfree.transfer.asking import Asking
from stallfree.transfer.serving import Serving
from stallfree.transfer.terms import Terms
from tests.models import write_folder
from tests.waiting import comes

GREEDY = Sampling(temperature=0)
LAYERS = 3
"""Of the model of torch engines."""
PROMPTS = [[(7 * i + j) % 256 for j in range(length)] for i, length in enumerate((1, 16, 17, 100, 150))]


class Remembering:
    """The KV of a token is the token and its position; a sampled one is a digest of all KV before it, read back from the blocks.

    With `overlap` a plan is computed when it is submitted, and its result appears when it is collected, as on a GPU. With `turns`
    it does that many iterations, and more only after `go`, so that a test can look on however slow the machine is.
    """

    def __init__(self, blocks: int = 64, block_size: int = 4, turns: int | None = None, overlap: bool = False):
        self.capacity = Capacity(block_size, blocks, 512, 1 + overlap, overlap)
        self.layout, self.block_bytes = "remembering", block_size * 16
        self.kv = np.zeros((blocks, block_size, 2), np.int64)
        self.turns = None if turns is None else threading.Semaphore(turns)
        self.results = []
        self.last = {}

    def submit(self, plan):
        sampled = {}
        size = self.capacity.block_size
        for w in plan.work:
            tokens = (self.last[w.id],) if w.tokens == (UNKNOWN,) else w.tokens
            for position, token in enumerate(tokens, w.start):
                self.kv[w.blocks[position // size], position % size] = token, position
            if w.samples:
                end = w.start + w.count
                seen = self.kv[list(w.blocks[: -(-end // size)])].reshape(-1, 2)[:end]
                assert list(range(end)) == seen[:, 1].tolist()
                sampled[w.id] = int((seen[:, 0] * (seen[:, 1] + 7)).sum()) % 251
        self.last = sampled
        self.results.append(StepResult(plan.step, {id: (token,) for id, token in sampled.items()}, 0.001))

    def collect(self):
        if self.turns is not None:
            self.turns.acquire()
        return self.results.pop(0)

    def go(self):
        """Do all iterations from now on."""
        turns, self.turns = self.turns, None
        turns.release()

    def read_blocks(self, blocks, memory):
        memory[:] = self.kv[list(blocks)].tobytes()

    def write_blocks(self, blocks, memory):
        self.kv[list(blocks)] = np.frombuffer(memory, np.int64).reshape(len(blocks), -1, 2)

    def close(self):
        self.results.clear()


def expected(prompt, max_tokens: int) -> list[int]:
    """The tokens of one engine alone."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(sum(token * (position + 7) for position, token in enumerate(tokens)) % 251)
    return tokens[len(prompt) :]


def engine(executor=None, budget: int = 16, records=None) -> Engine:
    return Engine(
        executor or Remembering(),
        bytes_as_text(),
        policies.load("sarathi", token_budget=budget),
        record=None if records is None else records.append,
    )


def terms(engine: Engine, transfer_kv: str = "same") -> Terms:
    return Terms.of(engine.executor, "m", transfer_kv)


@contextlib.asynccontextmanager
async def prefilling(engine: Engine, key: str = "", port: int = 0, transfer_kv: str = "same"):
    """An engine that prefills, and its address."""
    thread = EngineThread(engine, 100)
    thread.start()
    sock = socket.create_server(("127.0.0.1", port))
    serving = Serving(thread, terms(engine, transfer_kv), sock, key)
    serving.start()
    try:
        yield sock.getsockname()[:2]
    finally:
        serving.close()
        await thread.close(0)


@contextlib.asynccontextmanager
async def decoding(engine: Engine, *addresses, key: str = "", wait: bool = True, transfer_kv: str = "same"):
    """An engine that asks those at `addresses`, once it is connected to them."""
    thread = EngineThread(engine, 100)
    asks = Asking(thread, terms(engine, transfer_kv), addresses, key)
    thread.start()
    asks.start()
    try:
        await comes(lambda: not wait or all(peer.link for peer in asks.peers))
        yield thread, asks
    finally:
        asks.close()
        await thread.close(0)


async def read(outputs) -> list:
    return [output async for batch in outputs for output in batch]


async def serve(thread, asks, prompts, max_tokens: int = 6) -> list[list[int]]:
    """The tokens of each prompt, all at once."""
    requests = [Request(f"r{i}", prompt, max_tokens, arrival=i, sampling=GREEDY) for i, prompt in enumerate(prompts)]
    outputs = await read(thread.submit(requests, transfer=asks.transfers(None)))
    return [[token for o in outputs if o.id == r.id for token in o.tokens] for r in requests]


async def breaks(asks, rng) -> None:
    """Break the connection to a peer, ten times a second."""
    while True:
        await asyncio.sleep(0.1)
        link = rng.choice(asks.peers).link
        if link is not None:
            link.close()


def served_by_others(decoder, first, second, others: int, prompt) -> list[list[int]]:
    """The tokens of a prompt whose peer goes when some of its KV has come. `others`: how many peers are left then."""

    async def run():
        async with (
            prefilling(second) as spare,
            prefilling(first) as address,
            decoding(decoder, address, *[spare] * others) as (thread, asks),
        ):
            task = asyncio.create_task(serve(thread, asks, [prompt]))
            await comes(lambda: asks.peers[0].transfers and next(iter(asks.peers[0].transfers.values()))._num_bytes)
            asks.peers[0].link.close()
            first.executor.go()
            return await task

    return asyncio.run(run())


def free(engine: Engine) -> None:
    """Nothing is left: every block is free."""
    engine.scheduler.ledger.check()
    assert engine.executor.capacity.num_blocks == engine.scheduler.ledger.pool.num_free
    assert engine.prefetch.idle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model for torch engines."""
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama", vocab_size=256, num_hidden_layers=LAYERS)
    return open_checkpoint(folder)


@pytest.fixture(params=["shared memory", "tcp"])
def way(request, monkeypatch):
    """How blocks are transferred."""
    if request.param == "tcp":
        monkeypatch.setattr(ring, "FOLDER", ring.Path("/nonexistent"))
    return request.param


@pytest.fixture(autouse=True)
def small_frames(monkeypatch):
    """Two blocks fill a frame."""
    monkeypatch.setattr(sending, "FRAME", 2 * Remembering().block_bytes)


@pytest.fixture
def retried(monkeypatch):
    """A peer that is gone is tried again at once."""
    monkeypatch.setattr(asking, "RETRY_S", 0.05)


@pytest.fixture
def hurried(monkeypatch, retried):
    """Shortens waits that otherwise take seconds. A machine that stops for longer than this silence loses its peers."""
    monkeypatch.setattr(frames, "ALIVE_S", 0.05)
    monkeypatch.setattr(frames, "SILENCE_S", 1.5)
