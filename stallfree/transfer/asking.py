"""The side that decodes: it has blocks reserved, asks a prefill engine for a prompt, writes the blocks that come into its own
cache, and lets the request decode once all are there.

Everything that becomes of a transfer happens in the engine's thread, between two iterations, so a block is written only while
it is reserved for the request that it is for. A transfer that fails goes to the next peer; if there is none, the prompt is computed
here: the side that decodes is a whole engine.
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
from stallfree.engine.prefetch import Transfer
from stallfree.engine.thread import EngineThread
from stallfree.executors.base import MovesKV
from stallfree.executors.sampling import GREEDY, Sampling, TokenLogprob, to_values
from stallfree.transfer.frames import Broken, Header, Link, whole
from stallfree.transfer.terms import Refusal, Terms, address, connect

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""Seconds between two attempts to connect."""
CONNECT_S = 5.0
STALE_S = 60.0
"""Seconds without a block after which a prompt is asked of somebody else."""
MOST_UNKNOWN = 64
"""Names of prefill engines that this one does not have, of which the log says so; a caller can make up any number."""


class Asking:
    """Asks the prefill engines at `addresses` (host, port), in turns, for `thread`'s engine. See `Serving` for the rest."""

    def __init__(self, thread: EngineThread, terms: Terms, addresses: Sequence[tuple[str, int]], key: str):
        self.thread, self.terms = thread, terms
        self.peers = [_Peer(self, host, port, key) for host, port in addresses]
        self.numbers = count()
        self._turn = 0
        self._unknown: set[str] = set()

    def check(self) -> None:
        """Raise Refusal for a peer that is there and cannot work with this engine. One that is not there may come yet."""
        for peer in self.peers:
            try:
                connect(peer.host, peer.port, self.terms, peer.key, CONNECT_S)[0].close()
            except Refusal as refusal:
                raise Refusal(f"prefill engine {peer.name}: {refusal}") from None
            except OSError as error:
                peer.said = str(error)
                log.warning("prefill engine %s: %s; until it is there, prompts are computed here", peer.name, error)

    def start(self) -> None:
        for peer in self.peers:
            threading.Thread(target=peer.run, name=f"transfer {peer.name}", daemon=True).start()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()

    def transfers(self, name: str | None) -> Callable[[], Transfer]:
        """What makes the `Transfer` of a request; `name`: the peer, as host:port, that is to be asked first. It is a hint: for one
        that was not configured they are asked in turns, and the log says so once.
        """
        found = next((peer for peer in self.peers if peer.name == name), None)
        if name is not None and found is None:
            self._warn_of(name[:80])
        return lambda: _Transfer(self, found)

    @property
    def num_connected(self) -> int:
        return sum(peer.link is not None for peer in self.peers)

    def order(self, first: "_Peer | None") -> "list[_Peer]":
        """All peers, `first` first, else whoever's turn it is."""
        begin = self._turn % len(self.peers) if first is None else self.peers.index(first)
        self._turn += 1
        return self.peers[begin:] + self.peers[:begin]

    def _warn_of(self, name: str) -> None:
        if name in self._unknown or len(self._unknown) >= MOST_UNKNOWN:
            return
        self._unknown.add(name)
        known = ", ".join(peer.name for peer in self.peers)
        log.warning("%r, named by a router, is no prefill engine of this server; it asks in turns: %s", name, known)


class _Peer:
    """A prefill engine: the connection to it, made again and again, and what was asked of it. `link`, `ring` and `transfers` are
    the engine's thread's; `said` is the trouble with it that the log told of last.
    """

    def __init__(self, asking: Asking, host: str, port: int, key: str):
        self.host, self.port, self.key = host, port, key
        self.name = address(host, port)
        self.link: Link | None = None
        self.ring: memoryview | None = None
        self.transfers: dict[int, _Transfer] = {}
        self.said = ""
        self._asking = asking
        self._over = threading.Event()
        self._closed = threading.Event()

    def run(self) -> None:
        """Stay connected, until `close`."""
        again = ""
        while not self._closed.is_set():
            try:
                sock, ring = connect(self.host, self.port, self._asking.terms, self.key, CONNECT_S)
            except (OSError, Refusal) as error:
                if str(error) != self.said:
                    self.said = str(error)
                    log.warning("prefill engine %s: %s; trying again", self.name, self.said)
                self._closed.wait(RETRY_S)
                continue
            way = "by TCP" if ring is None else "by shared memory"
            level = logging.WARNING if self.said or again else logging.INFO  # as loud as what it takes back
            log.log(level, "prefill engine %s is connected%s, %s", self.name, again, way)
            self.said, again, link = "", " again", Link(sock)
            self._over.clear()
            self._asking.thread.call(partial(self._begin, link, ring))
            link.start(partial(self._came, link), partial(self._ended, link))
            while not self._over.wait(RETRY_S):
                if self._closed.is_set():
                    link.close()
            self._closed.wait(RETRY_S)

    def close(self) -> None:
        self._closed.set()

    def _came(self, link: Link, header: Header, body: bytearray, seconds: float) -> None:
        self._asking.thread.call(partial(self._received, link, header, body, seconds))

    def _ended(self, link: Link, why: str) -> None:
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
        """A frame, in the engine's thread. One that cannot be ends the connection, and with it all that was asked."""
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
        transfer = self.transfers.get(whole(header, "number", 2**63))  # None: it was cancelled, so what comes is dropped
        match kind:
            case "blocks":
                memory = memoryview(body)
                most = self._asking.thread.engine.executor.capacity.num_blocks
                size = whole(header, "count", most) * self._asking.terms.block_bytes
                if "at" in header:
                    at = whole(header, "at", len(self.ring or b""))
                    memory = memoryview(b"" if self.ring is None else self.ring)[at : at + size]
                if len(memory) != size:
                    raise Broken(f"{len(memory):,} bytes for blocks of {size:,}")
                if transfer is not None:
                    transfer.write(whole(header, "first", 2**31), memory, seconds)
                if "at" in header:
                    link.send({"type": "taken"})
            case "done" if transfer is not None:
                transfer.done(header)
            case "failed" if transfer is not None:
                transfer.failed(str(header.get("why"))[:300])
            case "done" | "failed":
                pass
            case other:
                raise Broken(f"a frame of type {str(other)[:80]!r}, which there is not")

    def _give_up_stale(self) -> None:
        for transfer in list(self.transfers.values()):
            if time.monotonic() - transfer.heard > STALE_S:
                transfer.stop()
                transfer.failed(f"no block for {STALE_S:g} s")


class _Transfer:
    """One request's prompt on its way, a `Transfer`: whom it was asked of, and which blocks have come. In the engine's thread."""

    def __init__(self, asking: Asking, wanted: _Peer | None):
        self._asking, self._wanted = asking, wanted
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
        self._left = self._asking.order(self._wanted)
        self._ask()

    def cancel(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Want no more of it from whom it was asked."""
        peer, self._peer = self._peer, None
        if peer is not None and peer.transfers.pop(self._number, None) is not None and peer.link is not None:
            peer.link.send({"type": "cancel", "number": self._number})

    def write(self, first: int, memory: memoryview, seconds: float) -> None:
        """Blocks from `first` on have come, in `seconds`. Raises Broken for others than the next ones."""
        number = len(memory) // self._asking.terms.block_bytes
        if first != self._next or not number or first + number > self._blocks:
            raise Broken(f"blocks {first} to {first + number} came, expected {self._next} to at most {self._blocks}")
        began = time.perf_counter()
        try:
            self._executor.write_blocks(self._request.blocks[first : first + number], memory)
        except Exception as error:  # it must not take the engine along
            log.exception("KV could not be written")
            self.stop()
            self.failed(f"its KV could not be written: {type(error).__name__}")
            return
        self._next += number
        self._num_bytes += len(memory)
        self._seconds += seconds + time.perf_counter() - began
        self.heard = time.monotonic()

    def done(self, header: Header) -> None:
        """All has come, with the first token. Raises Broken if it has not."""
        token = whole(header, "token", self._engine.text.vocab_size - 1)
        if self._next != self._blocks:
            raise Broken(f"the first token came behind {self._next} blocks of {self._blocks}")
        details, there = _details(header.get("details")), header.get("seconds")
        self._drop()
        seconds = self._seconds + (there if isinstance(there, float) and 0 <= there < math.inf else 0.0)
        self._engine.prefetch.deliver(self._request, token, details, self._num_bytes, seconds)

    def failed(self, why: str) -> None:
        """Try the next peer, or compute it here."""
        log.warning("request %s: its prompt did not come: %s", self._request.id, why)
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
                self._peer, self._number, self._next = peer, next(self._asking.numbers), self._first
                self.heard = time.monotonic()
                peer.transfers[self._number] = self
                peer.link.send(self._header(), _packed(self._request.prompt))
                return
        self._engine.prefetch.recall(self._request)

    def _header(self) -> Header:
        request = self._request
        how = request.sampling if isinstance(request.sampling, Sampling) else GREEDY
        return {
            "type": "prefill",
            "number": self._number,
            "first": self._first,
            "sampling": to_values(how),
            "priority": request.priority,
            "slo": "" if request.slo is None else str(request.slo),
        }


def _packed(tokens: Sequence[int]) -> bytes:
    numbers = array("i", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _details(said: object) -> TokenLogprob | None:
    if said is None:
        return None
    try:
        logprob, top = cast(tuple[float, list[tuple[int, float]]], said)
        return TokenLogprob(float(logprob), tuple((int(token), float(value)) for token, value in top))
    except (TypeError, ValueError):
        raise Broken("log-probabilities that cannot be read") from None
