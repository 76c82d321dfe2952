"""Decode iterations as CUDA graphs: what launches their hundreds of kernels is recorded once for each of some sizes, and a batch is
padded to the next of these. The padding decodes one token of a block of its own, which nobody reads.

It knows no model. Prompts, and batches larger than the largest size, go without.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from stallfree.core.plan import Capacity
from stallfree.executors.torch.batch import Batch

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Decodes of a recorded iteration."""

Call = Callable[[Batch, torch.Tensor | None], torch.Tensor]
"""A model with its KV cache: from a batch, and what the stage before made of it, to logits or what the next begins with."""


class Graphs:
    """Recorded iterations of `call`, whose padding may write into block `spare`. `hidden` is what the stage before makes of a
    token, None for the first stage.
    """

    def __init__(self, call: Call, capacity: Capacity, spare: int, hidden: torch.Tensor | None, device: torch.device):
        self._spare, self._block_size = spare, capacity.block_size
        self._hidden = None if hidden is None else hidden.new_zeros(SIZES[-1], hidden.shape[-1])
        self._batch = empty(SIZES[-1], capacity, spare, device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = None
        for size in reversed(SIZES):  # the largest first: the others find room in its memory
            batch, before = first(self._batch, size), None if self._hidden is None else self._hidden[:size]
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):  # kernels are compiled and chosen outside of the recording
                call(batch, before)
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = call(batch, before)
            pool = graph.pool()
            self._graphs[size] = graph, out

    def takes(self, batch: Batch) -> bool:
        """Whether an iteration like this was recorded."""
        return batch.decodes and len(batch.counts) <= SIZES[-1] and batch.rows.shape[0] == len(batch.counts)

    def __call__(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """What `call` gives; it is written over by the next of its size."""
        number = len(batch.counts)
        size = next(size for size in SIZES if size >= number)
        put(batch, self._batch, size, self._spare, self._block_size)
        if hidden is not None and self._hidden is not None:
            self._hidden[:number] = hidden
        graph, out = self._graphs[size]
        graph.replay()
        return out[:number]


def empty(size: int, capacity: Capacity, spare: int, device: torch.device) -> Batch:
    """A batch of `size` decodes that is all padding, with room for the block tables of the longest requests."""

    def numbers(*shape: int, of: int = 0) -> torch.Tensor:
        return torch.full(shape, of, dtype=torch.int64, device=device)

    width = -(-capacity.max_model_len // capacity.block_size)
    begins = torch.arange(size + 1, device=device)
    slots = numbers(size, of=spare * capacity.block_size)
    tables = numbers(size, width, of=spare)
    ends = (capacity.max_model_len,) * size
    return Batch(numbers(size), numbers(size), slots, begins, numbers(size, of=1), tables, begins[:-1].clone(), (1,) * size, ends)


def first(batch: Batch, size: int) -> Batch:
    """The first `size` decodes of a batch of decodes, in the same memory."""
    own = {
        name: getattr(batch, name)[:size]
        for name in ("tokens", "positions", "slots", "lengths", "tables", "rows", "counts", "ends")
    }
    return replace(batch, begins=batch.begins[: size + 1], **own)


def put(batch: Batch, into: Batch, size: int, spare: int, block_size: int) -> None:
    """Write decodes into the memory of a larger batch, and padding behind them, up to `size`."""
    number, width = batch.tables.shape
    for name in ("tokens", "positions", "slots", "lengths"):
        getattr(into, name)[:number] = getattr(batch, name)
    into.tables[:number, :width] = batch.tables
    into.slots[number:size] = spare * block_size
    into.lengths[number:size] = 1
    into.tables[number:size, 0] = spare
