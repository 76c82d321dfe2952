"""The ranks that share a layer: sums and parts of tensors, over torch.distributed or in one rank. It knows no model."""

from typing import Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """`size` ranks, of which this is `rank`."""

    rank: int
    size: int

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' values, on every rank."""

    def join(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """All ranks' values side by side in the last dimension, `width` in all, on every rank. The last ranks may have fewer."""


class Alone:
    """One rank, which has the whole layer."""

    rank, size = 0, 1

    def add(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def join(self, values: torch.Tensor, width: int) -> torch.Tensor:
        return values


class Group:
    """The ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, group=self._group)
        return values

    def join(self, values: torch.Tensor, width: int) -> torch.Tensor:
        each = -(-width // self.size)
        padded = torch.nn.functional.pad(values, (0, each - values.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat(parts, -1)[..., :width]
