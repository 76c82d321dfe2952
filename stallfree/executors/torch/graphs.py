"""Decode iterations as CUDA graphs: the launches of their hundreds of kernels are recorded once for each of some sizes. A batch is
padded to the next size. The padding decodes one token of a spare block, which nobody reads.

It knows no model. Prompts, and batches larger than the largest size, run without graphs.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch

from stallfree.core.plan import Capacity
from stallfree.executors.torch.adapters import Adapted
from stallfree.executors.torch.batch import Batch

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""The numbers of decodes for which an iteration is recorded."""

Call = Callable[[Batch, torch.Tensor | None], torch.Tensor]
"""A model with its KV cache: from a batch and the previous stage's output to logits, or to the next stage's input."""


class Graphs:
    """Recorded iterations of `call`. Their padding writes into block `spare`. `hidden`: the previous stage's output for one token
    (None: this is the first stage). `adapted`: the adapters of as many decodes as the largest size; with it, iterations with
    adapters are recorded, too.
    """

    def __init__(
        self,
        call: Call,
        capacity: Capacity,
        spare: int,
        hidden: torch.Tensor | None,
        device: torch.device,
        adapted: Adapted | None = None,
    ):
        self._spare, self._block_size = spare, capacity.block_size
        self._hidden = None if hidden is None else hidden.new_zeros(SIZES[-1], hidden.shape[-1])
        self._batch = replace(empty(SIZES[-1], capacity, spare, device), adapted=adapted)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = None
        kinds = (False,) if adapted is None else (True, False)
        for size, has_adapters in product(reversed(SIZES), kinds):  # the largest first: the others fit into its memory
            batch, before = first(self._batch, size, has_adapters), None if self._hidden is None else self._hidden[:size]
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):  # kernels are compiled and chosen outside of the recording
                call(batch, before)
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = call(batch, before)
            pool = graph.pool()
            self._graphs[size, has_adapters] = graph, out

    def takes(self, batch: Batch) -> bool:
        """Whether an iteration of this kind and size was recorded."""
        recorded = batch.adapted is None or self._batch.adapted is not None
        return recorded and batch.decodes and len(batch.counts) <= SIZES[-1] and batch.rows.shape[0] == len(batch.counts)

    def __call__(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """The result of `call`. The next iteration of the same size writes over it."""
        number = len(batch.counts)
        size = next(size for size in SIZES if size >= number)
        put(batch, self._batch, size, self._spare, self._block_size)
        if hidden is not None and self._hidden is not None:
            self._hidden[:number] = hidden
        graph, out = self._graphs[size, batch.adapted is not None]
        graph.replay()
        return out[:number]


def empty(size: int, capacity: Capacity, spare: int, device: torch.device) -> Batch:
    """A batch of `size` decodes, all padding, with room for the block tables of the longest requests."""

    def numbers(*shape: int, of: int = 0) -> torch.Tensor:
        return torch.full(shape, of, dtype=torch.int64, device=device)

    width = -(-capacity.max_model_len // capacity.block_size)
    begins = torch.arange(size + 1, device=device)
    slots = numbers(size, of=spare * capacity.block_size)
    tables = numbers(size, width, of=spare)
    ends = (capacity.max_model_len,) * size
    return Batch(numbers(size), numbers(size), slots, begins, numbers(size, of=1), tables, begins[:-1].clone(), (1,) * size, ends)


def first(batch: Batch, size: int, has_adapters: bool = False) -> Batch:
    """The first `size` decodes of a batch of decodes, in the same memory; with their adapters if it `has_adapters`."""
    own = {
        name: getattr(batch, name)[:size]
        for name in ("tokens", "positions", "slots", "lengths", "tables", "rows", "counts", "ends")
    }
    adapted = replace(batch.adapted, runs=batch.adapted.runs[:, :size]) if has_adapters and batch.adapted is not None else None
    return replace(batch, begins=batch.begins[: size + 1], adapted=adapted, **own)


def put(batch: Batch, into: Batch, size: int, spare: int, block_size: int) -> None:
    """Write decodes into the memory of a larger batch, and padding after them, up to `size`."""
    number, width = batch.tables.shape
    for name in ("tokens", "positions", "slots", "lengths"):
        getattr(into, name)[:number] = getattr(batch, name)
    into.tables[:number, :width] = batch.tables
    into.slots[number:size] = spare * block_size
    into.lengths[number:size] = 1
    into.tables[number:size, 0] = spare
    if batch.adapted is not None and into.adapted is not None:
        into.adapted.runs[2, :number] = batch.adapted.runs[2]
        into.adapted.runs[2, number:size] = -1
