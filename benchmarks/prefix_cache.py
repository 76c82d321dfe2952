"""What the prefix cache finds of a published trace: the share of prompt blocks that were seen before, over the size of the cache.

Simulated: Mooncake's trace (FAST'25), whose rows name the blocks of 512 tokens that prompts share, at its own times, through the
server's own scheduler and block pool. Iterations take 20 ms and 2 us a token, so that no queue forms and the trace's order
decides. `simulated`: blocks found over all blocks of the trace. `counted`: the same from the numbers in the file alone, by a cache
of so many blocks that drops the least recently used; it knows no requests that run. Without a limit both must be 36.6 %, to 1
point.

    python benchmarks/prefix_cache.py --trace mooncake_conversation.jsonl
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, Shape
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


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--trace", type=Path, metavar="FILE.jsonl", required=True, help="Mooncake's conversation trace")
    args = arguments.parse_args()
    requests = 2000 if args.quick else None
    facts = machine()
    rows = [json.loads(line)["hash_ids"] for line in args.trace.read_text().splitlines()][:requests]
    total = sum(map(len, rows))
    table: list[dict[str, Any]] = [
        {
            "blocks": "no limit" if size is None else f"{size:,}",
            "tokens": None if size is None else f"{size * BLOCK:,}",
            "GiB of an 8B model": None if size is None else size * BLOCK * KV_BYTES / 2**30,
            "simulated, %": 100 * simulated(args.trace, size or total + LONGEST // BLOCK, requests) / total,
            "counted, %": 100 * counted(rows, size or total) / total,
        }
        for size in SIZES
    ]
    show(f"Blocks found in the prefix cache, of {total:,} in {len(rows):,} prompts", table, facts, args.json)


if __name__ == "__main__":
    main()
