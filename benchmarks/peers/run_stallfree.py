"""Worker (see worker.py): the default executor of stallfree with `weights`, one plan a repetition, greedy sampling included."""

import time
from importlib.metadata import version

from worker import job, say, tokens

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Plan, Work
from stallfree.engine.calibrate import quicker_few
from stallfree.executors.openvino import OpenVINOExecutor


def main() -> None:
    task = job()
    say(version=f"stallfree {version('stallfree')}, openvino {version('openvino')}")
    executor = OpenVINOExecutor(open_checkpoint(task["model"]), weights=task["weights"], kv_bytes=1 << 28)
    executor.few = quicker_few(executor)
    size = executor.capacity.block_size
    longest = max(max(b["context"] + 1, b["chunk"]) for b in task["batches"])
    per_request = -(-longest // size)

    def work(index: int, start: int, ids: list[int]) -> Work:
        blocks = tuple(range(index * per_request, (index + 1) * per_request))
        decode = start > 0
        return Work(str(index), start, len(ids), True, decode, tuple(ids), blocks, None, "", [1] * (start + len(ids)), [])

    def run(*pieces: Work) -> float:
        began = time.perf_counter()
        executor.submit(Plan(0, 0.0, pieces))
        executor.collect()
        return time.perf_counter() - began

    most = max(b["decodes"] for b in task["batches"])
    for index in range(most):
        run(work(index, 0, tokens(longest - 1)))
    for batch in task["batches"]:
        seconds = []
        for _ in range(1 + task["repeats"]):
            pieces = [work(index, batch["context"], tokens(1)) for index in range(batch["decodes"])]
            if batch["chunk"]:
                pieces.append(work(most, 0, tokens(batch["chunk"])))
            seconds.append(run(*pieces))
        say(batch=batch["name"], seconds=seconds[1:])


main()
