"""What it costs that ranks are processes: the torch executor in one process, with two ranks a layer, and with two stages.

The embedded model in bfloat16 on this machine's processor, 16 decodes an iteration, sides in turn. `schedule`: the scheduler's part
of an iteration. `messages`: from the plan's submission to its result, less what the rank that samples says it took from the
plan's arrival to its result; with two stages that rank waits for the other, and says so. Both together are to be at most 1 ms.

    python benchmarks/parallel.py
"""

import statistics
import time
from typing import Any

from harness import machine, parser, show

from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.request import Request
from stallfree.core.scheduler import Limits, Scheduler
from stallfree.executors.base import Executor
from stallfree.executors.sampling import Sampling
from stallfree.executors.torch import Options, ParallelExecutor, TorchExecutor, workers
from stallfree.policies import load

LIMIT_MS = 1.0
DECODES, CONTEXT = 16, 64
SIDES = {"one process": (1, 1), "TP 2": (2, 1), "PP 2": (1, 2)}


def executor(checkpoint: Checkpoint, tp: int, pp: int) -> Executor:
    options = Options("bf16", "bf16", device="cpu")
    if tp * pp == 1:
        return TorchExecutor(checkpoint, options, 1 << 28)
    return ParallelExecutor(checkpoint, options, 1 << 28, tp=tp, pp=pp, workers=workers("local"))


def iterations(made: Executor, number: int) -> dict[str, float]:
    """Medians, in milliseconds, of one plan at a time."""
    scheduler = Scheduler(load("sarathi"), made.capacity, Limits(DECODES))
    for i in range(DECODES):
        scheduler.submit(Request(str(i), [5 + i] * CONTEXT, number + 20, sampling=Sampling(temperature=0)))
    found: dict[str, list[float]] = {"iteration": [], "schedule": [], "messages": []}
    while len(found["iteration"]) < number:
        began = time.perf_counter()
        plan = scheduler.schedule(began)
        planned = time.perf_counter()
        made.submit(plan)
        result = made.collect()
        ran = time.perf_counter()
        scheduler.complete(plan, result, ran)
        ended = time.perf_counter()
        if all(work.decode for work in plan.work):
            found["iteration"].append(ended - began)
            found["schedule"].append(planned - began + ended - ran)
            found["messages"].append(ran - planned - result.seconds)
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    rounds, number = (1, 20) if args.quick else (3, 60)
    checkpoint = open_checkpoint(locate())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, (tp, pp) in SIDES.items():
            made = executor(checkpoint, tp, pp)
            try:
                found[name].append(iterations(made, number))
            finally:
                made.close()
    rows: list[dict[str, Any]] = []
    for name, several in found.items():
        middle = {f"{key}, ms": statistics.median(one[key] for one in several) for key in several[0]}
        both = middle["schedule, ms"] + middle["messages, ms"]
        rows.append({"side": name} | middle | {"schedule + messages, ms": both, "limit, ms": LIMIT_MS})
    show("16 decodes an iteration", rows, facts, args.json)


if __name__ == "__main__":
    main()
