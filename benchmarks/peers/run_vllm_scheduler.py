"""Times vLLM's scheduler without a model, its own class and this project's in turn: `schedule` and `update_from_output` with many
running streams, and prompts that come beside them. It prints a JSON line for each number of streams: milliseconds of an iteration,
and the median over the rounds of how much more this project's takes, and of how many times vLLM's. The time is the thread's own,
so that other processes count less.

    PYTHONPATH=. VLLM_PYTHON benchmarks/peers/run_vllm_scheduler.py
"""

import json
import os
import tempfile
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from stallfree.vllm import SloScheduler
from tests.vllm.real import Runner, model_folder, request, scheduler

NUMBERS = (256, 1000)
ROUNDS, ITERATIONS = 15, 60


def streaming(cls: Any, number: int, folder: Path, ahead: bool) -> Runner:
    """A scheduler with `number` streams that all have begun, and a prompt that comes in every tenth iteration."""
    made = scheduler(cls, folder, blocks=40_000, seqs=number + 100, tokens=8192, ahead=ahead, caching=True)
    runner = Runner(made)
    for i in range(number):
        made.add_request(request(f"s{i}", range(i, i + 100), 3000))
    for _ in range(40 + number // 50):
        runner.step()
    return runner


def timed(runner: Runner, serial: list[int]) -> float:
    """Seconds of an iteration, the mean of `ITERATIONS`."""
    made = runner.scheduler
    times = {"schedule": made.schedule, "update_from_output": made.update_from_output}
    total = 0.0

    def watched(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal total
            start = thread_time()
            result = times[name](*arguments)
            total += thread_time() - start
            return result

        return call

    made.schedule, made.update_from_output = watched("schedule"), watched("update_from_output")
    for i in range(ITERATIONS):
        if i % 10 == 0:
            serial[0] += 1
            made.add_request(request(f"p{serial[0]}", range(serial[0], serial[0] + 400), 2))
        runner.step()
    made.schedule, made.update_from_output = times["schedule"], times["update_from_output"]
    return total / ITERATIONS


def main() -> None:
    os.environ["STALLFREE_SLO"] = "tbt=10s"
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name))
        for ahead in (False, True):
            for number in NUMBERS:
                own, ours = ([], []), streaming(SloScheduler, number, folder, ahead)
                theirs = streaming(AsyncScheduler if ahead else Scheduler, number, folder, ahead)
                freeze_gc_heap()  # as vLLM's engine does before it serves
                serial = [0]
                for _ in range(ROUNDS):
                    own[0].append(timed(theirs, serial))
                    own[1].append(timed(ours, serial))
                pairs = list(zip(*own, strict=True))
                figures = {
                    "vllm_ms": 1e3 * median(own[0]),
                    "stallfree_ms": 1e3 * median(own[1]),
                    "more_ms": 1e3 * median(b - a for a, b in pairs),
                    "times": median(b / a for a, b in pairs),
                }
                print(json.dumps({"async": ahead, "running": number} | figures), flush=True)


if __name__ == "__main__":
    main()
