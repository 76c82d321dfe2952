"""Frames between two engines: a short JSON header, and bytes after it. A connection is alive while frames arrive. Nothing is
pickled; a frame that is too long or malformed ends the connection. It knows no meaning of any frame.
"""

import json
import logging
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

log = logging.getLogger(__name__)

MOST_HEADER = 1 << 20
MOST_BODY = 256 << 20
"""Most bytes of a frame's header and of its body. A frame that declares more is refused before its header is read."""
ALIVE_S = 1.0
"""Seconds without a frame after which a side sends `ALIVE`."""
SILENCE_S = 5.0
"""Seconds without a frame after which the other side counts as lost."""
ALIVE = {"type": "alive"}

Header = dict[str, Any]
Frame = tuple[Header, bytes | bytearray]


class Broken(ConnectionError):
    """The other side is gone, is silent, or sent something invalid."""


def send(sock: socket.socket, header: Header, body: bytes | bytearray = b"") -> None:
    head = json.dumps(header, separators=(",", ":")).encode()
    sock.sendall(struct.pack("<II", len(head), len(body)) + head)
    if body:
        sock.sendall(body)


def receive(sock: socket.socket, most_body: int = MOST_BODY) -> tuple[Header, bytearray, float]:
    """The next frame, and the seconds from its first bytes to its last. Raises Broken."""
    first = _read(sock, 8)
    began = time.perf_counter()
    head, size = struct.unpack("<II", first)
    if head > MOST_HEADER or size > most_body:
        raise Broken(f"a frame of {head:,} and {size:,} bytes is longer than the {MOST_HEADER:,} and {most_body:,} allowed")
    try:
        header = json.loads(_read(sock, head))
    except ValueError:
        raise Broken("a frame whose header is not JSON") from None
    if not isinstance(header, dict):
        raise Broken(f"a header is {type(header).__name__}, expected a JSON object")
    body = _read(sock, size)
    return header, body, time.perf_counter() - began


def whole(header: Header, name: str, most: int) -> int:
    """The header's field `name`, a whole number from 0 to `most`. Raises Broken for any other value."""
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Broken(f"{name} is {str(value)[:80]!r}, expected a whole number from 0 to {most}")
    return value


def _read(sock: socket.socket, length: int) -> bytearray:
    frame = bytearray(length)
    view, at = memoryview(frame), 0
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while at < length:
        try:
            if not poll.poll(SILENCE_S * 1000):
                raise Broken(f"the other side has been silent for {SILENCE_S:g} s")
            number = sock.recv_into(view[at:])
        except (OSError, ValueError) as error:  # ValueError: closed on this side
            raise error if isinstance(error, Broken) else Broken(f"the connection broke: {error}") from None
        if not number:
            raise Broken("the other side closed the connection")
        at += number
    return frame


def shut(sock: socket.socket) -> None:
    """End both directions of `sock`. This wakes every thread that waits for it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Link:
    """An open connection. After `start` it calls `received(header, body, seconds)` for each frame, and at its end `ended(why)`
    once, both in its own thread. A Broken that `received` raises ends it.
    """

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._outgoing: queue.PriorityQueue[tuple[bool, int, Frame | None]] = queue.PriorityQueue()
        self._numbers = count()

    def start(self, received: Callable[[Header, bytearray, float], None], ended: Callable[[str], None]) -> None:
        threading.Thread(target=self._send, name="transfer-out", daemon=True).start()
        threading.Thread(target=self._receive, args=(received, ended), name="transfer-in", daemon=True).start()

    def send(self, header: Header, body: bytes | bytearray = b"", *, ahead: bool = False) -> None:
        """Queue a frame, `ahead` of those that are not. It never waits, and may be called in any thread. After the connection's end
        the frame is dropped.
        """
        self._outgoing.put((not ahead, next(self._numbers), (header, body)))

    def close(self) -> None:
        """End the connection; `ended` is called. It may be called in any thread, and more than once."""
        shut(self._sock)

    def _send(self) -> None:
        while True:
            try:
                _, _, frame = self._outgoing.get(timeout=ALIVE_S)
            except queue.Empty:
                frame = ALIVE, b""
            if frame is None:
                return
            try:
                send(self._sock, *frame)
            except OSError:
                self.close()
                return

    def _receive(self, received: Callable[[Header, bytearray, float], None], ended: Callable[[str], None]) -> None:
        try:
            while True:
                received(*receive(self._sock))
        except Broken as error:
            ended(str(error))
        except Exception as error:  # a bug here must not leave the other side waiting
            log.exception("a frame could not be taken")
            ended(f"{type(error).__name__}: {error}")
        finally:
            self.close()
            self._outgoing.put((False, -1, None))
            self._sock.close()
