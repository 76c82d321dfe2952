"""Worker (see worker.py): OpenVINO GenAI's continuous batching of the same GGUF file, one `step()` a repetition.

Scheduling and greedy sampling are timed. Each repetition lengthens the context by a token or two, so prompts
are shortened: half-way the context is `context`.
"""

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import job, say, tokens

STEP_TOKENS = 1024


def main() -> None:
    task = job()
    say(version=f"openvino-genai {version('openvino-genai')}")
    schedule = genai.SchedulerConfig()
    schedule.cache_size = 1  # GB
    schedule.dynamic_split_fuse = True
    schedule.enable_prefix_caching = False
    schedule.max_num_batched_tokens = STEP_TOKENS
    schedule.max_num_seqs = 64
    pipeline = genai.ContinuousBatchingPipeline(task["model"], schedule, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    names = iter(range(1 << 30))

    def add(count: int, samples: int) -> Any:
        options = genai.GenerationConfig()
        options.max_new_tokens = samples
        options.ignore_eos = True
        options.do_sample = False
        return pipeline.add_request(next(names), ov.Tensor(np.array([tokens(count)], np.int64)), options)

    def step() -> float:
        began = time.perf_counter()
        pipeline.step()
        return time.perf_counter() - began

    for batch in task["batches"]:
        decodes, chunk, seconds = batch["decodes"], batch["chunk"], []
        moves = 2 if chunk else 1
        ahead = (1 + task["repeats"]) * moves // 2
        running = []
        for index in range(decodes):
            later = (decodes - 1 - index) * batch["context"] // STEP_TOKENS
            running.append(add(max(1, batch["context"] - ahead - later), 1000))
        waiting = list(running)
        while waiting:
            step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        for handle in running:
            handle.read()
        for _ in range(1 + task["repeats"]):
            prompt = []
            if chunk:
                if decodes:
                    step()
                    for handle in running:
                        handle.read()
                prompt = [add(chunk, 1)]
            seconds.append(step())
            if not all(handle.can_read() for handle in running + prompt):
                raise RuntimeError(f"{batch['name']}: a step gave no token to one of {len(running + prompt)} sequences")
            for handle in running + prompt:
                handle.read()
        for handle in running:
            handle.stop()
        while pipeline.has_non_finished_requests():
            pipeline.step()
        say(batch=batch["name"], seconds=seconds[1:])


main()
