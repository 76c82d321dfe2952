"""The memory of this machine: how much of it a KV cache may take, and how threads allocate theirs."""

import ctypes
from pathlib import Path

M_ARENA_MAX = -8
"""The option of `mallopt` that bounds the arenas (glibc, malloc/malloc.h)."""


def available_bytes() -> int | None:
    """Bytes of memory that can be allocated without swapping (Linux); None if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def check_memory(needed: int) -> None:
    """Raises MemoryError if a KV cache of `needed` bytes does not fit."""
    available = available_bytes()
    if available is not None and needed > available:
        raise MemoryError(
            f"the KV cache needs {needed / 2**30:.2f} GiB and {available / 2**30:.2f} GiB of memory is available; "
            f"give a smaller kv_bytes (--kv-memory on the command line), or store KV in fewer bits"
        )


def use_one_arena() -> None:
    """Makes threads that begin from now on allocate from one arena, where the C library is glibc.

    By default each thread has an arena of its own. Large temporary arrays of several threads then leave holes in each of them: a
    server of the embedded model grew by 9 % in a soak of 5,000 requests, and by 2 % with one arena (docs/performance.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_ARENA_MAX, 1)
