"""Memory that two engines on one machine share. The decode side makes it. The prefill side writes KV into it piece by piece. The
decode side frees the pieces in the same order, after it has taken them.

It is a file in memory that loses its name once both sides have it open, so that a crash leaves nothing. It knows no blocks.
"""

import mmap
import os
import re
import secrets
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")
SIZE = 64 << 20
"""Most bytes of a ring. It also takes at most half of the free bytes in `FOLDER`: a container may have 64 MB in all."""
_NAME = re.compile(r"stallfree-[0-9a-f]{32}")
_MARK = 16


class Ring:
    """The decode side's ring: its `memory`, and the `offer` to send to the other side (None if there is no shared memory)."""

    def __init__(self, size: int = SIZE) -> None:
        self.memory = memoryview(b"")
        self.offer: dict[str, Any] | None = None
        self._path = FOLDER / f"stallfree-{secrets.token_hex(16)}"
        with suppress(OSError):
            room = os.statvfs(FOLDER)
            size = min(size, room.f_bavail * room.f_frsize // 2)
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, size)  # else a write without room would kill the process
                self.memory = memoryview(mmap.mmap(file, size))
            finally:
                os.close(file)
                if not self.memory:
                    self.unlink()
            self.memory[:_MARK] = mark = secrets.token_bytes(_MARK)
            self.offer = {"name": self._path.name, "size": size, "mark": mark.hex()}

    def unlink(self) -> None:
        """Remove the file's name, so that no other process can open it."""
        with suppress(OSError):
            self._path.unlink()


def attach(offer: object) -> memoryview | None:
    """The prefill side's view of the offered memory; None if it is on another machine, or of another user."""
    if not isinstance(offer, dict) or not _NAME.fullmatch(str(offer.get("name"))):
        return None
    try:
        file = os.open(FOLDER / str(offer["name"]), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(file)
        if status.st_uid != os.geteuid() or status.st_size != offer.get("size") or status.st_size < _MARK:
            return None
        memory = memoryview(mmap.mmap(file, status.st_size))
    except OSError:
        return None
    finally:
        os.close(file)
    return memory if memory[:_MARK].hex() == offer.get("mark") else None


class Room:
    """Keeps track of which of `size` bytes are free. Pieces are freed in the order in which they were taken. It is thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._end = 0
        self._taken: deque[int] = deque()
        self._lock = threading.Lock()

    def take(self, number: int) -> int | None:
        """Take `number` bytes in one piece. Returns where they begin; None if no such piece is free."""
        with self._lock:
            first, end = (self._taken[0], self._end) if self._taken else (self._size, 0)
            if self._taken and end > first and self._size - end < number:
                end = 0  # the piece does not fit before the ring's end, so try at its beginning
            limit = self._size if end > first else first
            if limit - end < number or number < 1:
                return None
            self._taken.append(end)
            self._end = end + number
            return end

    def free(self) -> None:
        """Free the oldest piece. Raises IndexError if none is taken."""
        with self._lock:
            self._taken.popleft()
