"""Runs plans with torch in this process, on the processor or one GPU: one model, one iteration at a time.

It keeps KV tensors and nothing about requests.
"""

import time
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from stallfree.checkpoint import Checkpoint
from stallfree.core.plan import Plan, StepResult, Work
from stallfree.executors.torch.batch import check
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import Options, Runner, supported, use_threads
from stallfree.executors.torch.sampler import sample

OUT_OF_MEMORY = "out of GPU memory in an iteration; lower --max-tokens or --gpu-memory-utilization"


class TorchExecutor:
    """The model of `checkpoint`. `kv_bytes` of memory for keys and values; None, on a GPU: what is left.

    Raises ValueError for a bad option, and MemoryError where the weights or not one block of KV fit.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options, kv_bytes: int | None) -> None:
        supported(checkpoint)
        options.length(checkpoint.config)
        use_threads(options)
        self._runner = Runner(checkpoint, options, Alone(), range(checkpoint.config.num_layers), torch.device(options.device))
        self._runner.allocate(blocks(self._runner.room() if kv_bytes is None else kv_bytes, self._runner.block_bytes))
        self._runner.record()
        self.capacity, self._vocab_size = self._runner.capacity, checkpoint.config.vocab_size
        self.layout, self.block_bytes = self._runner.layout, self._runner.block_bytes
        self.read_blocks, self.write_blocks = self._runner.read_blocks, self._runner.write_blocks
        self._results: list[StepResult] = []

    def submit(self, plan: Plan) -> None:
        """Runs the plan. Raises ValueError, with no harm done, if the plan cannot be run; MemoryError if the GPU's does not do."""
        started = time.perf_counter()
        check(plan.work, self.capacity, self._vocab_size)
        try:
            logits = self._runner.run(plan.work, last_rows(plan.work))
            tokens, details, failed = sample(logits, [w for w in plan.work if w.samples])
        except torch.OutOfMemoryError:
            raise MemoryError(OUT_OF_MEMORY) from None
        self._results.append(StepResult(plan.step, tokens, time.perf_counter() - started, details=details, failed=failed))

    def collect(self) -> StepResult:
        return self._results.pop(0)

    def logits(self, work: Sequence[Work]) -> np.ndarray:
        """Runs `work` and gives the logits of all its tokens, [tokens, vocabulary] float32, unsampled: to measure quality with."""
        check(work, self.capacity, self._vocab_size)
        found: np.ndarray = self._runner.run(work, range(sum(w.count for w in work))).cpu().numpy()
        return found

    def close(self) -> None:
        self._runner.close()


def blocks(kv_bytes: int, block_bytes: int) -> int:
    """Blocks of KV that `kv_bytes` hold. Raises MemoryError if they hold none."""
    if kv_bytes < block_bytes:
        raise MemoryError(f"{max(0, kv_bytes):,} bytes hold no block of KV, which takes {block_bytes:,}; give it more memory")
    return kv_bytes // block_bytes


def last_rows(work: Sequence[Work]) -> list[int]:
    """The rows of a batch from which a token is sampled."""
    ends = accumulate(w.count for w in work)
    return [end - 1 for w, end in zip(work, ends, strict=True) if w.samples]
