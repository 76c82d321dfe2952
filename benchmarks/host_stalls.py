"""Can the host's work for one client (parse, render, tokenise, sample, write) stop another client's stream?

Live HTTP, the embedded model, the default target, a client on the same machine. One plain stream runs all the time, and /health is
asked every 20 ms. At first nothing else happens; then another client sends one kind of request after the other.

Limits for each kind: /health within 50 ms at P99. If the request is refused, or asks only about text: the plain stream's longest
gap at most twice the undisturbed P99. If its tokens are computed, they take time in the model's iterations, up to the target: then
the limit is the server's target at P99, or twice the undisturbed P99 if that is more.

    python benchmarks/host_stalls.py
"""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
from harness import machine, parser, show

from stallfree.bench.server import server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMIT, HEALTH_LIMIT_S = 2.0, 0.05
TIMES = 3
"""How often each kind is sent, in sequence. If tokens are computed, it is sent until there are `FEWEST` gaps for the P99."""
FEWEST = 400
WORDS = "The quick brown fox jumps over the lazy dog while seven wizards judge my vow. "


def text(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1))[:size]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def parts(count: int) -> list[dict[str, str]]:
    return [{"type": "text", "text": "a few words"}] * count


def bias(count: int) -> dict[str, float]:
    return {str(i): 0.5 for i in range(100, 100 + count)}


KINDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "a text of 3.5 MB": (COMPLETIONS, lambda: {"prompt": text(3_500_000), "max_tokens": 5}),
    "a chat of 10,000 messages": (CHAT, lambda: {"messages": user("hello") * 10_000, "max_tokens": 5}),
    "n 16, 40,000 of logit_bias": (COMPLETIONS, lambda: {"prompt": "a", "n": 16, "max_tokens": 20, "logit_bias": bias(40_000)}),
    "n 32, 20 log-probabilities": (
        CHAT,
        lambda: {"messages": user("a"), "n": 32, "max_tokens": 20, "logprobs": True, "top_logprobs": 20},
    ),
    "n 32, top_p, penalties, 2,000 tokens": (
        COMPLETIONS,
        lambda: {"prompt": text(9_000), "n": 32, "max_tokens": 20, "top_p": 0.9, "presence_penalty": 1, "repetition_penalty": 1.1},
    ),
    "the same with top_k, min_p and a seed": (
        COMPLETIONS,
        lambda: {"prompt": text(9_000), "n": 32, "max_tokens": 20, "top_k": 1000, "min_p": 0.01, "seed": 1, "frequency_penalty": 1},
    ),
    "64 prompts of 50 KB": (COMPLETIONS, lambda: {"prompt": [text(50_000)] * 64, "max_tokens": 5}),
    "500,000 token ids": (COMPLETIONS, lambda: {"prompt": [1000] * 500_000, "max_tokens": 5}),
    "a text of 30 KB, as long as fits": (COMPLETIONS, lambda: {"prompt": text(30_000), "max_tokens": 5}),
    "a message of 50,000 parts": (CHAT, lambda: {"messages": user(parts(50_000)), "max_tokens": 5}),
    "3 MB of control tokens": (CHAT, lambda: {"messages": user("<|im_start|>" * 250_000), "max_tokens": 5}),
    "3 MB of one letter": (COMPLETIONS, lambda: {"prompt": "a" * 3_000_000, "max_tokens": 5}),
    "tokenize 1 MB": ("/tokenize", lambda: {"prompt": text(1_000_000)}),
    "detokenize 400,000 ids": ("/detokenize", lambda: {"tokens": [1000] * 400_000}),
    "4 MB that are not JSON": (CHAT, lambda: b'{"messages": [' + b"[" * 4_000_000),
    "16 stop strings of 256 letters, n 32": (
        COMPLETIONS,
        lambda: {"prompt": "a", "n": 32, "max_tokens": 30, "stop": [f"{i}" + "a" * 250 for i in range(16)]},
    ),
    "100,000 unknown fields": (CHAT, lambda: {"messages": user("a")} | {f"field_{i}": 1 for i in range(100_000)}),
}


async def stream(session: aiohttp.ClientSession, times: list[float]) -> None:
    """Runs one stream after the other, and appends to `times` when each event with text came."""
    body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    while True:
        async with session.post(COMPLETIONS, json=body) as response:
            times.append(float("nan"))  # no gap between two streams
            async for line in response.content:
                if line.startswith(b'data: {"id"') and b'"finish_reason": null' in line:
                    times.append(time.perf_counter())


async def health(session: aiohttp.ClientSession, took: list[float]) -> None:
    while True:
        began = time.perf_counter()
        async with session.get("/health") as response:
            await response.read()
        took.append(time.perf_counter() - began)
        await asyncio.sleep(0.02)


def gaps(times: list[float]) -> np.ndarray:
    between = np.diff(np.array(times))
    return between[~np.isnan(between)]


async def watched(url: str, seconds: float, names: list[str]) -> list[dict[str, Any]]:
    times: list[float] = []
    took: list[float] = []
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, timeout=timeout) as session, aiohttp.ClientSession(url, timeout=timeout) as other:
        watchers = [asyncio.create_task(stream(session, times)), asyncio.create_task(health(session, took))]
        await asyncio.sleep(3)  # the first requests are slower
        times.clear(), took.clear()
        await asyncio.sleep(seconds)
        usual = float(np.percentile(gaps(times), 99))
        async with other.get("/live?since=999999999") as response:
            target = (await response.json())["targets"]["tbt"]["seconds"]
        rows = [row("nothing", "", gaps(times), took, usual, target)]
        for name in names:
            path, body = KINDS[name]
            raw = body()
            data = raw if isinstance(raw, bytes) else await asyncio.to_thread(lambda raw=raw: json.dumps(raw).encode())
            await asyncio.sleep(1)
            times.clear(), took.clear()
            status, sent = "", 0
            while sent < TIMES or (_computed(name, status) and len(gaps(times)) < FEWEST):
                sent += 1
                async with other.post(path, data=data, headers={"Content-Type": "application/json"}) as response:
                    await response.read()
                    status = str(response.status)
                await asyncio.sleep(0.5)
            rows.append(row(name, status, gaps(times), took, usual, target))
            print(rows[-1])
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
    return rows


def _computed(name: str, status: str) -> bool:
    """Whether the model computes tokens for this kind."""
    return status == "200" and not name.startswith(("tokenize", "detokenize"))


def row(name: str, status: str, gaps: np.ndarray, took: list[float], usual: float, target: float) -> dict[str, Any]:
    longest, p99, health_p99 = float(gaps.max()), float(np.percentile(gaps, 99)), float(np.percentile(took, 99))
    computed = _computed(name, status)
    limit = max(LIMIT * usual, target) if computed else LIMIT * usual
    kept = (p99 if computed else longest) <= limit and health_p99 <= HEALTH_LIMIT_S
    return {
        "what another client sends": name,
        "answer": status,
        "gap p99, ms": 1e3 * p99,
        "longest gap, ms": 1e3 * longest,
        "limit, ms": 1e3 * limit,
        "of the": "p99" if computed else "longest",
        "/health p99, ms": 1e3 * health_p99,
        "within limits": "yes" if kept else "NO",
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", metavar="WORDS", default="", help="only kinds whose name holds these")
    args = arguments.parse_args()
    facts = machine()
    names = [name for name in KINDS if args.only in name][: 5 if args.quick else None]
    with server([]) as url:
        rows = asyncio.run(watched(url, 10.0 if args.quick else 30.0, names))
    show("One plain stream beside one other client", rows, facts, args.json)


if __name__ == "__main__":
    main()
