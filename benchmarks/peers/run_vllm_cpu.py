"""Worker (see worker.py): vLLM on the CPU in bfloat16, eager, in one process; one `LLMEngine.step()` a repetition.

`model` is a Hugging Face folder. Scheduling and greedy sampling are timed; there is no detokenising. Each repetition lengthens
the context by a token or two, so prompts are shortened: half-way the context is `context`.
"""

import os
import time
from importlib.metadata import version
from typing import Any

from worker import job, say, tokens

STEP_TOKENS = 1024


def main() -> None:
    task = job()
    threads = task["threads"]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import EngineArgs, LLMEngine, SamplingParams

    say(version=f"vllm-cpu {version('vllm-cpu')}")
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=task["model"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=64,
            max_model_len=2048,
            async_scheduling=False,
        )
    )
    names = iter(range(1 << 30))

    def add(count: int, samples: int) -> str:
        name = str(next(names))
        options = SamplingParams(temperature=0.0, max_tokens=samples, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": tokens(count)}, options)
        return name

    def step() -> tuple[float, list[Any]]:
        began = time.perf_counter()
        outputs = engine.step()
        return time.perf_counter() - began, outputs

    for batch in task["batches"]:
        decodes, chunk, seconds = batch["decodes"], batch["chunk"], []
        moves = 2 if chunk else 1
        ahead = (1 + task["repeats"]) * moves // 2
        running = []
        for index in range(decodes):
            later = (decodes - 1 - index) * batch["context"] // STEP_TOKENS
            running.append(add(max(1, batch["context"] - ahead - later), 1000))
        started: set[str] = set()
        while len(started) < decodes:
            started |= {o.request_id for o in step()[1]}
        for _ in range(1 + task["repeats"]):
            if chunk:
                if decodes:
                    step()
                add(chunk, 1)
            taken, outputs = step()
            expected = decodes + (chunk > 0)
            if len(outputs) != expected:
                raise RuntimeError(f"{batch['name']}: a step gave {len(outputs)} tokens, {expected} expected")
            seconds.append(taken)
        engine.abort_request(running)
        while engine.has_unfinished_requests():
            engine.step()
        say(batch=batch["name"], seconds=seconds[1:])


main()
