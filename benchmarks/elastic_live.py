"""Two instances that form groups anew, beside a fixed ring of the same two and one process on the same cores: who stalls whom?

Every server has the embedded model in f32 (executor torch) and the same cores and bytes of KV. Chats stream, each a request after
the other, while prompts of 1,200 tokens arrive. For each server: output tokens of the chats a second, their TBT and TTFT, the TTFT
of the long prompts, and the share of iterations that ran beside another one. The servers take turns; each figure is the median of
the turns.

    python benchmarks/elastic_live.py
"""

import asyncio
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from harness import machine, parser, show
from stalls import prompt, stream

from stallfree.bench.server import server
from stallfree.core.record import read

CHATS, CHAT, ANSWER, LONG = 4, 48, 24, 1200
TARGET = "tbt=500ms"
COMMON = ("--executor", "torch", "--device", "cpu", "--weights", "f32", "--kv", "f32", "--no-prefix-cache", "--slo", TARGET)
SYSTEMS = {
    "elastic, two instances": ("--sp", "2", "--policy", "elastic", "--kv-memory", "128MiB"),
    "loongserve, two instances": ("--sp", "2", "--policy", "loongserve", "--kv-memory", "128MiB"),
    "slo, a ring of two": ("--sp", "2", "--policy", "slo", "--kv-memory", "128MiB"),
    "slo, one process": ("--policy", "slo", "--kv-memory", "256MiB"),
}


async def chat(client: httpx.AsyncClient, rng: random.Random, until: float, runs: list[list[float]]) -> None:
    """Requests one after the other until `until` (s of `perf_counter`); appends the times of each: sent, and its tokens."""
    while time.perf_counter() < until:
        runs.append([])
        await stream(client, prompt(rng, CHAT), ANSWER, runs[-1])


async def load(url: str, seconds: float, every: float) -> tuple[list[list[float]], list[list[float]]]:
    """The times of the chats' requests, and of the long prompts, of which one comes `every` seconds."""
    rng, chats, longs = random.Random(1), list[list[float]](), list[list[float]]()
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        until = time.perf_counter() + seconds
        talking = [asyncio.create_task(chat(client, rng, until, chats)) for _ in range(CHATS)]
        asking = []
        while time.perf_counter() + every < until:
            await asyncio.sleep(every)
            longs.append([])
            asking.append(asyncio.create_task(stream(client, prompt(rng, LONG), 4, longs[-1])))
        await asyncio.gather(*talking, *asking)
    return chats, longs


def measure(arguments: tuple[str, ...], seconds: float, every: float, folder: Path) -> dict[str, float]:
    file = folder / "records.jsonl"
    with server([*COMMON, *arguments, "--record", str(file)]) as url:
        chats, longs = asyncio.run(load(url, seconds, every))
    _, records = read(file.read_text().splitlines())
    file.unlink()
    gaps = np.concatenate([np.diff(times[1:]) for times in chats])
    lasted = max(times[-1] for times in chats) - min(times[0] for times in chats)
    beside = sum(later.t_start < earlier.t_end for earlier, later in pairwise(records))
    return {
        "chat tokens/s": sum(len(times) - 1 for times in chats) / lasted,
        "TBT p50, ms": 1e3 * float(np.median(gaps)),
        "TBT p99, ms": 1e3 * float(np.percentile(gaps, 99)),
        "TTFT of chats p50, s": median(times[1] - times[0] for times in chats),
        "TTFT of long prompts p50, s": median(times[1] - times[0] for times in longs),
        "iterations beside another": beside / max(1, len(records) - 1),
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    turns, seconds, every = (1, 12.0, 6.0) if args.quick else (3, 45.0, 12.0)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        for arguments in SYSTEMS.values():  # calibrations are not measured
            with server([*COMMON, *arguments]):
                pass
        for _ in range(turns):
            for name, arguments in SYSTEMS.items():
                runs[name].append(measure(arguments, seconds, every, Path(folder)))
    rows: list[dict[str, Any]] = [
        {"server": name} | {key: median(run[key] for run in taken) for key in taken[0]} for name, taken in runs.items()
    ]
    show(f"{CHATS} chats, a prompt of {LONG} tokens every {every:g} s, {TARGET}; medians of {turns} turns", rows, facts, args.json)


if __name__ == "__main__":
    main()
