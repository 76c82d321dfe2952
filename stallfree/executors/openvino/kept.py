"""Converted matrices in a file that is mapped into memory, so that the next start need not convert them, and so that they take no
memory once the runtime has packed them.

The file is written beside its final name and renamed when it is whole. It begins with a line of JSON, whose length is fixed, that
says where the index is; each array has a checksum, and a file in which one does not fit is not used. It knows arrays by name, and
nothing of models.
"""

import json
import logging
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

log = logging.getLogger(__name__)

VERSION = 1
"""The version of the file's layout."""
ALIGNMENT = mmap.ALLOCATIONGRANULARITY
HEADER = 128
"""Bytes of the first line."""
TYPES = ("int8", "uint8", "uint16", "float32")
LEAN_S = 0.05
"""How often mapped memory is given back, in seconds."""


class Entry(NamedTuple):
    """Where an array is: its type and shape, the offset of its bytes, and their CRC-32."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    crc: int

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.kind).itemsize


class Kept:
    """The file at `path`, if it is there, whole, and written for `key`; or else a new one, to which `put` adds.

    `progress` is called with bytes checked, and of how many. The runtime takes only memory that could be written, so mappings are
    private to this process.
    """

    def __init__(self, path: Path, key: str, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        self._path, self._key = path, key
        self._part = path.with_suffix(f".{os.getpid()}")
        self._entries: dict[str, Entry] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._end = ALIGNMENT
        self.whole = False
        """Whether the file was there, so that nothing is converted."""
        self._failed = False
        try:
            self._entries = self._index()
            self._check(progress)
            self.whole = True
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the converted model in %s cannot be used (%s); it is made anew", path, error)
            self._entries, self._maps = {}, {}
        if not self.whole:
            self._sweep()

    def get(self, name: str) -> np.ndarray | None:
        """The array of this name, in the mapped file. None if there is none."""
        if name not in self._maps:
            return None
        entry = self._entries[name]
        return np.frombuffer(self._maps[name], entry.kind, int(np.prod(entry.shape, dtype=np.int64))).reshape(entry.shape)

    def put(self, name: str, array: np.ndarray) -> np.ndarray:
        """Write an array. Returns the one in the mapped file, or `array` itself if it cannot be written."""
        if self._failed:
            return array
        try:
            self._write(name, np.ascontiguousarray(array))
        except OSError as error:
            log.warning("the converted model cannot be kept in %s: %s; the next start converts it again", self._path.parent, error)
            self._failed = True
            self._discard()
            return array
        mapped = self.get(name)
        return array if mapped is None else mapped

    def finish(self) -> None:
        """All arrays are written: give the file its name, if it is new and whole."""
        if self.whole or self._failed or not self._entries:
            return
        try:
            index = json.dumps({name: entry._asdict() for name, entry in self._entries.items()}).encode()
            header = {"version": VERSION, "key": self._key, "at": self._end, "bytes": len(index), "crc": zlib.crc32(index)}
            with self._part.open("r+b") as file:
                file.seek(self._end)
                file.write(index)
                file.seek(0)
                file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._part.replace(self._path)
            self.whole = True
        except OSError as error:
            log.warning("the converted model cannot be kept in %s: %s; the next start converts it again", self._path.parent, error)
            self._failed = True
            self._discard()

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Meanwhile, and at the end, mapped memory is given back: who packs the arrays reads each once. Whoever reads one again
        gets it from the file."""
        done = threading.Event()

        def give_back() -> None:
            while not done.wait(LEAN_S):
                self.release()

        thread = threading.Thread(target=give_back, daemon=True, name="converted weights")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.release()

    def release(self) -> None:
        for mapped in list(self._maps.values()):  # more may come meanwhile
            _release(mapped)

    def _index(self) -> dict[str, Entry]:
        with self._path.open("rb") as file:
            header = json.loads(file.read(HEADER))
            if (header["version"], header["key"]) != (VERSION, self._key):
                raise ValueError("it is of another version or model")
            file.seek(header["at"])
            index = file.read(header["bytes"])
            if zlib.crc32(index) != header["crc"]:
                raise ValueError("its index is damaged")
            size = file.seek(0, os.SEEK_END)
        entries = {
            name: Entry(str(e["kind"]), tuple(map(int, e["shape"])), int(e["offset"]), int(e["crc"]))
            for name, e in json.loads(index).items()
        }
        for name, entry in entries.items():
            if entry.kind not in TYPES or entry.offset % ALIGNMENT or entry.offset + entry.num_bytes > size:
                raise ValueError(f"array {name!r} is not in it")
        return entries

    def _check(self, progress: Callable[[int, int], None]) -> None:
        """Map all arrays, and compare their checksums."""
        total, done = sum(entry.num_bytes for entry in self._entries.values()), 0
        with self._path.open("rb") as file:
            for name, entry in self._entries.items():
                self._maps[name] = mmap.mmap(file.fileno(), entry.num_bytes, access=mmap.ACCESS_COPY, offset=entry.offset)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, crc in zip(self._maps, pool.map(zlib.crc32, self._maps.values()), strict=True):
                if crc != self._entries[name].crc:
                    raise ValueError(f"array {name!r} is damaged")
                _release(self._maps[name])
                done += self._entries[name].num_bytes
                progress(done, total)

    def _write(self, name: str, array: np.ndarray) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("r+b" if self._part.exists() else "w+b") as file:
            file.seek(self._end)
            file.write(array.data)
            file.flush()
            self._maps[name] = mmap.mmap(file.fileno(), array.nbytes, access=mmap.ACCESS_COPY, offset=self._end)
        self._entries[name] = Entry(array.dtype.name, array.shape, self._end, zlib.crc32(array.data))
        self._end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT

    def _sweep(self) -> None:
        """Remove what processes left that have ended before they were done."""
        for left in self._path.parent.glob(f"{self._path.stem}.[0-9]*"):
            try:
                os.kill(int(left.suffix[1:]), 0)  # only asks whether it runs
            except ProcessLookupError:
                with suppress(OSError):
                    left.unlink()
            except (OSError, ValueError, OverflowError):
                pass

    def _discard(self) -> None:
        with suppress(OSError):
            self._part.unlink()


def _release(mapped: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
