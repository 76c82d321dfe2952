"""Do long prompts stall streams? 16 clients stream over HTTP while 2,000-token prompts arrive, once under each policy.

For each policy: `left out`, the ready decodes that an iteration left out (from the server's records). `late`, the gaps between two
tokens of a stream that are above 5 times the median iteration in which only the 16 decode, as measured in the first run (the
paper's strict SLO is 5 times a decode iteration). The streams' TBT as the clients see it. The median TTFT of the long prompts. The
streams' own first tokens are not counted. Prompts are random tokens, so that no prefix is shared. `--plot FILE` draws three of the
runs, `--table FILE` writes the table in Markdown.

    python benchmarks/stalls.py --plot docs/images/stalls.png --table docs/images/stalls.md
"""

import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from harness import machine, parser, show

from stallfree.bench.server import server
from stallfree.core.record import StepRecord, read
from stallfree.metrics.plot import streams
from stallfree.metrics.timeline import timelines

POLICIES = ["sarathi", "prefill-first", "orca", "hybrid-only", "chunked-only", "request-level"]
MODEL = "smollm2-135m-instruct"
CLIENTS, LONG, QUIET_S = 16, 2000, 4.0


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(length)]


async def stream(client: httpx.AsyncClient, tokens: list[int], max_tokens: int, times: list[float]) -> None:
    """Appends to `times` when the request was sent, and when each of its tokens came (seconds of `perf_counter`)."""
    body = {"model": MODEL, "prompt": tokens, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    times.append(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["finish_reason"] is None:
                times.append(time.perf_counter())


async def load(url: str, seconds: float, every: float) -> tuple[list[list[float]], list[float]]:
    """Runs `CLIENTS` chats and a long prompt `every` seconds; times of each chat (sent, then its tokens), TTFT of long prompts."""
    rng = random.Random(1)
    chats: list[list[float]] = [[] for _ in range(CLIENTS)]
    longs: list[list[float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        talking = [asyncio.create_task(stream(client, prompt(rng, 64), int(50 * seconds), times)) for times in chats]
        await asyncio.sleep(QUIET_S)
        asking = []
        for _ in range(max(1, int((seconds - QUIET_S) / every))):
            longs.append([])
            asking.append(asyncio.create_task(stream(client, prompt(rng, LONG), 8, longs[-1])))
            await asyncio.sleep(every)
        await asyncio.wait_for(asyncio.gather(*asking), 300)
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)
    return chats, [times[1] - times[0] for times in longs]


def lone_decode(records: list[StepRecord]) -> float:
    """Median seconds of an iteration in which every stream decodes and nothing else runs."""
    alone = [r for r in records if len(r.work) == CLIENTS and all(count == 1 for _, _, count in r.work)]
    return float(np.median([r.t_end - r.t_plan for r in alone]))


def measure(
    policy: str, seconds: float, every: float, folder: Path, late_after: float | None
) -> tuple[dict[str, Any], list[StepRecord], float]:
    """The policy's row, its records, and `late_after` in seconds, which is measured if it is None."""
    file = folder / f"{policy}.jsonl"
    with server(["--policy", policy, "--record", str(file)]) as url:
        chats, ttfts = asyncio.run(load(url, seconds, every))
    _, records = read(file.read_text().splitlines())
    lines = [line for line in timelines(records).values() if line.prompt_tokens < LONG]
    late_after = late_after or 5 * lone_decode(records)
    gaps = np.concatenate([np.diff(times[1:]) for times in chats])
    p50, p99 = np.percentile(gaps, [50, 99])
    row = {
        "policy": policy,
        "tokens": len(gaps),
        "left out": sum(line.stalls for line in lines),
        "late": int((gaps > late_after).sum()),
        "late after, ms": late_after * 1e3,
        "TBT p50, ms": p50 * 1e3,
        "TBT p99, ms": p99 * 1e3,
        "TBT max, ms": gaps.max() * 1e3,
        "median TTFT of long prompts, s": float(np.median(ttfts)),
    }
    return row, records, late_after


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw sarathi beside prefill-first and orca")
    arguments.add_argument("--table", type=Path, metavar="FILE", help="write the table as Markdown")
    args = arguments.parse_args()
    facts, rows, runs, late_after = machine(), [], {}, None
    policies, seconds = (POLICIES[:3], 12) if args.quick else (POLICIES, 45)
    with tempfile.TemporaryDirectory() as folder:
        for policy in policies:
            row, runs[policy], late_after = measure(policy, seconds, 4.0, Path(folder), late_after)
            rows.append(row)
    show(f"{CLIENTS} streams while {LONG}-token prompts arrive", rows, facts, args.json)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        streams({p: runs[p] for p in ("prefill-first", "orca", "sarathi")}, args.plot, (QUIET_S - 2, QUIET_S + 6))
    if args.table:
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
        args.table.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


if __name__ == "__main__":
    main()
