"""Does the server stay whole under whatever clients send? Many requests with fuzzed parameters, while the server is stopped now and
then for half a second. A third of the requests are for long answers and are given up within 0.3 s, wherever they are by then.

Two runs over HTTP: on the simulated executor, which here sleeps for nothing, and on the embedded model. Counted, all
to be 0: ends of the engine (/health, or a connection refused), answers with status 500, KV blocks that are not free once all
requests have ended, and greedy answers that differ from what the same request got with the server to itself (every 50th request
on the embedded model is greedy and is sent again, alone, afterwards). Memory: what the server's process and those that read
bodies for it hold (resident) in the end, over what they held after a tenth of the requests; limit 1.05. Two caches are bounded, and
would look like a leak until they are full: the KV cache is kept so small that a tenth of the requests touches all of it, and the
tokenizers' caches of words, of which the simulated model's are whole texts, are off.

In bfloat16 and int8 another batch may change the last bits of a logit, so two nearly equal tokens may change places. An answer
counts as wrong if, at its first token that differs, the lone run gives that token a log-probability more than 0.2 below its own
choice's. After that token the two texts are different ones, and are not compared.

    python benchmarks/soak.py
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import inf
from pathlib import Path
from typing import Any, cast

import aiohttp
from harness import machine, parser, show

from stallfree.bench.server import server

IN_FLIGHT = 64
ABORTED = 1 / 3
STOP_EVERY_S, STOP_S = 20.0, 0.5
GREEDY_EVERY = 50
"""On the embedded model: one request in so many is greedy, and looked at again."""
TIE = 0.2
"""Nats between two tokens that another batch may swap."""
LIMIT_MEMORY = 1.05
KV_MEMORY = "64MiB"


def fuzzed(rng: random.Random, vocabulary: int, *, lasting: bool = False) -> tuple[str, dict[str, Any]]:
    """A route and a body, most of them such as are served; one in ten has something that is refused. `lasting`: for a long answer,
    and not refused."""
    words = ["sea", "moon", "ß", "한", "\U0001f600", "def f(x):", "  ", "\n", "<|im_end|>", "1234", "e\u0301", "\x00", "token"]
    text = " ".join(rng.choices(words, k=rng.choice([1, 5, 30, 300])))
    ids = [rng.randrange(vocabulary) for _ in range(rng.choice([1, 20, 200]))]
    body: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 8, 24]), "stream": rng.random() < 0.6}
    chances: dict[str, Any] = {
        "temperature": rng.choice([0, 0.2, 1, 2]),
        "top_p": rng.choice([0.1, 0.9, 1]),
        "top_k": rng.choice([-1, 1, 50, 5000]),
        "min_p": rng.choice([0, 0.1, 1]),
        "presence_penalty": rng.choice([-2, 2]),
        "frequency_penalty": rng.choice([-2, 2]),
        "repetition_penalty": rng.choice([0.5, 1.3]),
        "n": rng.choice([1, 2, 3]),
        "seed": rng.randrange(-(2**40), 2**40),
        "stop": rng.choice(["a", ["\n", "e "], [" "]]),
        "stop_token_ids": [rng.randrange(vocabulary)],
        "min_tokens": 1,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "sanitize_control_tokens": True,
        "logit_bias": {str(rng.randrange(vocabulary)): rng.choice([-100, 100, 3.5]) for _ in range(rng.choice([1, 10]))},
        "priority": rng.choice([-1, 0, 5]),
        "user": rng.choice(["a", "b"]),
        "slo": rng.choice([{"tbt_ms": 1}, {"ttft_ms": 50}, {"tpot_ms": 30, "ttft_ms": 1000}]),
    }
    body |= {name: value for name, value in chances.items() if rng.random() < 0.12}
    if lasting:
        body |= {"max_tokens": 2000, "ignore_eos": True, "stop": [], "stop_token_ids": []}
    elif rng.random() < 0.1:
        body |= rng.choice(
            [
                {"temperature": 9},
                {"max_token": 1},
                {"n": 0},
                {"logit_bias": {"x": 1}},
                {"max_tokens": 10**6},
                {"stop_token_ids": [10**9]},
            ]
        )
    if rng.random() < 0.5:
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": rng.choice([0, 20])}
        return "/v1/chat/completions", body | {"messages": [{"role": rng.choice(["user", "system"]), "content": text}]}
    if rng.random() < 0.2:
        body |= {"logprobs": rng.choice([0, 5])}
    return "/v1/completions", body | {"prompt": rng.choice([text, ids, [text, "b"]])}


def greedy(rng: random.Random) -> tuple[str, dict[str, Any]]:
    words = ["sea", "moon", "river", "stone", "night", "bread", "house"]
    prompt = " ".join(rng.choices(words, k=rng.choice([3, 30])))
    return "/v1/completions", {"prompt": prompt, "max_tokens": 16, "ignore_eos": True, "temperature": 0, "logprobs": 5}


def resident(process: int) -> int:
    """Bytes of memory of a process and its children."""
    children = [int(pid) for task in Path(f"/proc/{process}/task").glob("*/children") for pid in task.read_text().split()]
    fields = Path(f"/proc/{process}/status").read_text().split("VmRSS:")[1].split()
    return 1024 * int(fields[0]) + sum(resident(child) for child in children)


class Soak:
    """`number` requests to the server at `url`, whose process is `process`."""

    def __init__(self, url: str, process: int, number: int, *, looks_again: bool):
        self.url, self.process, self.number, self.looks_again = url, process, number, looks_again
        self.statuses: Counter[str] = Counter()
        self.asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.after_a_tenth = 0

    async def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        coming = iter(range(self.number))
        stops = asyncio.create_task(self._stop())
        timeout, connector = aiohttp.ClientTimeout(total=None, sock_read=600), aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.url, timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._client(session, coming) for _ in range(IN_FLIGHT)))
            stops.cancel()
            await asyncio.gather(stops, return_exceptions=True)
            seconds = time.perf_counter() - began
            leaked = await self._leaked(session)
            memory = resident(self.process)
            wrong = await self._wrong(session)
            async with session.get("/health") as response:
                healthy = response.status == 200
        deaths = self.statuses["refused"] + (not healthy)
        row = {
            "requests": self.number,
            "aborted": self.statuses["aborted"],
            "refused as bad": self.statuses["400"],
            "seconds": seconds,
            "engine deaths": deaths,
            "answers 500": self.statuses["500"] + self.statuses["error event"],
            "wrong of greedy": f"{wrong} of {len(self.asked)}" if self.looks_again else "-",
            "KV blocks missing": leaked,
            "memory / after a tenth": memory / self.after_a_tenth,
        }
        bad = deaths or row["answers 500"] or wrong or leaked or row["memory / after a tenth"] > LIMIT_MEMORY
        return row | {"within limits": "NO" if bad else "yes"}

    async def _client(self, session: aiohttp.ClientSession, coming: Any) -> None:
        for number in coming:
            rng = random.Random(number)
            if number == self.number // 10:
                self.after_a_tenth = resident(self.process)
            looked_at = self.looks_again and number % GREEDY_EVERY == 0
            aborted = not looked_at and rng.random() < ABORTED
            path, body = greedy(rng) if looked_at else fuzzed(rng, 250, lasting=aborted)
            try:
                async with asyncio.timeout(rng.uniform(0, 0.3) if aborted else None):
                    logprobs = await self._ask(session, path, body)
                if looked_at and logprobs is not None:
                    self.asked.append((path, body, logprobs))
            except TimeoutError:
                self.statuses["aborted"] += 1
            except aiohttp.ClientConnectorError:
                self.statuses["refused"] += 1

    async def _ask(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The log-probabilities of an answer that is not streamed, if it has some."""
        async with session.post(path, json=body) as response:
            answer = await response.read()
            self.statuses[str(response.status)] += 1
            if b'data: {"error"' in answer:
                self.statuses["error event"] += 1
            if response.status != 200 or body.get("stream"):
                return None
            return cast(dict[str, Any] | None, json.loads(answer)["choices"][0].get("logprobs"))

    async def _stop(self) -> None:
        while True:
            await asyncio.sleep(STOP_EVERY_S)
            os.kill(self.process, signal.SIGSTOP)
            await asyncio.sleep(STOP_S)
            os.kill(self.process, signal.SIGCONT)

    async def _leaked(self, session: aiohttp.ClientSession) -> int:
        """KV blocks that are not free once nobody runs or waits any more."""
        for _ in range(600):
            async with session.get("/live?since=999999999") as response:
                about = await response.json()
            if not about["running"] and not about["waiting"]:
                break
            await asyncio.sleep(0.1)
        return int(about["num_blocks"] - about["free_blocks"])

    async def _wrong(self, session: aiohttp.ClientSession) -> int:
        wrong = 0
        for path, body, loaded in self.asked:
            alone = await self._ask(session, path, body)
            if alone is None:
                wrong += 1
                continue
            tokens = zip(loaded["tokens"], alone["tokens"], alone["token_logprobs"], alone["top_logprobs"], strict=False)
            differs = next(((token, chosen, top) for token, own, chosen, top in tokens if token != own), None)
            if differs is not None:
                token, chosen, top = differs
                wrong += chosen - top.get(token, -inf) > TIE
        return wrong


def serve_simulated() -> None:
    """Serve the simulated executor without its sleep, as `stallfree serve` would, and print the URL."""
    from stallfree.engine.assemble import Options, assemble
    from stallfree.server.app import create_app
    from stallfree.server.run import bind, run
    from stallfree.server.service import Service
    from stallfree.transfer.terms import address

    assembled = assemble(Options(executor="simulated", policy="sarathi", token_budget=2048))
    text = assembled.engine.text
    for tokenizer in (text.tokenizer, text._unmarking):
        tokenizer.model._resize_cache(0)
    assembled.engine.executor.sleep = lambda seconds: None  # type: ignore[attr-defined]
    service = Service(assembled.engine, "simulated", policy="sarathi")
    sock = bind("127.0.0.1", 0)
    print(json.dumps({"url": f"http://{address(*sock.getsockname()[:2])}"}), flush=True)
    service.start_helpers()
    run(create_app(service), service.thread, sock, drain_timeout_s=0)


@contextmanager
def simulated() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(process.stdout.readline() if process.stdout else "")["url"]
    finally:
        process.terminate()
        process.wait()


def soaked(name: str, serving: AbstractContextManager[str], number: int, *, looks_again: bool) -> dict[str, Any]:
    with serving as url:
        (process,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        row = asyncio.run(Soak(url, int(process), number, looks_again=looks_again).run())
    return {"executor": name} | row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.serve:
        serve_simulated()
        return
    facts = machine()
    many, some = (2000, 200) if args.quick else (100_000, 5000)
    rows = [
        soaked("simulated", simulated(), many, looks_again=False),
        soaked("openvino", server(["--kv-memory", KV_MEMORY]), some, looks_again=True),
    ]
    show("Soak", rows, facts, args.json)


if __name__ == "__main__":
    main()
