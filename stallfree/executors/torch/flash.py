"""FlashInfer's attention instead of the kernel in `kernels`, where it is installed and a trial at the start found it to be faster.

An iteration is planned once, on the host, and run in each layer. It knows batches and caches, and no model. Written after the
source of flashinfer-python 0.7.2.post1 (flashinfer/prefill.py, flashinfer/data/include/flashinfer/attention/scheduler.cuh).
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
"""Bytes for what is found in parts of the context; what FlashInfer's documentation gives it."""
DECODES, CONTEXT, CHUNK = 8, 1024, 512
"""The batch of the trial: decodes, their tokens of KV, and a chunk of a prompt."""
TOLERANCE = 0.05
"""Between the two at the trial, of outputs around 1: a few roundings of bfloat16."""


class Flash:
    """Of `heads` over caches like `keys` [blocks, block size, KV heads, head size], with each of `windows` that layers have. Raises
    what FlashInfer raises.
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
        # A plan is written into pinned memory of its wrapper, and copied from there behind what the GPU still has to do. Two
        # iterations may be under way, so two take turns: the one before is left alone.
        self._turns = cycle(turns)

    def plan(self, batch: Batch) -> Attend:
        """What computes the attention of `batch`, until two more were planned."""
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
                window_left=window - 1,  # tokens before the token itself, which our window counts; -1: no limit
            )  # fmt: skip
        if copied is not None:
            copied.record()
        return lambda query, keys, values, window: wrappers[window].run(query, (keys, values))

    def _numbers(self, batch: Batch, total: int) -> torch.Tensor:
        """The block tables end to end, without what pads them; nothing of it is waited for."""
        pages = (batch.lengths + self._block - 1) // self._block
        piece = torch.repeat_interleave(pages, output_size=total)
        place = torch.arange(total, device=self._device) - (pages.cumsum(0) - pages)[piece]
        return batch.tables[piece, place].int()


def milliseconds(run: Callable[[], object]) -> float:
    """What `run` takes on the GPU, with the gaps that launching leaves: the median of five, after two that do not count."""
    found: list[float] = []
    for _ in range(7):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended))
    return statistics.median(found[2:])


def choose(
    heads: int,
    dtype: torch.dtype,
    keys: torch.Tensor,
    windows: Collection[int],
    length: int,
    time: Callable[[Callable[[], object]], float] = milliseconds,
) -> Flash | None:
    """FlashInfer for queries of `dtype`, if it is installed, computes what ours does for a batch of requests of up to `length`
    tokens, and is the faster one by `time`; else None. Plans are not in that: the host makes one for all layers, beside the
    iteration before. See `Flash` for the rest.
    """
    if dtype != keys.dtype or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        flash = Flash(heads, keys, windows)
        ours, blocks = _trial(length, keys.shape[1], keys.device)
        theirs = replace(ours, planned=flash.plan(ours))
        made = partial(torch.randn, dtype=dtype, device=keys.device)
        query = made(len(ours.tokens), heads, keys.shape[3])
        some, others = made(blocks, *keys.shape[1:]), made(blocks, *keys.shape[1:])
        taken = {"Triton": 0.0, "FlashInfer": 0.0}
        for window in windows:
            ways = [partial(attend, query, some, others, batch, window) for batch in (ours, theirs)]
            apart = float((ways[0]() - ways[1]()).abs().max())
            if not apart <= TOLERANCE:
                raise ValueError(f"its attention is up to {apart:g} from ours")
            for name, way in zip(taken, ways, strict=True):
                taken[name] += time(way)
    except Exception as error:  # whatever it was: there is another that does it
        if not isinstance(error, ModuleNotFoundError) or error.name != "flashinfer":
            log.warning("FlashInfer is installed, and not used: %s: %s", type(error).__name__, error)
        return None
    best = min(taken, key=lambda name: taken[name])
    # As a warning, since less is not shown, and which of the two it was is to be seen.
    log.warning("attention by %s; at the trial %s", best, ", ".join(f"{name} took {ms:.3f} ms" for name, ms in taken.items()))
    return flash if best == "FlashInfer" else None


def _trial(length: int, block: int, device: torch.device) -> tuple[Batch, int]:
    """A hybrid batch, and how many blocks it takes."""
    context, chunk = min(CONTEXT, length), min(CHUNK, length)
    work: list[Work] = []
    used = 0
    for start, count in [*[(context - 1, 1)] * DECODES, (0, chunk)]:
        more = -(-(start + count) // block)
        table = tuple(range(used, used + more))
        work.append(Work("trial", start, count, True, False, (0,) * count, table, None, "", (), ()))
        used += more
    return pack(work, [], Capacity(block, used, length), device), used
