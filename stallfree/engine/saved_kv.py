"""Cached prefixes in a file: written at a clean stop, and found again after the next start.

The file begins with a line of JSON: whose KV it is, and how many blocks follow. Each block has the number of its parent, or its
root; its tokens; its bytes; and a digest of all this and of the digest before it. Nothing of a file of another model or layout is
used, and nothing from the first damaged block on. It knows no format of tensors, and does not know when an engine stops.
"""

import json
import logging
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stallfree.core.kv import BlockPool
from stallfree.engine.adapters import name_of
from stallfree.engine.engine import Engine
from stallfree.executors.base import MovesKV

log = logging.getLogger(__name__)

VERSION = 1
MARK = "stallfree_kv"
"""The name in the first line under which the version stands."""
MOST_HEAD = 16 << 20
"""Bytes of the first line, at most: it has a name for each adapter."""
HEAD = struct.Struct("<IH")
"""Of each block: the number of its parent, from 1 on, or 0; and the bytes of its root, if it has no parent."""
DIGEST = 16


class Restored(NamedTuple):
    """What was found in a file: `blocks` that are cached now, and a `note` in words, for the user."""

    blocks: int
    note: str


class SavedKV:
    """The `file` of an engine that runs `model`, an identity: KV may be exchanged only if it is equal."""

    def __init__(self, file: Path, engine: Engine, model: str):
        """Raises ValueError for an engine whose KV cannot be moved, or that has no prefix cache."""
        executor, pool = engine.executor, engine.scheduler.ledger.pool
        if not isinstance(executor, MovesKV):
            raise ValueError(f"{type(executor).__name__} has no KV that can be moved; leave --kv-save out")
        if not pool.reuse:
            raise ValueError("--kv-save keeps the prefix cache; leave out --no-prefix-cache, or this option")
        self._file, self._engine, self._executor, self._pool = file, engine, executor, pool
        self._facts: dict[str, Any] = {
            MARK: VERSION,
            "model": model,
            "layout": executor.layout,
            "block_size": pool.block_size,
            "block_bytes": executor.block_bytes,
        }

    def restore(self) -> Restored:
        """Fill the free blocks of the pool, and of its tier, from the file, before the first request. A file that is not there, is
        another engine's or is damaged is no error; the note says what became of it.
        """
        if not self._file.exists():
            return Restored(0, f"--kv-save {self._file} is not there yet; it is written when the server stops")
        try:
            with self._file.open("rb") as file:
                head = _head(file)
                for name, own in self._facts.items():
                    if (other := (head or {}).get(name)) != own:
                        field = name.replace("_", " ")
                        difference = f"its {field} is {str(other)[:200]}, and this server's is {str(own)[:200]}"
                        return Restored(0, f"--kv-save {self._file} is of another server and is not used: {difference}")
                return self._restore(file, head or {})
        except OSError as error:
            return Restored(0, f"--kv-save {self._file} cannot be read: {error.strerror or error}; the cache begins empty")

    def save(self) -> int:
        """Write all that can be found in the pool and its tier, in the engine's thread. Returns the number of blocks. Raises
        OSError; then the file is as it was before.
        """
        part = self._file.with_name(self._file.name + ".part")
        with suppress(FileNotFoundError):
            part.unlink()
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                blocks = self._blocks()
                head = {**self._facts, "blocks": len(blocks), "adapters": self._identities(blocks)}
                file.write(json.dumps(head).encode() + b"\n")
                digest, memory = b"", memoryview(bytearray(self._executor.block_bytes))
                for parent, root, tokens, block, slot in blocks:
                    text = root.encode()
                    piece = HEAD.pack(parent, len(text)) + text + _packed(tokens)
                    if block is not None:
                        self._executor.read_blocks([block], memory)
                    elif slot is not None and self._engine.host is not None:
                        memory[:] = self._engine.host.slot(slot)
                    digest = _digest(digest, piece, memory)
                    file.write(piece)
                    file.write(memory)
                    file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._file)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
        return len(blocks)

    def close(self) -> None:
        """`save`, with a line in the log."""
        try:
            blocks = self.save()
        except Exception as error:  # the engine still has to close
            log.warning("--kv-save %s: nothing is saved: %s", self._file, error)
        else:
            log.info("--kv-save %s: %d KV blocks are saved", self._file, blocks)

    def _blocks(self) -> list[tuple[int, str, tuple[int, ...], int | None, int | None]]:
        """(number of the parent or 0, root or "", tokens, block, slot) of each block, after its parent."""
        numbers: dict[int, int] = {}
        blocks = []
        for (parent, tokens), node, block, slot in self._pool.contents():
            root = parent if isinstance(parent, str) else ""
            if root and (key := _adapter(root)) and self._identity(key) is None:
                continue
            if isinstance(parent, int) and parent not in numbers:
                continue
            blocks.append((numbers[parent] if isinstance(parent, int) else 0, root, tokens, block, slot))
            numbers[node] = len(blocks)
        return blocks

    def _identities(self, blocks: list[tuple[int, str, tuple[int, ...], int | None, int | None]]) -> dict[str, str | None]:
        return {key: self._identity(key) for key in {_adapter(root) for parent, root, *_ in blocks if not parent} if key}

    def _identity(self, adapter: str) -> str | None:
        """What an adapter contains; None if it is gone, or cannot be read any more."""
        try:
            return self._engine.adapters.identity(adapter)
        except (KeyError, OSError):
            return None

    def _restore(self, file: BinaryIO, head: dict[str, Any]) -> Restored:
        nodes: list[int | None] = []
        blocks = 0
        for root, parent, tokens, memory in _pieces(file, head, self._pool):
            if memory is None:
                damage = f"is damaged or cut short after {len(nodes):,} of {head['blocks']:,} blocks; {blocks:,} are used"
                return Restored(blocks, f"--kv-save {self._file} {damage}")
            root = self._own(root, head) if root is not None else None
            base = root if root is not None else nodes[parent - 1] if parent else None
            found = None if base is None else self._pool.put((base, tokens))
            if found is None:
                nodes.append(None)
                continue
            node, block, slot = found
            if block is not None:
                self._executor.write_blocks([block], memory)
            elif slot is not None and self._engine.host is not None:
                self._engine.host.slot(slot)[:] = memory
            nodes.append(node)
            blocks += 1
        rest = "" if blocks == len(nodes) else f"; there is no room, or no adapter, for {len(nodes) - blocks:,} more"
        return Restored(blocks, f"--kv-save {self._file}: {blocks:,} KV blocks of cached prefixes are back{rest}")

    def _own(self, root: str, head: dict[str, Any]) -> str | None:
        """The root here of what had this root there: an adapter with the same contents may have another key. None if it is gone."""
        adapter, rest = _adapter(root), root[len(_adapter(root)) :]
        if not adapter:
            return root
        key = self._engine.adapters.find(name_of(adapter), str(head["adapters"].get(adapter)))
        return None if key is None else key + rest


def check(file: Path) -> None:
    """Raises ValueError if `file` cannot become a file of saved KV: its folder is not there, or it is something else already."""
    if not file.parent.is_dir():
        raise ValueError(f"--kv-save {file}: there is no folder {file.parent}; make it, or name another file")
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"--kv-save {file}: the folder {file.parent} cannot be written; name a file elsewhere")
    if not file.exists():
        return
    try:
        with file.open("rb") as opened:
            known = _head(opened) is not None
    except OSError as error:
        raise ValueError(f"--kv-save {file} cannot be read: {error.strerror}; name another file") from None
    if not known:
        raise ValueError(f"--kv-save {file} is not a file of saved KV, and would be written over; name another file, or remove it")


def _head(file: BinaryIO) -> dict[str, Any] | None:
    """The first line of a file of saved KV; None if it is something else."""
    try:
        head = json.loads(file.readline(MOST_HEAD))
    except ValueError:
        return None
    known = isinstance(head, dict) and MARK in head
    return head if known and isinstance(head.get("blocks"), int) and isinstance(head.get("adapters"), dict) else None


def _pieces(
    file: BinaryIO, head: dict[str, Any], pool: BlockPool
) -> Iterator[tuple[str | None, int, tuple[int, ...], memoryview | None]]:
    """(root or None, number of the parent or 0, tokens, bytes) of each block. The bytes are None where the file is damaged. They
    hold until the next one."""
    memory, digest = memoryview(bytearray(head["block_bytes"])), b""
    for number in range(head["blocks"]):
        piece = file.read(HEAD.size)
        parent, length = HEAD.unpack(piece) if len(piece) == HEAD.size else (0, 0)
        body = file.read(length + 4 * pool.block_size)
        whole = len(body) == length + 4 * pool.block_size and file.readinto(memory) == len(memory)  # type: ignore[attr-defined]
        digest = _digest(digest, piece + body, memory)
        if not whole or file.read(DIGEST) != digest or parent > number:
            yield None, 0, (), None
            return
        yield None if parent else body[:length].decode(), parent, _unpacked(body[length:]), memory


def _adapter(root: str) -> str:
    """The key of the adapter in a request's root (see `core.request`)."""
    return root.partition("\0")[0]


def _digest(before: bytes, piece: bytes, memory: memoryview) -> bytes:
    hashed = blake2b(before + piece, digest_size=DIGEST)
    hashed.update(memory)
    return hashed.digest()


def _packed(tokens: tuple[int, ...]) -> bytes:
    numbers = array("i", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpacked(data: bytes) -> tuple[int, ...]:
    numbers = array("i")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)
