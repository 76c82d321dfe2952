"""FlashInfer's attention instead of the kernel in `kernels`, if it is installed and is faster in a trial at the start.

The host plans an iteration once, and it runs in each layer. It knows batches and caches, and no model. Written after the source of
flashinfer-python 0.7.2.post1 (flashinfer/prefill.py, flashinfer/data/include/flashinfer/attention/scheduler.cuh).
"""

import logging
import statistics
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from itertools import accumulate, cycle

import torch

from stallfree.core.plan import Capacity, Work
from stallfree.executors.torch.attention import attend
from stallfree.executors.torch.batch import Attend, Batch, pack, pinned

log = logging.getLogger(__name__)

WORKSPACE = 128 << 20
"""Bytes for FlashInfer's partial results over the context, as its documentation recommends."""
DECODES, CONTEXT, CHUNK = 8, 1024, 512
"""The batch of the trial: decodes, their tokens of KV, and a chunk of a prompt."""
TOLERANCE = 0.05
"""The largest allowed difference of outputs in the trial. They are around 1, so this is a few roundings of bfloat16."""


class Flash:
    """FlashInfer's attention with `heads` query heads over caches like `keys` [blocks, block size, KV heads, head size], for each
    of the layers' `windows`. Raises what FlashInfer raises.
    """

    def __init__(self, heads: int, keys: torch.Tensor, windows: Collection[int]):
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

        self._heads, self._device, self._type = heads, keys.device, keys.dtype
        self._block, self._kv_heads, self._size = keys.shape[1:]
        turns = []
        for _ in range(2):
            workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=keys.device)
            wrappers = {window: Wrapper(workspace, "NHD") for window in windows}
            turns.append((wrappers, torch.cuda.Event() if keys.is_cuda else None))
        # A plan is in its wrapper's pinned memory until the GPU copies it, after its earlier work. Two iterations may be under
        # way, so two sets of wrappers take turns.
        self._turns = cycle(turns)

    def plan(self, batch: Batch) -> Attend:
        """Plan `batch`. Returns the function that computes its attention; it is valid until two more batches are planned."""
        wrappers, copied = next(self._turns)
        if copied is not None:
            copied.synchronize()  # in a pipeline more than two may be under way
        pages = [-(-end // self._block) for end in batch.ends]
        begins, blocks = (pinned([*accumulate(of, initial=0)], self._device, torch.int32) for of in (batch.counts, pages))
        filled = pinned([(end - 1) % self._block + 1 for end in batch.ends], self._device, torch.int32)
        numbers = self._numbers(batch, sum(pages))
        for window, wrapper in wrappers.items():
            wrapper.plan(
                begins, blocks, numbers, filled, self._heads, self._kv_heads, self._size, self._block,
                causal=True, sm_scale=self._size**-0.5, q_data_type=self._type, kv_data_type=self._type,
                window_left=window - 1,  # without the token itself, which our window counts; -1: no limit
            )  # fmt: skip
        if copied is not None:
            copied.record()
        return lambda query, keys, values, window: wrappers[window].run(query, (keys, values))

    def _numbers(self, batch: Batch, total: int) -> torch.Tensor:
        """The block tables end to end, without padding. The host does not wait for them."""
        pages = (batch.lengths + self._block - 1) // self._block
        piece = torch.repeat_interleave(pages, output_size=total)
        place = torch.arange(total, device=self._device) - (pages.cumsum(0) - pages)[piece]
        return batch.tables[piece, place].int()


def milliseconds(run: Callable[[], object]) -> float:
    """Milliseconds of `run` on the GPU, including the gaps between kernels: the median of five runs, after two to warm up."""
    times: list[float] = []
    for _ in range(7):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[2:])


def choose(
    heads: int,
    dtype: torch.dtype,
    keys: torch.Tensor,
    windows: Collection[int],
    length: int,
    time: Callable[[Callable[[], object]], float] = milliseconds,
) -> Flash | None:
    """FlashInfer for queries of `dtype`; None if it is not installed, differs from our kernel on a batch of requests of up to
    `length` tokens, or is slower by `time`. This time is without planning, because the host plans once for all layers while the
    previous iteration runs. For the other arguments see `Flash`.
    """
    if dtype != keys.dtype or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        flash = Flash(heads, keys, windows)
        batch, blocks = _trial(length, keys.shape[1], keys.device)
        planned = replace(batch, planned=flash.plan(batch))
        random = partial(torch.randn, dtype=dtype, device=keys.device)
        query = random(len(batch.tokens), heads, keys.shape[3])
        trial_keys, trial_values = random(blocks, *keys.shape[1:]), random(blocks, *keys.shape[1:])
        times = {"Triton": 0.0, "FlashInfer": 0.0}
        for window in windows:
            runs = [partial(attend, query, trial_keys, trial_values, b, window) for b in (batch, planned)]
            apart = float((runs[0]() - runs[1]()).abs().max())
            if not apart <= TOLERANCE:
                raise ValueError(f"its attention is up to {apart:g} from ours")
            for name, run in zip(times, runs, strict=True):
                times[name] += time(run)
    except Exception as error:  # on any error, our own kernel does it
        if not isinstance(error, ModuleNotFoundError) or error.name != "flashinfer":
            log.warning("FlashInfer is installed, but not used: %s: %s", type(error).__name__, error)
        return None
    best = min(times, key=lambda name: times[name])
    # A warning, because lower levels are not shown, and the user should see which of the two it is.
    log.warning("attention by %s; in a trial %s", best, ", ".join(f"{name} took {ms:.3f} ms" for name, ms in times.items()))
    return flash if best == "FlashInfer" else None


def _trial(length: int, block: int, device: torch.device) -> tuple[Batch, int]:
    """A hybrid batch, and the number of KV blocks that it takes."""
    context, chunk = min(CONTEXT, length), min(CHUNK, length)
    work: list[Work] = []
    used = 0
    for start, count in [*[(context - 1, 1)] * DECODES, (0, chunk)]:
        more = -(-(start + count) // block)
        table = tuple(range(used, used + more))
        work.append(Work("trial", start, count, True, False, (0,) * count, table, None, "", (), ()))
        used += more
    return pack(work, [], Capacity(block, used, length), device), used
