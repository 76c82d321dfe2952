"""The side that decodes. It reserves blocks, asks a prefill engine for a prompt, writes the blocks that arrive into its own cache,
and lets the request decode once all have arrived. It does not know how the prefill engine schedules.

All steps of a transfer happen in the engine's thread, between two iterations, so a block is written only while it is reserved for
its request. A transfer that fails goes to the next peer. Without one, the prompt is computed here: this side is a whole engine.
"""

import logging
import math
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import cast

from stallfree.core.request import Request
from stallfree.engine.adapters import name_of
from stallfree.engine.prefetch import Transfer
from stallfree.engine.thread import EngineThread
from stallfree.executors.base import MovesKV, MovesLayers
from stallfree.executors.sampling import GREEDY, Sampling, TokenLogprob, to_values
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import Broken, Header, Link, whole
from stallfree.transfer.pieces import Arrived, Piece
from stallfree.transfer.terms import Refusal, Terms, address, connect

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Seconds between two attempts to connect to a peer."""
CONNECT_S = 5.0
STALE_S = 60.0
"""Seconds without a block after which the next peer is asked for the prompt."""
MOST_UNKNOWN = 64
"""At most this many unknown names of prefill engines are logged, because a client can make up any number."""


class Asking:
    """Asks the prefill engines at `addresses` (host, port), in turn, for `thread`'s engine. `terms` and `key`: as in `Serving`."""

    def __init__(self, thread: EngineThread, terms: Terms, addresses: Sequence[tuple[str, int]], key: str):
        self.thread, self.terms = thread, terms
        self.peers = [_Peer(self, host, port, key) for host, port in addresses]
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

    def transfers(self, name: str | None) -> Callable[[], Transfer]:
        """A function that makes the `Transfer` of a request. `name`: the peer (host:port) to ask first. It is a hint: for an
        unknown name the peers are asked in turn, and the log says so once.
        """
        named = next((peer for peer in self.peers if peer.name == name), None)
        if name is not None and named is None:
            self._warn_of(name[:80])
        return lambda: _Transfer(self, named)

    @property
    def form(self) -> Form | None:
        return Form.of(self.terms.transfer_kv, self.thread.engine.executor)

    @property
    def num_connected(self) -> int:
        return sum(peer.link is not None for peer in self.peers)

    def order(self, first: "_Peer | None") -> "list[_Peer]":
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


class _Peer:
    """A prefill engine: the connection to it, which is renewed after each loss, and its `transfers`. Only the engine's thread uses
    `link`, `ring` and `transfers`. `trouble`: the connection error that was logged last.
    """

    def __init__(self, asking: Asking, host: str, port: int, key: str):
        self.host, self.port, self.key = host, port, key
        self.name = address(host, port)
        self.link: Link | None = None
        self.ring: memoryview | None = None
        self.transfers: dict[int, _Transfer] = {}
        self.trouble = ""
        self._asking = asking
        self._over = threading.Event()
        self._closed = threading.Event()

    def run(self) -> None:
        """Connect, and connect again after each loss, until `close`."""
        again = ""
        while not self._closed.is_set():
            try:
                sock, ring = connect(self.host, self.port, self._asking.terms, self.key, CONNECT_S)
            except (OSError, Refusal) as error:
                if str(error) != self.trouble:
                    self.trouble = str(error)
                    log.warning("prefill engine %s: %s; trying again", self.name, self.trouble)
                self._closed.wait(RETRY_S)
                continue
            medium = "by TCP" if ring is None else "by shared memory"
            level = logging.WARNING if self.trouble or again else logging.INFO  # the level of the message that it corrects
            log.log(level, "prefill engine %s is connected%s, %s", self.name, again, medium)
            self.trouble, again, link = "", " again", Link(sock)
            self._over.clear()
            self._asking.thread.call(partial(self._begin, link, ring))
            link.start(partial(self._pass_frame, link), partial(self._pass_end, link))
            while not self._over.wait(RETRY_S):
                if self._closed.is_set():
                    link.close()
            self._closed.wait(RETRY_S)

    def close(self) -> None:
        self._closed.set()

    def _pass_frame(self, link: Link, header: Header, body: bytearray, seconds: float) -> None:
        self._asking.thread.call(partial(self._received, link, header, body, seconds))

    def _pass_end(self, link: Link, why: str) -> None:
        self._asking.thread.call(partial(self._end, link, why))
        self._over.set()

    def _begin(self, link: Link, ring: memoryview | None) -> None:
        self.link, self.ring = link, ring

    def _end(self, link: Link, why: str) -> None:
        if self.link is link:
            log.warning("prefill engine %s is lost: %s", self.name, why)
            self.link = self.ring = None
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
            case "done" if transfer is not None:
                transfer.done(header)
            case "failed" if transfer is not None:
                transfer.failed(str(header.get("why"))[:300])
            case "done" | "failed":
                pass
            case other:
                raise Broken(f"a frame of unknown type {str(other)[:80]!r}")

    def _give_up_stale(self) -> None:
        for transfer in list(self.transfers.values()):
            if time.monotonic() - transfer.heard > STALE_S:
                transfer.stop()
                transfer.failed(f"no block for {STALE_S:g} s")


class _Transfer:
    """One request's KV transfer, a `Transfer`: the peer that was asked, and the blocks so far. Only the engine's thread uses it."""

    def __init__(self, asking: Asking, preferred: _Peer | None):
        self._asking, self._preferred = asking, preferred
        self._engine = asking.thread.engine
        self._executor = cast(MovesKV, self._engine.executor)
        self._peer: _Peer | None = None
        self._number = 0
        self._num_bytes, self._seconds = 0, 0.0
        self.heard = 0.0

    def start(self, request: Request) -> None:
        size = self._asking.terms.block_size
        self._request = request
        self._first, self._blocks = request.num_cached // size, -(-len(request.prompt) // size)
        self._left = self._asking.order(self._preferred)
        self._ask()

    def cancel(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Cancel the transfer at the peer that was asked."""
        peer, self._peer = self._peer, None
        if peer is not None and peer.transfers.pop(self._number, None) is not None and peer.link is not None:
            peer.link.send({"type": "cancel", "number": self._number})

    def write(self, piece: Piece, memory: memoryview, seconds: float) -> None:
        """Write a piece of the KV, which arrived in `seconds`. Raises Broken unless it is the next one."""
        self._arrived.add(piece)
        began = time.perf_counter()
        try:
            form = self._asking.form
            kv = memory if form is None else memoryview(form.unpack(memory, piece.blocks, piece.num_layers))
            blocks = self._request.blocks[piece.first : piece.end]
            if piece.layers is None:
                self._executor.write_blocks(blocks, kv)
            else:
                cast(MovesLayers, self._executor).write_layers(blocks, piece.layers, kv)
        except Exception as error:  # it must not end the engine
            log.exception("KV could not be written")
            self.stop()
            self.failed(f"its KV could not be written: {type(error).__name__}")
            return
        self._num_bytes += len(memory)
        self._seconds += seconds + time.perf_counter() - began
        self.heard = time.monotonic()

    def done(self, header: Header) -> None:
        """Deliver the request with its first token. Raises Broken if blocks are missing."""
        token = whole(header, "token", self._engine.text.vocab_size - 1)
        self._arrived.check()
        details, copying = _details(header.get("details")), header.get("seconds")
        self._drop()
        seconds = self._seconds + (copying if isinstance(copying, float) and 0 <= copying < math.inf else 0.0)
        self._engine.prefetch.deliver(self._request, token, details, self._num_bytes, seconds)

    def failed(self, why: str) -> None:
        """Ask the next peer, or have the prompt computed here."""
        log.warning("request %s: its KV transfer failed: %s", self._request.id, why)
        self._drop()
        self._ask()

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.transfers.pop(self._number, None)
            self._peer = None

    def _ask(self) -> None:
        while self._left:
            peer = self._left.pop(0)
            if peer.link is not None:
                self._peer, self._number = peer, next(self._asking.numbers)
                self._arrived = Arrived(self._first, self._blocks, self._asking.terms.num_layers)
                self.heard = time.monotonic()
                peer.transfers[self._number] = self
                peer.link.send(self._header(), _packed(self._request.prompt))
                return
        self._engine.prefetch.recall(self._request)

    def _header(self) -> Header:
        request = self._request
        sampling = request.sampling if isinstance(request.sampling, Sampling) else GREEDY
        return {
            "type": "prefill",
            "number": self._number,
            "first": self._first,
            "sampling": to_values(sampling),
            "salt": request.salt,
            "priority": request.priority,
            "slo": "" if request.slo is None else str(request.slo),
            "tenant": request.tenant,
            "weight": request.weight,
            "class": request.service_class,
            **self._adapter(),
        }

    def _adapter(self) -> Header:
        """Of the adapter, its name and a name of its contents: the same name may mean another adapter there."""
        key = self._request.adapter
        return {"adapter": name_of(key), "identity": self._engine.adapters.identity(key)} if key else {}


def _packed(tokens: Sequence[int]) -> bytes:
    numbers = array("i", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _details(field: object) -> TokenLogprob | None:
    if field is None:
        return None
    try:
        logprob, top = cast(tuple[float, list[tuple[int, float]]], field)
        return TokenLogprob(float(logprob), tuple((int(token), float(value)) for token, value in top))
    except (TypeError, ValueError):
        raise Broken("log-probabilities that cannot be read") from None
