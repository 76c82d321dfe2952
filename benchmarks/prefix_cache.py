"""What does the prefix cache find, what does it cost, and what does host memory bring back?

First table (with --trace): the share of prompt blocks that were seen before, over the size of the cache. Simulated: Mooncake's
trace (FAST'25), whose rows name the blocks of 512 tokens that prompts share, at its own times, through the server's own scheduler
and block pool. Iterations take 20 ms and 2 us a token, so that no queue forms and the trace's order decides. `simulated`: blocks
found over all blocks of the trace. `counted`: the same from the numbers in the file alone, by a cache of so many blocks that drops
the least recently used; it knows no requests that run. Without a limit both must be 36.6 %, to 1 point.

Second table (without --trace): the time between two runs of the executor, of the embedded model with prompts that share nothing,
in a KV cache that is full, so that each block taken is one evicted. Without the prefix cache, with it, and with host memory, which
keeps what is evicted, in turn; the best of the rounds. `cost`: what it adds, as a share of an iteration. The limit is 1 % for the
prefix cache.

Third table: the time to the first token of prompts of 2,000 tokens that are new, that were evicted to host memory, and that are in
the KV cache; medians. What comes back must take at most a quarter of the new one's time.

    python benchmarks/prefix_cache.py
    python benchmarks/prefix_cache.py --trace mooncake_conversation.jsonl
"""

import json
import random
import statistics
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, Shape
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.engine.assemble import Options, assemble
from stallfree.engine.engine import Engine
from stallfree.executors.sampling import Sampling
from stallfree.metrics.timeline import Timeline
from stallfree.policies.sarathi import Sarathi
from stallfree.sim.simulate import simulate
from stallfree.workload.prompt import BLOCK
from stallfree.workload.traffic import Traffic

SIZES = (1_000, 3_000, 10_000, 30_000, 50_000, 100_000, None)
"""KV blocks of 512 tokens. None: as many as the trace has."""
LONGEST = 200_000
"""Tokens. The longest request of the trace has fewer."""
KV_BYTES = 131_072
"""Of a token, for the size in GiB: Llama-3-8B with fp16 KV."""
KV_MEMORY, SMALL_MEMORY, HOST_MEMORY = 96 << 20, 48 << 20, 512 << 20
"""Bytes of the live engines: room for 7,700 tokens in the KV cache, 3,800 in the third table, and 41,000 in host memory."""
PROMPT = 2_000
GREEDY = Sampling(temperature=0)


class Quick:
    """Iterations that no trace is too much for."""

    def seconds(self, shape: Shape) -> float:
        return 0.02 + 2e-6 * sum(count for _, count in shape)


def simulated(trace: Path, blocks: int, requests: int | None) -> int:
    """Blocks found in a cache of so many."""
    found = 0

    def ended(line: Timeline) -> None:
        nonlocal found
        found += (line.cached or 0) // BLOCK

    arrivals = Traffic("trace", str(trace), LONGEST, requests=requests).stream()
    capacity = Capacity(BLOCK, blocks, LONGEST)
    simulate(arrivals, lambda: Sarathi(8192), Quick(), capacity, Limits(256, 8192), reuse=True, ended=ended)
    return found


def counted(rows: list[list[int]], blocks: int) -> int:
    """Blocks of the rows, in order, that a cache of so many has when they come."""
    cache, found = OrderedDict[int, None](), 0
    for row in rows:
        for number in row:
            found += number in cache
        for number in reversed(row):  # a prompt's end goes first
            cache[number] = None
            cache.move_to_end(number)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return found


def reuse(trace: Path, requests: int | None) -> tuple[str, list[dict[str, Any]]]:
    rows = [json.loads(line)["hash_ids"] for line in trace.read_text().splitlines()][:requests]
    total = sum(map(len, rows))
    table = [
        {
            "blocks": "no limit" if size is None else f"{size:,}",
            "tokens": None if size is None else f"{size * BLOCK:,}",
            "GiB of an 8B model": None if size is None else size * BLOCK * KV_BYTES / 2**30,
            "simulated, %": 100 * simulated(trace, size or total + LONGEST // BLOCK, requests) / total,
            "counted, %": 100 * counted(rows, size or total) / total,
        }
        for size in SIZES
    ]
    return f"Blocks found in the prefix cache, of {total:,} in {len(rows):,} prompts", table


def live(prefix_cache: bool = True, host_memory: int | None = None, kv_memory: int = KV_MEMORY) -> Engine:
    options = Options(
        policy="sarathi", token_budget=512, kv_memory=kv_memory, prefix_cache=prefix_cache, kv_host_memory=host_memory
    )
    return assemble(options).engine


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(1000, 20_000) for _ in range(tokens)]


def serve(engine: Engine, prompts: list[list[int]], max_tokens: int) -> float:
    """Seconds until all are served."""
    for number, each in enumerate(prompts):
        engine.submit(Request(f"{number} {engine.clock()}", each, max_tokens, arrival=engine.clock(), sampling=GREEDY))
    begun = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - begun


def cost(rounds: int, streams: int) -> list[dict[str, Any]]:
    """Milliseconds between iterations, and of iterations, of each engine."""
    engines = {"no prefix cache": live(False), "prefix cache": live(), "with host memory": live(host_memory=HOST_MEMORY)}
    between: dict[str, list[float]] = {name: [] for name in engines}
    within: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 2):  # the first two fill the KV cache and touch host memory
        for name, engine in engines.items():
            records: list[StepRecord] = []
            engine.record = records.append
            rng = random.Random(number)
            whole = serve(engine, [prompt(rng, 500) for _ in range(streams)], 24)
            inside = sum(record.t_end - record.t_start for record in records)
            if number >= 2:
                between[name].append(1e3 * (whole - inside) / len(records))
                within[name].append(1e3 * inside / len(records))
    iteration = min(within["no prefix cache"])
    rows = []
    for name, engine in engines.items():
        row = {"": name, "between, ms": min(between[name]), "iteration, ms": min(within[name])}
        rows.append(row | {"cost, % of an iteration": 100 * (min(between[name]) - min(between["no prefix cache"])) / iteration})
        engine.close()
    return rows


def back(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds to the first token of a prompt that is new, one that was evicted, and one that is cached."""
    engine, rng = live(host_memory=HOST_MEMORY, kv_memory=SMALL_MEMORY), random.Random(1)
    times: dict[str, list[float]] = {"new": [], "evicted to host memory": [], "in the KV cache": []}
    records: list[StepRecord] = []
    engine.record = records.append
    moved = 0
    for number in range(rounds + 1):
        asked = prompt(rng, PROMPT)
        new = serve(engine, [asked], 1)
        for _ in range(2):  # these evict it
            serve(engine, [prompt(rng, PROMPT)], 1)
        records.clear()
        evicted = serve(engine, [asked], 1)
        moved = sum(tokens for record in records for _, tokens in record.restored)
        cached = serve(engine, [asked], 1)
        if number:  # the first one compiles kernels
            for name, seconds in zip(times, (new, evicted, cached), strict=True):
                times[name].append(1e3 * seconds)
    engine.close()
    whole = statistics.median(times["new"])
    restored = {"evicted to host memory": moved}
    return [
        {"prompt": name, "TTFT, ms": (median := statistics.median(values)), "of a new one's, %": 100 * median / whole}
        | {"tokens back": restored.get(name)}
        for name, values in times.items()
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--trace", type=Path, metavar="FILE.jsonl", help="Mooncake's conversation trace: the first table")
    args = arguments.parse_args()
    facts = machine()
    if args.trace is not None:
        title, rows = reuse(args.trace, 2000 if args.quick else None)
        show(title, rows, facts, args.json)
        return
    rounds, streams = (2, 8) if args.quick else (5, 16)
    costs = cost(rounds, streams)
    show(f"Between two iterations, {streams} prompts of 500 tokens that share nothing", costs, facts, None)
    show(f"Prompts of {PROMPT:,} tokens", back(rounds), facts, args.json)


if __name__ == "__main__":
    main()
