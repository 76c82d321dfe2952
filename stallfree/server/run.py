"""Runs an app as a process: a port, connections that must make progress, and a shutdown that lets streams finish.

It knows uvicorn and signals; it does not know what the app serves.
"""

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType
from typing import Protocol, Self

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from stallfree.server.tls import Tls

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 60.0
"""Seconds within which a slow client must read something."""
HEAD_TIMEOUT_S = 30.0
"""Seconds within which a new connection must send a request's head."""
KEEP_ALIVE_S = 30
"""Seconds that a connection may idle between two requests."""
FLUSH_S = 5
"""Seconds to send the last bytes of answers after the engine has stopped."""


class Drains(Protocol):
    """What an app serves and drains at shutdown: an engine, or a router."""

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""

    async def close(self, drain_timeout_s: float) -> None:
        """Take no new requests. Give the others `drain_timeout_s` to finish, end the rest with an error, and stop. While it waits,
        it may be cancelled and called again.
        """


class PortError(OSError):
    """The server cannot listen on an address; the message names it and the way out."""


def bind(host: str, port: int, kind: str = "") -> socket.socket:
    """A socket that listens on `host`:`port` (0: any free port). Call it before anything costly is loaded. Raises PortError, which
    names the options --host and --port; with the `kind` "peer-", --peer-host and --peer-port.

    Clients can connect at once; they get answers after `run` takes the socket.
    """
    try:
        family, type_, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, type_, protocol)
    except OSError as error:
        raise PortError(f"cannot listen on host {host!r}: {error.strerror or error}; give another --{kind}host") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortError(f"port {port} on {host} is in use; stop what uses it, or give another with --{kind}port") from None
        if error.errno == errno.EACCES:
            raise PortError(f"port {port} is reserved for the system; give one from 1024 on with --{kind}port") from None
        raise PortError(
            f"cannot listen on {host} port {port}: {error.strerror}; give another --{kind}host or --{kind}port"
        ) from None
    return sock


class Hangups:
    """In a `with`, SIGHUP calls `action` instead of ending the process. Calls begin once `run` serves, in its event loop; signals
    before that make one call then. For the main thread."""

    def __init__(self, action: Callable[[], None]):
        self._action = action
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_due = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGHUP, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        signal.signal(signal.SIGHUP, self._before)

    def begin(self) -> None:
        """Make the calls in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        if self._is_due:
            self._action()

    def _handle(self, sig: int, frame: FrameType | None) -> None:
        self._is_due = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._action)


def run(
    app: FastAPI,
    served: Drains,
    sock: socket.socket,
    *,
    drain_timeout_s: float,
    tls: Tls | None = None,
    hangups: Hangups | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Then take no new requests, let the others finish, and return. `served`: see `Drains`. `tls`:
    serve https alone. `hangups`: what SIGHUP does, instead of ending the process.

    Requests that are unfinished after `drain_timeout_s`, or at a second signal, end with an error. Raises SystemExit after a second
    signal. A third one ends the process at once.
    """
    server = _Server(configure(app, tls), served, drain_timeout_s, hangups)
    server.run(sockets=[sock])
    if server.hurried:
        raise SystemExit(128 + server.hurried)


def configure(app: FastAPI, tls: Tls | None = None) -> uvicorn.Config:
    """uvicorn's configuration to serve `app`, with `tls` by https. Its log lines go where those of the process go."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else tls.key,
    )


class _Server(uvicorn.Server):
    """A uvicorn server that drains its engine or router before it closes its port. `hurried`: the second signal, else 0."""

    def __init__(self, config: uvicorn.Config, served: Drains, drain_timeout_s: float, hangups: Hangups | None):
        super().__init__(config)
        self._hangups = hangups
        self._served = served
        self._drain_timeout_s = drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0
        self.hurried = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._hangups is not None:
            self._hangups.begin()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 2 or self._loop is None:
            os._exit(128 + sig)
        self._loop.call_soon_threadsafe(self._begin_to_drain if self._signals == 1 else partial(self._hurry, sig))

    def _begin_to_drain(self) -> None:
        if number := self._served.unfinished:
            unfinished = "1 request has" if number == 1 else f"{number} requests have"
            limit = f"up to {self._drain_timeout_s:g} s to finish; Ctrl-C again (or a second SIGTERM) ends them at once"
            log.warning("shutting down: no new requests are taken, %s %s", unfinished, limit)
        self._draining = asyncio.create_task(self._drain(self._drain_timeout_s))

    def _hurry(self, sig: int) -> None:
        self.hurried = sig
        if self._draining is not None and not self._draining.done():
            rest = self._served.unfinished
            log.warning("ending the unfinished requests (%d); a third signal ends the process where it is", rest)
            self._draining.cancel()
            self._draining = asyncio.create_task(self._drain(0))

    async def _drain(self, timeout_s: float) -> None:
        await self._served.close(timeout_s)
        self.should_exit = True


class Connection(H11Protocol):
    """An HTTP connection that closes if its client sends no request, or does not read its answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn narrows it
        super().connection_made(transport)
        self._read_timer: asyncio.TimerHandle | None = None
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._read_timer, self._head_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
        elif not waiting and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """The client reads too slowly. `close` would wait for it to read; `abort` does not."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        super().resume_writing()
