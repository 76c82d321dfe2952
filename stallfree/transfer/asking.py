"""The side that decodes: its connections to prefill engines, and the frames that come over them. What becomes of a request is in
`fetch`. It does not know how a prefill engine schedules.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import cast

from stallfree.core.request import Request
from stallfree.engine.prefetch import Transfer
from stallfree.engine.thread import EngineThread
from stallfree.executors.base import KVLine, LinksKV
from stallfree.transfer.cut import WHOLE, Cut
from stallfree.transfer.fetch import Fetch
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import Broken, Header, Link, whole
from stallfree.transfer.line import meeting
from stallfree.transfer.pieces import Piece
from stallfree.transfer.terms import Refusal, Terms, address, connect

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Seconds between two attempts to connect to a peer."""
CONNECT_S = 5.0
STALE_S = 60.0
"""Seconds without a block or token after which the next peer is asked for the prompt."""
MOST_UNKNOWN = 64
"""At most this many unknown names of prefill engines are logged, because a client can make up any number."""


class Asking:
    """Asks the prefill engines at `addresses` (host, port), in turn, for `thread`'s engine. `terms` and `key`: as in `Serving`."""

    def __init__(self, thread: EngineThread, terms: Terms, addresses: Sequence[tuple[str, int]], key: str):
        self.thread, self.terms = thread, terms
        self.peers = [Peer(self, host, port, key) for host, port in addresses]
        self.numbers = count()
        self._turn = 0
        self._unknown: set[str] = set()

    def check(self) -> None:
        """Raise Refusal for a peer that answers but cannot work with this engine. One that does not answer may start later."""
        for peer in self.peers:
            try:
                connect(peer.host, peer.port, self.terms, peer.key, CONNECT_S)[0].close()
            except Refusal as refusal:
                raise Refusal(f"prefill engine {peer.name}: {refusal}") from None
            except OSError as error:
                peer.trouble = str(error)
                log.warning("prefill engine %s: %s; until it answers, prompts are computed here", peer.name, error)

    def start(self) -> None:
        for peer in self.peers:
            threading.Thread(target=peer.run, name=f"transfer {peer.name}", daemon=True).start()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()

    def transfers(self, name: str | None, cut: Cut = WHOLE) -> Callable[[Request], Transfer]:
        """A function that makes the `Transfer` of a request. `name`: the peer (host:port) to ask first. It is a hint: for an
        unknown name the peers are asked in turn, and the log says so once. `cut`: how many of the request's first tokens to ask
        for.
        """
        named = next((peer for peer in self.peers if peer.name == name), None)
        if name is not None and named is None:
            self._warn_of(name[:80])
        return lambda request: Fetch(self, named, cut.of(len(request.prompt)))

    @property
    def form(self) -> Form | None:
        return Form.of(self.terms.transfer_kv, self.thread.engine.executor)

    @property
    def num_connected(self) -> int:
        return sum(peer.link is not None for peer in self.peers)

    def order(self, first: "Peer | None") -> "list[Peer]":
        """All peers, from `first` on; if that is None, from the one whose turn it is."""
        begin = self._turn % len(self.peers) if first is None else self.peers.index(first)
        self._turn += 1
        return self.peers[begin:] + self.peers[:begin]

    def _warn_of(self, name: str) -> None:
        if name in self._unknown or len(self._unknown) >= MOST_UNKNOWN:
            return
        self._unknown.add(name)
        known = ", ".join(peer.name for peer in self.peers)
        log.warning("%r, named by a router, is not a prefill engine of this server; it asks in turn: %s", name, known)


class Peer:
    """A prefill engine: the connection to it, which is renewed after each loss, and its `transfers`. Only the engine's thread uses
    `link`, `ring` and `transfers`. `trouble`: the connection error that was logged last.
    """

    def __init__(self, asking: Asking, host: str, port: int, key: str):
        self.host, self.port, self.key = host, port, key
        self.name = address(host, port)
        self.link: Link | None = None
        self.ring: memoryview | None = None
        self.transfers: dict[int, Fetch] = {}
        self.trouble = ""
        self._line: KVLine | None = None
        self._asking = asking
        self._over = threading.Event()
        self._closed = threading.Event()

    def run(self) -> None:
        """Connect, and connect again after each loss, until `close`."""
        again = ""
        while not self._closed.is_set():
            try:
                sock, met = connect(self.host, self.port, self._asking.terms, self.key, CONNECT_S)
            except (OSError, Refusal) as error:
                if str(error) != self.trouble:
                    self.trouble = str(error)
                    log.warning("prefill engine %s: %s; trying again", self.name, self.trouble)
                self._closed.wait(RETRY_S)
                continue
            medium = "by TCP" if met.memory is None else "by shared memory"
            level = logging.WARNING if self.trouble or again else logging.INFO  # the level of the message that it corrects
            log.log(level, "prefill engine %s is connected%s, %s", self.name, again, medium)
            self.trouble, again, link = "", " again", Link(sock)
            self._over.clear()
            self._asking.thread.call(partial(self._begin, link, met.memory))
            link.start(partial(self._pass_frame, link), partial(self._pass_end, link))
            if met.line:
                self._open_line(link)
            while not self._over.wait(RETRY_S):
                if self._closed.is_set():
                    link.close()
            self._closed.wait(RETRY_S)

    def close(self) -> None:
        self._closed.set()

    def _pass_frame(self, link: Link, header: Header, body: bytearray, seconds: float) -> None:
        self._asking.thread.call(partial(self._received, link, header, body, seconds))

    def _open_line(self, link: Link) -> None:
        """Open a line to the devices of the prefill engine. Without one, KV goes through the memory of this machine."""
        executor = cast(LinksKV, self._asking.thread.engine.executor)
        try:
            with meeting() as path:
                link.send({"type": "line", "name": path.name})
                line = executor.open_line(str(path), 0, link.close)
        except (OSError, RuntimeError) as error:
            log.warning("prefill engine %s: no line between the devices (%s); KV goes through the host's memory", self.name, error)
            link.send({"type": "line", "open": False})
            return
        self._asking.thread.call(partial(self._use_line, link, line))  # before any KV comes by it
        link.send({"type": "line", "open": True})
        log.info("prefill engine %s: KV goes from device to device", self.name)

    def _use_line(self, link: Link, line: KVLine) -> None:
        if self.link is link:
            self._line = line
        else:
            line.close()

    def _pass_end(self, link: Link, why: str) -> None:
        if self._line is not None:
            self._line.close()  # at once: the engine's thread may wait for it
        self._asking.thread.call(partial(self._end, link, why))
        self._over.set()

    def _begin(self, link: Link, ring: memoryview | None) -> None:
        self.link, self.ring = link, ring

    def _end(self, link: Link, why: str) -> None:
        if self.link is link:
            log.warning("prefill engine %s is lost: %s", self.name, why)
            self.link = self.ring = self._line = None
            for transfer in list(self.transfers.values()):
                transfer.failed(why)

    def _received(self, link: Link, header: Header, body: bytearray, seconds: float) -> None:
        """Take a frame, in the engine's thread. An invalid one ends the connection, and with it all its transfers."""
        if self.link is not link:
            return
        try:
            self._take(link, header, body, seconds)
        except Broken as error:
            link.close()
            self._end(link, str(error))

    def _take(self, link: Link, header: Header, body: bytearray, seconds: float) -> None:
        kind = header.get("type")
        if kind == "alive":
            self._give_up_stale()
            return
        transfer = self.transfers.get(whole(header, "number", 2**63))  # None: it was cancelled, and its frames are dropped
        match kind:
            case "blocks":
                memory = memoryview(body)
                terms, form = self._asking.terms, self._asking.form
                piece = Piece.of(header, self._asking.thread.engine.executor.capacity.num_blocks, terms.num_layers)
                raw = piece.size(terms.block_bytes, terms.num_layers)
                if "line" in header:
                    into = self._by_line(piece)
                    if transfer is not None:
                        transfer.place(piece, into, raw, 0.0)
                    return
                size = raw if form is None else form.size(piece.blocks, piece.num_layers)
                if "at" in header:
                    at = whole(header, "at", len(self.ring or b""))
                    memory = memoryview(b"" if self.ring is None else self.ring)[at : at + size]
                if len(memory) != size:
                    raise Broken(f"{len(memory):,} bytes for blocks of {size:,}")
                if transfer is not None:
                    transfer.write(piece, memory, seconds)
                if "at" in header:
                    link.send({"type": "taken"})
            case "token" if transfer is not None:
                transfer.extend(header)
            case "done" if transfer is not None:
                transfer.done(header)
            case "failed" if transfer is not None:
                transfer.failed(str(header.get("why"))[:300])
            case "token" | "done" | "failed":
                pass
            case other:
                raise Broken(f"a frame of unknown type {str(other)[:80]!r}")

    def _by_line(self, piece: Piece) -> Callable[[Sequence[int]], None]:
        if self._line is None or piece.layers is None:
            raise Broken("KV was sent by a line that is not open, or with all its layers")
        try:
            return self._line.receive(piece.blocks, piece.layers)
        except RuntimeError as error:
            raise Broken(f"KV did not come by the line: {error}") from None

    def _give_up_stale(self) -> None:
        for transfer in list(self.transfers.values()):
            if time.monotonic() - transfer.heard > STALE_S:
                transfer.stop()
                transfer.failed(f"no block or token for {STALE_S:g} s")
