"""An iteration as tensors: the tokens of all requests end to end, where each lies in the KV cache, and what each may attend to. It
knows plans, and nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from stallfree.core.plan import Capacity, Work
from stallfree.executors.checks import needed_blocks


@dataclass(frozen=True, slots=True)
class Batch:
    """For N pieces of work with T tokens in all, on one device.

    `tokens`, `positions` [T]; `slots` [T]: where each token's KV goes, block x block size + place in it; `begins` [N + 1]: the
    first row of each piece; `lengths` [N]: tokens of KV that each has once this iteration is done; `tables` [N, blocks of the
    longest]: block numbers, 0 behind a piece's own; `rows`: the rows to compute logits of. `counts` and `ends` are `begins` and
    `lengths` for the host: tokens of each piece, and its KV.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    begins: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    rows: torch.Tensor
    counts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def decodes(self) -> bool:
        """Whether every piece is one token."""
        return len(self.counts) == self.tokens.shape[0]


def pack(work: Sequence[Work], rows: Sequence[int], capacity: Capacity, device: torch.device) -> Batch:
    """The tensors of `work`, which was checked. One transfer carries them all."""
    size = capacity.block_size
    counts, ends = tuple(w.count for w in work), tuple(w.start + w.count for w in work)
    width = max(-(-end // size) for end in ends)
    tables = [list(w.blocks[: -(-end // size)]) for w, end in zip(work, ends, strict=True)]
    positions = list(chain.from_iterable(range(w.start, end) for w, end in zip(work, ends, strict=True)))
    slots = [
        table[position // size] * size + position % size
        for w, end, table in zip(work, ends, tables, strict=True)
        for position in range(w.start, end)
    ]
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    padded = [number for table in tables for number in (*table, *[0] * (width - len(table)))]
    parts = (list(chain.from_iterable(w.tokens for w in work)), positions, slots, begins, list(ends), padded, list(rows))
    whole = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
    if device.type == "cuda":
        whole = whole.pin_memory()
    tokens, at, into, first, last, table, sampled = whole.to(device, non_blocking=True).split([len(part) for part in parts])
    return Batch(tokens, at, into, first, last, table.view(len(work), width), sampled, counts, ends)


def check(work: Sequence[Work], capacity: Capacity, vocab_size: int) -> None:
    """Raises ValueError for work that would read or write outside of the model's tensors."""
    if not work:
        raise ValueError("a plan without work cannot be run")
    for w in work:
        needed_blocks(w, capacity)
        if min(w.tokens) < 0 or max(w.tokens) >= vocab_size:
            raise ValueError(f"request {w.id}: a token id is outside the vocabulary of {vocab_size}")
        if min(w.blocks) < 0 or max(w.blocks) >= capacity.num_blocks:
            raise ValueError(f"request {w.id}: a KV block number is outside the {capacity.num_blocks} blocks")
