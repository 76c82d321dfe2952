"""Runs plans with torch in this process, on the processor or one GPU: one model, one iteration at a time. A GPU gets the next plan
while it runs one; only the GPU knows the tokens of its decodes.

It keeps KV tensors, and of requests only the tokens sampled last.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.adapter import Adapter
from stallfree.core.plan import UNKNOWN, Plan, StepResult, Work
from stallfree.executors.checks import sift
from stallfree.executors.sampling import Rows, Scores, begin_constraints, ready_rows
from stallfree.executors.torch.batch import check
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import Options, Runner, kv_numbers, layout, use_threads
from stallfree.executors.torch.sampler import Draw

OUT_OF_MEMORY = "out of GPU memory in an iteration; lower --max-tokens or --gpu-memory-utilization"


class TorchExecutor:
    """The model of `checkpoint`. `kv_bytes`: memory for keys and values (None, only on a GPU: the rest of its memory). `overlap`:
    see `Capacity` (None: only on a GPU).

    Raises ValueError for a bad option, and MemoryError if the weights or a single KV block do not fit.
    """

    verifies = True

    def __init__(self, checkpoint: Checkpoint, options: Options, kv_bytes: int | None, *, overlap: bool | None = None) -> None:
        options.check(checkpoint.config)
        use_threads(options)
        self._runner = Runner(checkpoint, options, Alone(), range(checkpoint.config.num_layers), torch.device(options.device))
        self._runner.allocate(blocks(self._runner.room() if kv_bytes is None else kv_bytes, self._runner.block_bytes))
        self._runner.record()
        self.capacity, self._vocab_size = self._runner.capacity, checkpoint.config.vocab_size
        if options.device == "cuda" if overlap is None else overlap:
            self.capacity = replace(self.capacity, depth=2, overlap=True)
        self._out: deque[tuple[int, float, Draw, dict[str, str], Scores, Collection[str]]] = deque()
        self._last: Draw | None = None
        self._ended = 0.0
        self.layout, self.block_bytes = layout(checkpoint.config, options.kv), self._runner.block_bytes
        self.numbers = kv_numbers(checkpoint.config, options.kv)
        self.read_blocks, self.write_blocks = self._runner.read_blocks, self._runner.write_blocks
        self.num_layers = checkpoint.config.num_layers
        self.read_layers, self.write_layers = self._runner.read_layers, self._runner.write_layers
        self.open_line = self._runner.open_line
        self.place = f"nccl {torch.cuda.get_device_properties(0).uuid}" if options.device == "cuda" else ""
        self._followers: dict[str, Callable[[Work, int], None]] = {}

    def adapter_blocks(self, adapter: Adapter) -> int:
        return self._runner.adapter_blocks(adapter)

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None:
        self._runner.load_adapter(key, adapter, blocks)

    def drop_adapter(self, key: str) -> None:
        self._runner.drop_adapter(key)

    def follow(self, id: str, computed: Callable[[Work, int], None] | None) -> None:
        """See `MovesLayers`."""
        if computed is None:
            self._followers.pop(id, None)
        else:
            self._followers[id] = computed

    def submit(self, plan: Plan) -> None:
        """Run the plan, except work that cannot run; a GPU runs on after this returns. Raises ValueError, and changes nothing, if
        no work can run; MemoryError if the GPU's memory is too small.
        """
        started = time.perf_counter()
        work, refused, _ = sift(plan.work, self._check)
        begin_constraints(work)
        unknown = [w.id for w in work if w.tokens == (UNKNOWN,)]
        try:
            ahead = self._last.tokens(unknown) if unknown and self._last is not None else None
            rows = Rows(work)
            logits = self._runner.run(work, rows.rows, ahead=ahead, computed=self._announcement(work))
            sampling = [w for w in work if w.samples]
            ready, deferred = ready_rows(sampling)
            own = logits[rows.of(ready)] if rows.scored or deferred else logits
            self._last = Draw(own, [sampling[row] for row in ready])
            scores = rows.scores(logits.cpu().numpy()) if rows.scored else {}
        except torch.OutOfMemoryError:
            raise MemoryError(OUT_OF_MEMORY) from None
        self._out.append((plan.step, started, self._last, refused, scores, deferred))

    def collect(self) -> StepResult:
        step, started, draw, refused, scores, deferred = self._out.popleft()
        tokens, details, failed = draw.result
        # The plan began when it was submitted, or when the plan before it had ended.
        began, self._ended = max(started, self._ended), time.perf_counter()
        return StepResult(
            step, tokens, self._ended - began, details=details, failed=refused | failed, scores=scores, deferred=deferred
        )

    def logits(self, work: Sequence[Work]) -> np.ndarray:
        """Run `work`. Returns the logits of all its tokens, [tokens, vocabulary] float32, to measure quality."""
        check(work, self._runner.capacity, self._vocab_size, self._runner.adapters)
        logits: np.ndarray = self._runner.run(work, range(sum(w.count for w in work))).cpu().numpy()
        return logits

    def close(self) -> None:
        self._runner.close()

    def _announcement(self, work: Sequence[Work]) -> Callable[[int], None]:
        """A function that tells the followers of `work` how many layers are computed."""
        followed = [(w, follower) for w in work if (follower := self._followers.get(w.id)) is not None]

        def announce(layers: int) -> None:
            for w, follower in followed:
                follower(w, layers)

        return announce

    def _check(self, work: Sequence[Work]) -> None:
        check(work, self.capacity, self._vocab_size, self._runner.adapters)
        for w in work:
            if w.tokens == (UNKNOWN,) and (self._last is None or w.id not in self._last.ids):
                reason = "there is none" if self._last is None else "it samples none"
                raise ValueError(f"request {w.id}: its token must come from the plan before, but {reason}")


def blocks(kv_bytes: int, block_bytes: int) -> int:
    """The number of KV blocks that `kv_bytes` hold. Raises MemoryError if they hold none."""
    if kv_bytes < block_bytes:
        raise MemoryError(f"{max(0, kv_bytes):,} bytes hold no block of KV, which takes {block_bytes:,}; give it more memory")
    return kv_bytes // block_bytes
