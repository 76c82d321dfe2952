"""How long does a plan take, and is KV moved as fast as arithmetic says?

`stallfree plan` for 16 A100 on 4 nodes and three models in sequence should take at most 6 minutes on 2 cores. (With `--json` or
`--html` it takes longer, because these also have trials of the finalists at five rates.) 4,096 tokens of
Llama-2-70B (0.328 MB each in fp16) over 200 Gb/s should take 53.7 ms, within 1 %, alone and four at a time.

    python benchmarks/plan_speed.py
"""

import subprocess
import sys
import time
from math import inf

from harness import machine, parser, show

from stallfree.perf import links, shape
from stallfree.sim.fabric import Fabric, Port

MODELS = ("llama3-8b", "llama2-13b", "llama2-70b")
ARGUMENTS = ("--gpus", "16", "--nodes", "4", "--link", "ib-200g", "--lengths", "openchat", "--slo", "ttft=2s@p90,tbt=100ms@p99")


def transfer(number: int) -> tuple[float, float]:
    """When the last of `number` prompts of 4,096 tokens, sent at once, has arrived (seconds), and the bytes that were moved."""
    kv = shape.Sharded(shape.load("llama2-70b"), 1, 1).kv_bytes_per_token
    fabric, port, ended = Fabric(), Port(links.load("ib-200g").bandwidth), list[float]()
    for _ in range(number):
        fabric.send(4096 * kv, (port,), 0.0, ended.append)
    while fabric.due < inf:
        fabric.run()
    return max(ended), port.moved


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    rows = []
    for number in (1, 4):
        seconds, moved = transfer(number)
        rows.append(
            {"transfers at once": number, "ms": 1e3 * seconds, "over arithmetic": seconds / (number * 0.0537), "bytes": moved}
        )
    show("KV of 4,096 tokens of Llama-2-70B over 200 Gb/s", rows, facts, None)
    plans = []
    for model in MODELS[:1] if args.quick else MODELS:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "stallfree", "plan", "--model", model, *ARGUMENTS]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds = time.perf_counter() - begin
        plans.append(
            {"model": model, "seconds": seconds} | {"answer": next(line for line in text.splitlines() if "isaggregate" in line)}
        )
        print(text, flush=True)
    show("Plans for 16 A100 on 4 nodes", plans, facts, args.json)
    print(f"{sum(row['seconds'] for row in plans):.0f} s together; 360 s wanted")


if __name__ == "__main__":
    main()
