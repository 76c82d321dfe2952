"""An iteration as tensors: the tokens of all requests end to end, their places in the KV cache, and what each may attend to. It
knows plans, and nothing about models.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stallfree.core.plan import UNKNOWN, Capacity, Work
from stallfree.executors.checks import needed_blocks

if TYPE_CHECKING:
    from stallfree.executors.torch.adapters import Adapted
    from stallfree.executors.torch.placed import Placed
    from stallfree.executors.torch.striped import Striped

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Computes attention of queries over keys and values, with a window; see `attention.attend`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """N pieces of work with T tokens in all, on one device.

    `tokens`, `positions` [T]. `slots` [T]: where each token's KV goes, block x block size + place in the block. `begins` [N + 1]:
    the first row of each piece. `lengths` [N]: tokens of KV of each piece after this iteration. `tables` [N, blocks of the
    longest]: block numbers, filled up with 0. `rows`: the rows to compute logits of. `counts`, `ends`: tokens and `lengths` of each
    piece, on the host. `planned`: computes the batch's attention; None: our own does. `adapted`: the rows with adapters; None:
    there are none. `striped`: what other groups of ranks have of its tokens; None: there are no other groups. `programs`:
    what the attention kernel keeps from the first layer for the others.
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
    planned: Attend | None = None
    adapted: "Adapted | None" = None
    striped: "Striped | Placed | None" = None
    programs: dict[tuple[int, bool], torch.Tensor] = field(init=False, default_factory=dict)

    @property
    def decodes(self) -> bool:
        """Whether every piece is one token."""
        return len(self.counts) == self.tokens.shape[0]


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Copy numbers to `device`, after the work that it already has. The host does not wait."""
    return pinned(values, device, dtype).to(device, non_blocking=True)


def pinned(values: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Numbers on the host, from where `device` can copy them while the host goes on."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def pack(
    work: Sequence[Work], rows: Sequence[int], capacity: Capacity, device: torch.device, ahead: torch.Tensor | None = None
) -> Batch:
    """The tensors of `work`, which the caller has checked. One copy to the device carries them all. Only the tokens that are
    `UNKNOWN` come from `ahead`, in order.
    """
    size, number = capacity.block_size, len(work)
    counts, ends = tuple(w.count for w in work), tuple(w.start + w.count for w in work)
    width = max((-(-end // size) for end in ends), default=0)
    tables = np.zeros((number, width), np.int64)
    for table, w, end in zip(tables, work, ends, strict=True):
        needed = -(-end // size)
        table[:needed] = w.blocks[:needed]
    begins, lengths = np.zeros(number + 1, np.int64), np.array(ends, np.int64)
    np.cumsum(counts, out=begins[1:])
    piece = np.repeat(np.arange(number), counts)
    positions = np.arange(begins[-1]) + (lengths - begins[1:])[piece]
    slots = tables[piece, positions // size] * size + positions % size
    known = np.fromiter(chain.from_iterable(w.tokens for w in work), np.int64, begins[-1])
    unknown = np.flatnonzero(known == UNKNOWN) if ahead is not None else np.zeros(0, np.int64)
    parts = (known, positions, slots, begins, lengths, tables.ravel(), np.asarray(rows, np.int64), unknown)
    whole = upload(np.concatenate(parts), device)
    tokens, at, into, first, last, table, sampled, gaps = whole.split([len(part) for part in parts])
    if ahead is not None:
        tokens.index_copy_(0, gaps, ahead)
    return Batch(tokens, at, into, first, last, table.view(number, width), sampled, counts, ends)


def check(work: Sequence[Work], capacity: Capacity, vocab_size: int, adapters: Container[str] = ()) -> None:
    """Raises ValueError for work that would read or write outside of the model's tensors, or whose adapter is not in `adapters`.
    With overlap, a token may be `UNKNOWN`.
    """
    if not work:
        raise ValueError("a plan without work cannot be run")
    for w in work:
        needed_blocks(w, capacity)
        if w.adapter and w.adapter not in adapters:
            raise ValueError(f"request {w.id}: adapter {w.adapter!r} is not loaded; load it, or ask for the base model")
        if (min(w.tokens) < 0 or max(w.tokens) >= vocab_size) and not (capacity.overlap and w.tokens == (UNKNOWN,)):
            raise ValueError(f"request {w.id}: a token id is outside the vocabulary of {vocab_size}")
        if min(w.blocks) < 0 or max(w.blocks) >= capacity.num_blocks:
            raise ValueError(f"request {w.id}: a KV block number is outside the {capacity.num_blocks} blocks")
