"""Memory that two engines of one machine share: the decode side makes it, the prefill side writes KV into it piece by piece, and
each piece is free again, in the same order, when the decode side has taken it.

A file in memory that loses its name as soon as both have it open, so that nothing is left behind by a crash. It knows no blocks.
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
"""Bytes of a ring: at most, and at most half of what is free there (a container may have 64 MB in all)."""
_NAME = re.compile(r"stallfree-[0-9a-f]{32}")
_MARK = 16


class Ring:
    """The decode side's: `memory`, and `offer`, what is to be told to the other side (None where there is no shared memory)."""

    def __init__(self, size: int = SIZE) -> None:
        self.memory = memoryview(b"")
        self.offer: dict[str, Any] | None = None
        self._path = FOLDER / f"stallfree-{secrets.token_hex(16)}"
        with suppress(OSError):
            room = os.statvfs(FOLDER)
            size = min(size, room.f_bavail * room.f_frsize // 2)
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, size)  # or a write could find no room, which would be the end of the process
                self.memory = memoryview(mmap.mmap(file, size))
            finally:
                os.close(file)
                if not self.memory:
                    self.unlink()
            self.memory[:_MARK] = mark = secrets.token_bytes(_MARK)
            self.offer = {"name": self._path.name, "size": size, "mark": mark.hex()}

    def unlink(self) -> None:
        """Take its name away: nobody else finds it."""
        with suppress(OSError):
            self._path.unlink()


def attach(offer: object) -> memoryview | None:
    """The prefill side's view of what was offered; None if it is not on this machine, or not ours to open."""
    if not isinstance(offer, dict) or not _NAME.fullmatch(str(offer.get("name"))):
        return None
    try:
        file = os.open(FOLDER / str(offer["name"]), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        about = os.fstat(file)
        if about.st_uid != os.geteuid() or about.st_size != offer.get("size") or about.st_size < _MARK:
            return None
        memory = memoryview(mmap.mmap(file, about.st_size))
    except OSError:
        return None
    finally:
        os.close(file)
    return memory if memory[:_MARK].hex() == offer.get("mark") else None


class Room:
    """Which of `size` bytes are free: taken piece by piece, given back in the same order. For several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._end = 0
        self._taken: deque[int] = deque()
        self._lock = threading.Lock()

    def take(self, number: int) -> int | None:
        """Where `number` bytes in one piece are free, which are taken now; None if they are not."""
        with self._lock:
            first, end = (self._taken[0], self._end) if self._taken else (self._size, 0)
            if self._taken and end > first and self._size - end < number:
                end = 0  # they do not fit before the ring's end, so from its beginning on
            limit = self._size if end > first else first
            if limit - end < number or number < 1:
                return None
            self._taken.append(end)
            self._end = end + number
            return end

    def free(self) -> None:
        """The oldest piece is free again. IndexError if none is taken."""
        with self._lock:
            self._taken.popleft()
