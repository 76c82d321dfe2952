"""Two engines in two processes on one device: one prefills, one decodes. Are the tokens those of one engine?

    python -m gpu.transfer DEVICE

starts the engine that prefills: it prints its port, and serves until its input ends.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu.made import checkpoint, requests, served
from gpu.models import KV_BYTES, prompts, small
from tokenizers import Tokenizer
from tokenizers.models import BPE

from stallfree.core.ledger import Limits
from stallfree.core.record import StepRecord
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text
from stallfree.engine.thread import EngineThread
from stallfree.executors.sampling import GREEDY
from stallfree.executors.torch import Options, TorchExecutor
from stallfree.policies import load
from stallfree.transfer.asking import Asking
from stallfree.transfer.serving import Serving
from stallfree.transfer.terms import Terms

PATIENCE_S = 60.0
WAITING = 100
"""Requests that may wait."""


def cases(device: str, quick: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    return [("tokens, f32, prompts from another process", partial(handed, device))]


def engine(device: str, records: list[StepRecord] | None = None) -> Engine:
    """An engine in float32, where a token does not depend on its batch."""
    executor = TorchExecutor(checkpoint(small(device)), Options("f32", "f32", device=device, threads=1), KV_BYTES)
    text = Text(Tokenizer(BPE(vocab={"a": 0}, merges=[])), None, (), vocab_size=small(device).vocab_size)
    record = None if records is None else records.append
    return Engine(executor, text, load("sarathi", token_budget=128), Limits(64, 2048), record=record)


def handed(device: str) -> dict[str, Any]:
    """The share of requests with a different token, or whose prompt was not computed by the other process."""
    command = [sys.executable, "-m", "gpu.transfer", device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            records: list[StepRecord] = []
            own = engine(device, records)
            number = 6 if device == "cpu" else 32
            expected = served(own.executor, requests(prompts(device), number, [GREEDY]))
            port = other.stdout.readline() if other.stdout else ""
            if not port:
                raise RuntimeError("the process that prefills ended; its part of the log says why")
            results = asyncio.run(decode(own, int(port), requests(prompts(device), number, [GREEDY])))
        finally:
            other.kill()
    transfers = [delivered for record in records for delivered in record.delivered]
    wrong = sum(a != b for a, b in zip(results, expected, strict=True))
    missing = len(results) - len(transfers)
    return {
        "requests": len(results),
        "requests that differ": wrong,
        "computed here": missing,
        "KV, MB": sum(delivered.num_bytes for delivered in transfers) / 1e6,
        "error": (wrong + missing) / len(results),
        "limit": 0.0,
    }


async def decode(own: Engine, port: int, requests: list[Any]) -> list[list[int]]:
    """The tokens of each request; the engine at `port` computes the prompts."""
    thread = EngineThread(own, WAITING)
    asking = Asking(thread, Terms.of(own.executor, "small"), [("127.0.0.1", port)], "")
    thread.start()
    asking.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not asking.num_connected:
                await asyncio.sleep(0.05)
            tokens: dict[str, list[int]] = {request.id: [] for request in requests}
            async for outputs in thread.submit(requests, transfer=asking.transfers(None)):
                for output in outputs:
                    tokens[output.id] += output.tokens
            return [tokens[request.id] for request in requests]
    finally:
        asking.close()
        await thread.close(0)


async def prefill(device: str) -> None:
    own = engine(device)
    thread = EngineThread(own, WAITING)
    thread.start()
    sock = socket.create_server(("127.0.0.1", 0))
    serving = Serving(thread, Terms.of(own.executor, "small"), sock, "")
    serving.start()
    print(sock.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    serving.close()
    await thread.close(0)


if __name__ == "__main__":
    asyncio.run(prefill(sys.argv[1]))
