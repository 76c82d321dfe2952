"""What two engines say to each other: a header of a few words as JSON, and bytes behind it, over a connection that is alive as long
as something comes. No pickle; what is too long, or is no frame, ends the connection. It knows no meaning of any frame.
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
from typing import Any

log = logging.getLogger(__name__)

MOST_HEADER = 1 << 20
MOST_BODY = 256 << 20
"""Bytes. A frame that says it is longer is refused before anything of it is read."""
ALIVE_S = 1.0
"""Seconds of silence after which a side says that it is alive."""
SILENCE_S = 5.0
"""Seconds of silence after which the other side is given up."""
ALIVE = {"type": "alive"}

Header = dict[str, Any]


class Broken(ConnectionError):
    """The other side is gone, silent, or says what it must not."""


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
        raise Broken(f"a frame of {head:,} and {size:,} bytes is longer than the {MOST_HEADER:,} and {most_body:,} that can be")
    try:
        header = json.loads(_read(sock, head))
    except ValueError:
        raise Broken("a frame without a header that can be read") from None
    if not isinstance(header, dict):
        raise Broken(f"a header is {type(header).__name__}, expected a table")
    body = _read(sock, size)
    return header, body, time.perf_counter() - began


def whole(header: Header, name: str, most: int) -> int:
    """A whole number from 0 to `most` out of a header. Raises Broken."""
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Broken(f"{name} is {str(value)[:80]!r}, expected a whole number from 0 to {most}")
    return value


def _read(sock: socket.socket, length: int) -> bytearray:
    found = bytearray(length)
    view, at = memoryview(found), 0
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
    return found


def shut(sock: socket.socket) -> None:
    """Wake whoever waits for `sock`, in any thread: nothing more comes or goes."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Link:
    """An open connection. From `start` to its end `received(header, body, seconds)` is called for each frame, and then `ended(why)`
    once, both in a thread of the link. A Broken that `received` raises ends it.
    """

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._outgoing: queue.SimpleQueue[tuple[Header, bytes | bytearray] | None] = queue.SimpleQueue()

    def start(self, received: Callable[[Header, bytearray, float], None], ended: Callable[[str], None]) -> None:
        threading.Thread(target=self._send, name="transfer-out", daemon=True).start()
        threading.Thread(target=self._receive, args=(received, ended), name="transfer-in", daemon=True).start()

    def send(self, header: Header, body: bytes | bytearray = b"") -> None:
        """Never waits, from any thread; dropped if the connection has ended."""
        self._outgoing.put((header, body))

    def close(self) -> None:
        """End it; `ended` is called. From any thread, as often as you like."""
        shut(self._sock)

    def _send(self) -> None:
        while True:
            try:
                item = self._outgoing.get(timeout=ALIVE_S)
            except queue.Empty:
                item = ALIVE, b""
            if item is None:
                return
            try:
                send(self._sock, *item)
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
            self._outgoing.put(None)
            self._sock.close()
