"""KV transfer between two servers of this machine: are the tokens those of one server, and what does it add to the TTFT?

`equal`: greedy requests with weights and KV in f32, where a token does not depend on its batch. All run on one server first, then
on a server that prefills and one that decodes, where clients abort some at random moments. Every token that came is compared.
`TTFT`: prompts of 1,000 new tokens in the default number formats, one at a time, alternately alone and transferred, as a client
sees it. The added time is the median over pairs, because this machine changes its speed from minute to minute. The limit is 5 % of
the prefill. All servers run on the same cores; unused ones are idle. Their KV is small, and is used once before anything is
counted: the first touch of memory costs more than the KV transfer.
`layers`: the same TTFT with executor torch on the processor, whose KV leaves layer by layer, and with it leaving in whole blocks.
The policy is prefill-first, which computes a prompt in one iteration.

    python benchmarks/transfer.py
"""

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
from harness import machine, parser, show

LENGTH = 1000
WARMING = 12
"""Requests that are not counted: they fill the KV of `SMALL` and the shared memory."""
SMALL = "128MiB"
POLICIES = ("sarathi", "slo")
LIMIT = 5.0
TORCH = ("--policy", "prefill-first", "--executor", "torch", "--device", "cpu")
START = "from stallfree.cli import main; main()"
WHOLE = f"from stallfree.executors.torch import TorchExecutor; del TorchExecutor.follow; {START}"
"""Starts a server whose KV leaves in whole blocks: without this method, the executor moves no layers."""
ABORTED = 0.2
AT_ONCE = 8


@contextlib.contextmanager
def serve(*options: str, start: str = START) -> Iterator[dict[str, Any]]:
    """Runs a server with these options; gives its card. `start`: the code that starts it."""
    command = [sys.executable, "-c", start, "serve", "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield json.loads(process.stdout.readline() if process.stdout else "")
        finally:
            process.terminate()


@contextlib.contextmanager
def servers(*options: str, start: str = START) -> Iterator[tuple[str, str]]:
    """URLs of a server by itself, and of a server whose prompts a third one computes. `start`: the code that starts the third."""
    with (
        serve(*options) as alone,
        serve("--role", "prefill", "--peer-port", "0", *options, start=start) as prefill,
        serve("--role", "decode", "--prefill", prefill["peers"], *options) as decode,
    ):
        time.sleep(2)  # until they are connected
        yield alone["url"], decode["url"]


async def ask(session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int, abort_s: float | None) -> Any:
    """The received tokens, whether they are complete, and the seconds until the first."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0, "stream": True}
    began, first, received, whole = time.perf_counter(), None, [], False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(abort_s), session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    if choice["logprobs"] is not None:
                        first = first or time.perf_counter() - began
                        received += choice["logprobs"]["tokens"]
                whole = whole or line.startswith(b"data: [DONE]")
    return received, whole, first


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def equal(alone: str, handed: str, number: int) -> dict[str, Any]:
    draw = random.Random(0)
    prompts = [[draw.randrange(1000, 30_000) for _ in range(draw.randrange(1, 300))] for _ in range(number)]
    aborts = [draw.uniform(0, 2) if draw.random() < ABORTED else None for _ in prompts]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def all_of(url: str, aborts: list[float | None]) -> list[Any]:
            room = asyncio.Semaphore(AT_ONCE)

            async def ask_in_turn(prompt: list[int], abort_s: float | None) -> Any:
                async with room:
                    return await ask(session, url, prompt, 16, abort_s)

            return await asyncio.gather(*map(ask_in_turn, prompts, aborts))

        expected = await all_of(alone, [None] * number)
        answers = await all_of(handed, aborts)
        counts = await metrics(session, handed)
    wrong = sum(tokens != whole[: len(tokens)] for (tokens, _, _), (whole, _, _) in zip(answers, expected, strict=True))
    short = sum(done and len(tokens) < 16 for tokens, done, _ in answers)
    return {
        "what": "equal",
        "requests": number,
        "aborted": sum(not done for _, done, _ in answers),
        "tokens compared": sum(len(tokens) for tokens, _, _ in answers),
        "requests with a wrong token": wrong + short,
        "transferred": int(counts['stallfree_kv_transfers_total{outcome="delivered"}']),
        "recomputed": int(counts['stallfree_kv_transfers_total{outcome="recomputed"}']),
    }


async def added(alone: str, handed: str, number: int, policy: str) -> dict[str, Any]:
    draw = random.Random(1)
    seconds: dict[str, list[float]] = {alone: [], handed: []}
    async with aiohttp.ClientSession() as session:
        for turn in range(WARMING + number):
            if turn == WARMING:
                before = await metrics(session, handed)
            for url in (alone, handed) if turn % 2 else (handed, alone):
                prompt = [draw.randrange(1000, 30_000) for _ in range(LENGTH)]
                _, _, first = await ask(session, url, prompt, 2, None)
                seconds[url] += [first] if turn >= WARMING else []
        counts = {name: value - before.get(name, 0) for name, value in (await metrics(session, handed)).items()}
    alone_s, handed_s = (statistics.median(seconds[url]) for url in (alone, handed))
    more = statistics.median(b - a for a, b in zip(seconds[alone], seconds[handed], strict=True))
    delivered = counts['stallfree_kv_transfers_total{outcome="delivered"}']
    return {
        "policy": policy,
        "requests": number,
        "alone, ms": alone_s * 1e3,
        "transferred, ms": handed_s * 1e3,
        "added, ms": more * 1e3,
        "added, %": 100 * more / alone_s,
        "limit, %": LIMIT,
        "KV, MB": counts["stallfree_kv_transfer_bytes_total"] / delivered / 1e6,
        "transfer, ms": counts["stallfree_kv_transfer_seconds_total"] / delivered * 1e3,
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    length = ("--max-model-len", "2048")
    exact = ("--policy", "sarathi", "--weights", "f32", "--kv", "f32")
    with servers(*length, *exact, "--kv-memory", "512MiB") as urls:
        first = asyncio.run(equal(*urls, 30 if args.quick else 500))
    rows = []
    for policy in POLICIES:
        with servers(*length, "--kv-memory", SMALL, "--policy", policy) as urls:
            rows.append(asyncio.run(added(*urls, 4 if args.quick else 60, policy)))
    layers = []
    for name, start in (("layers", START), ("whole blocks", WHOLE)):
        with servers(*length, "--kv-memory", SMALL, *TORCH, start=start) as urls:
            layers.append({"KV leaves in": name} | asyncio.run(added(*urls, 4 if args.quick else 60, TORCH[1])))
    show("Tokens", [first], facts, None)
    show(f"TTFT, {LENGTH:,} tokens", rows, facts, None)
    show(f"TTFT, {LENGTH:,} tokens, executor torch", layers, facts, None)
    if args.json is not None:
        rows = [first, *rows, *layers]
        args.json.write_text(json.dumps({"title": "KV transfer", "machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
