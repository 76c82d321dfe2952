"""Memory for what the runtime reads in every iteration."""

import mmap

import numpy as np


def huge_pages(num_bytes: int) -> np.ndarray:
    """Zeroed bytes, in pages of 2 MiB if the system has them. A request's blocks are scattered, so small pages would make attention
    a third slower. The system allocates a page when it is first written."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
