"""The bytes of the KV blocks in host memory, and their moves to and from the executor's own.

The index (`core/tier.py`) decides what is moved. This module moves it, in the engine's thread, before the next plan runs. It does
not know what the bytes mean.
"""

import mmap
import time

from stallfree.core.kv import BlockPool
from stallfree.core.tier import Tier
from stallfree.executors.base import Executor, MovesKV
from stallfree.executors.host_memory import gib
from stallfree.executors.machine import memory

MOST_MOVED = 64 << 20
"""Bytes that are moved each way in an iteration, at most: on two cores of a server about 30 ms, which an iteration of a stream
may wait. What a prompt begins with comes back in several iterations if it is more."""


class HostTier:
    """`num_bytes` of host memory for what `pool` evicts, which `executor` reads and writes. The system allocates a page when it is
    first written. `index`: what lies in it. `seconds`: spent on moves so far.

    Raises ValueError for an executor whose KV cannot be moved, for a pool without reuse, and for less than a block; MemoryError for
    more than there is.
    """

    def __init__(self, executor: Executor, pool: BlockPool, num_bytes: int, *, in_host: bool):
        """`in_host`: the executor's own KV is in this machine's memory, too, which it takes when it is first written."""
        if not isinstance(executor, MovesKV):
            raise ValueError(f"{type(executor).__name__} has no KV that can be moved; leave --kv-host-memory out")
        if not pool.reuse:
            raise ValueError("--kv-host-memory keeps the prefix cache; leave out --no-prefix-cache, or this option")
        self._executor, self._bytes = executor, executor.block_bytes
        if num_bytes < self._bytes:
            raise ValueError(f"--kv-host-memory {num_bytes:,} bytes is less than one KV block, {self._bytes:,}; give more")
        room, own = memory(), pool.num_blocks * self._bytes if in_host else 0
        if room is not None and num_bytes + own > room.free:
            raise MemoryError(
                f"--kv-host-memory is {gib(num_bytes)}, and of this machine's memory {gib(max(0, room.free - own))} are left "
                f"beside the model and its KV cache ({room}); give less"
            )
        self.index = pool.tier = Tier(num_bytes // self._bytes, max(1, MOST_MOVED // self._bytes))
        slots = mmap.mmap(-1, self.index.num_slots * self._bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            slots.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(slots)
        self.seconds = 0.0

    def move(self) -> None:
        """Make the moves that are due. If this raises, it is not known what is in the blocks and in the slots."""
        stored, loaded = self.index.moves()
        if not stored and not loaded:
            return
        began = time.perf_counter()
        for slot, block in stored.items():
            self._executor.read_blocks([block], self.slot(slot))
        for block, slot in loaded.items():
            self._executor.write_blocks([block], self.slot(slot))
        self.seconds += time.perf_counter() - began

    def slot(self, number: int) -> memoryview:
        """The bytes of a slot."""
        return self._memory[number * self._bytes : (number + 1) * self._bytes]
