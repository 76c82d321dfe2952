"""How much of this machine's memory an executor may take for its KV cache."""

from pathlib import Path


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
