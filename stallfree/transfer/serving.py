"""The side that prefills. Decode engines connect and ask for prompts. They get the KV blocks as iterations fill them, then the
first token. For its own engine each prompt is a request of one token. It does not know how the other side reserves blocks.

Blocks are copied in the engine's thread, right after an iteration, before any request can write over them. If both executors move
layers, some layers are copied while the iteration computes the next ones; the last copy is still waited for after the iteration.
They go into the memory shared with the decode engine if it has room, else into a frame. The other side bounds the work: it asks
only for prompts that it has reserved blocks for.
"""

import asyncio
import errno
import logging
import math
import secrets
import socket
import sys
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import cast

from stallfree.core.plan import Work
from stallfree.core.request import Refused, Request
from stallfree.core.slo import Slo
from stallfree.engine.streams import Output
from stallfree.engine.thread import EngineThread, Outputs, Unavailable
from stallfree.executors.base import MovesKV, MovesLayers
from stallfree.executors.sampling import TokenLogprob, of_values
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import Broken, Header, Link, shut, whole
from stallfree.transfer.pieces import Outgoing, Piece
from stallfree.transfer.ring import Room
from stallfree.transfer.terms import Refusal, Terms, address, welcome

log = logging.getLogger(__name__)

FRAME = 4 << 20
"""Bytes of KV in one frame, about (`Outgoing`). Small frames are sent only where there is nothing to add: on one machine each wakes
four threads, in two processes, while the next chunk or layer is computed.
"""
CALLERS = 64
"""At most this many decode engines may be connected, and at most this many may be meeting."""
MEETING_S = 15.0
"""Seconds within which a decode engine must introduce itself."""
MOST_NUMBER = 2**63


class Serving:
    """Serves decode engines that connect to `sock`, have the same `terms` and know `key` ("": none), on `thread`'s engine."""

    def __init__(self, thread: EngineThread, terms: Terms, sock: socket.socket, key: str):
        self._thread, self._terms, self._sock, self._key = thread, terms, sock, key
        self._callers: set[_Caller] = set()
        self._meetings = threading.BoundedSemaphore(CALLERS)
        self._refused: dict[str, str] = {}
        """The last refusal of each host, of at most CALLERS: a host tries every second, and the log has each reason once."""
        self._lock = threading.Lock()

    def start(self) -> None:
        """Accept connections. Call it in the event loop in which the engine's thread was started."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._accept, name="transfer-door", daemon=True).start()

    def close(self) -> None:
        """Accept no more connections, and close all."""
        shut(self._sock)
        self._sock.close()
        for caller in list(self._callers):
            caller.link.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, (host, port, *_) = self._sock.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(1)
                    continue
                return
            if not self._meetings.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._meet, args=(sock, host, port), daemon=True).start()

    def _meet(self, sock: socket.socket, host: str, port: int) -> None:
        limit = threading.Timer(MEETING_S, shut, [sock])
        limit.daemon = True
        limit.start()
        try:
            if len(self._callers) >= CALLERS:
                raise Refusal(f"{CALLERS} decode engines are connected already")
            ring, num_layers = welcome(sock, self._terms, self._key)
        except (OSError, Refusal) as error:
            if self._is_news(host, str(error)):
                log.warning("the decode engine at %s was refused: %s", address(host, port), error)
            sock.close()
            return
        finally:
            limit.cancel()
            self._meetings.release()
        with self._lock:
            self._refused.pop(host, None)
        caller = _Caller(self._thread, self._loop, self._terms.transfer_kv, Link(sock), ring, num_layers)
        self._callers.add(caller)
        caller.link.start(caller.received, lambda why: self._gone(caller, address(host, port), why))

    def _is_news(self, host: str, why: str) -> bool:
        """Note the refusal of `host`. Returns whether its reason differs from the last one."""
        with self._lock:
            last = self._refused.pop(host, None)
            self._refused[host] = why
            if len(self._refused) > CALLERS:
                del self._refused[next(iter(self._refused))]
            return why != last

    def _gone(self, caller: "_Caller", name: str, why: str) -> None:
        log.info("decode engine %s: %s", name, why)
        self._callers.discard(caller)
        caller.ended()


class _Caller:
    """A decode engine that is connected by `link`, and the prompts it asked for. It takes `num_layers` layers one by one (0: it
    takes only whole blocks).
    """

    def __init__(
        self,
        thread: EngineThread,
        loop: asyncio.AbstractEventLoop,
        transfer_kv: str,
        link: Link,
        ring: memoryview | None,
        num_layers: int,
    ):
        self.link, self._num_layers = link, num_layers
        self._thread, self._loop, self._ring = thread, loop, ring
        self._form = Form.of(transfer_kv, thread.engine.executor)
        self._room = None if ring is None else Room(len(ring))
        self._outputs: dict[int, Outputs] = {}
        self._answers: set[asyncio.Task[None]] = set()

    def received(self, header: Header, body: bytearray, _: float) -> None:
        """Take a frame from the decode engine, in the link's thread. Raises Broken for an invalid one."""
        match header.get("type"):
            case "prefill":
                request = self._request(header, body)
                first = whole(header, "first", len(request.prompt))
                self._do(self._begin, whole(header, "number", MOST_NUMBER), first, request)
            case "cancel":
                self._do(self._cancel, whole(header, "number", MOST_NUMBER))
            case "taken" if self._room is not None:
                try:
                    self._room.free()
                except IndexError:
                    raise Broken("a piece of memory was freed that was not taken") from None
            case "alive":
                pass
            case other:
                raise Broken(f"a frame of unknown type {str(other)[:80]!r}")

    def ended(self) -> None:
        self._do(self._cancel_all)

    def _do(self, call, *args: object) -> None:  # type: ignore[no-untyped-def]  # a method of this class and its arguments
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(call, *args)

    def _request(self, header: Header, body: bytearray) -> Request:
        tokens = array("i")
        try:
            tokens.frombytes(body)
            if sys.byteorder == "big":
                tokens.byteswap()
            sampling = of_values(header["sampling"])
            slo = Slo.parse(str(header["slo"])) if header.get("slo") else None
        except (LookupError, TypeError, ValueError) as error:
            raise Broken(f"a request that cannot be read: {error}") from None
        size = self._thread.engine.text.vocab_size
        if tokens and not (0 <= min(tokens) and max(tokens) < size):
            raise Broken(f"a token id outside the vocabulary of {size}")
        priority, weight = header.get("priority"), header.get("weight", 1.0)
        if not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise Broken(f"a weight of {str(weight)[:20]}, which is no number above 0")
        return Request(
            secrets.token_hex(12),
            tokens.tolist(),
            1,
            arrival=self._thread.engine.clock(),
            priority=priority if isinstance(priority, int) else 0,
            tenant=str(header.get("tenant", "")),
            weight=weight,
            slo=slo,
            service_class=str(header.get("class", "")),
            adapter=self._adapter(header),
            salt=str(header.get("salt", "")),
            sampling=sampling,
        )

    def _adapter(self, header: Header) -> str:
        """The key of the adapter that the decode engine names, or one that is not known: then the request is refused."""
        name, identity = str(header.get("adapter", ""))[:200], str(header.get("identity", ""))[:100]
        if not name:
            return ""
        return self._thread.engine.adapters.find(name, identity) or f"{name} with the contents {identity}"

    def _begin(self, number: int, first: int, request: Request) -> None:
        blocks = _Blocks(self._thread, self._form, self.link, self._ring, self._room, number, first, self._num_layers)
        self._follow(request.id, blocks.computed)
        try:
            self._outputs[number] = outputs = self._thread.submit([request], watch=blocks.watch)
        except (Refused, Unavailable) as error:
            self._follow(request.id, None)
            self.link.send({"type": "failed", "number": number, "why": str(error)})
            return
        task = self._loop.create_task(self._answer(number, outputs, blocks))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        task.add_done_callback(lambda _: self._follow(request.id, None))

    def _follow(self, id: str, computed: Callable[[Work, int], None] | None) -> None:
        if self._num_layers:
            cast(MovesLayers, self._thread.engine.executor).follow(id, computed)

    async def _answer(self, number: int, outputs: Outputs, blocks: "_Blocks") -> None:
        with outputs:
            async for batch in outputs:
                for output in batch:
                    self.link.send(_last(number, output, blocks))
        self._outputs.pop(number, None)

    def _cancel(self, number: int) -> None:
        outputs = self._outputs.pop(number, None)
        if outputs is not None:
            outputs.close()

    def _cancel_all(self) -> None:
        for number in list(self._outputs):
            self._cancel(number)


class _Blocks:
    """Copies the blocks of prompt `number`, from block `first` on, and sends them in `form`, piece by piece (`Outgoing`).
    `num_layers`: as in `_Caller`. `seconds`: spent on copying. The engine's thread calls it.
    """

    def __init__(
        self,
        thread: EngineThread,
        form: Form | None,
        link: Link,
        ring: memoryview | None,
        room: Room | None,
        number: int,
        first: int,
        num_layers: int,
    ):
        self._executor = cast(MovesKV, thread.engine.executor)
        self._block_size = thread.engine.executor.capacity.block_size
        self._form, self._link, self._ring, self._room, self._number = form, link, ring, room, number
        self._outgoing, self._num_layers = Outgoing(first, self._executor.block_bytes, num_layers, FRAME), num_layers
        self._copies: list[tuple[int, threading.Event]] = []
        """Copies under way: the block at which each ends, and whether it was sent or has failed."""
        self.seconds = 0.0
        self.error: str | None = None

    def watch(self, work: Work) -> None:
        """Send the blocks that `work` and earlier work filled, in full frames. With the first token, send all, also a part-filled
        last block. Return once they are copied, because other requests may get the blocks now.
        """
        self.computed(work, None)
        began, upto = time.perf_counter(), self._upto(work)
        for end, sent in self._copies:
            if end <= upto:  # a later one may be of an iteration that was submitted already
                sent.wait()
        self._copies = [each for each in self._copies if each[0] > upto]
        self.seconds += time.perf_counter() - began

    def computed(self, work: Work, layers: int | None) -> None:
        """Send what is due when `layers` layers (None: all) of `work` are computed."""
        began = time.perf_counter()
        try:
            for piece in self._outgoing.due(self._upto(work), layers, last=work.samples) if self.error is None else ():
                self._send(piece, work)
        except Exception as error:
            self._failed(error)
        self.seconds += time.perf_counter() - began

    def _upto(self, work: Work) -> int:
        """The end of the blocks that `work` fills; at the prompt's end, of all its blocks."""
        end = work.start + work.count
        return -(-end // self._block_size) if work.samples else end // self._block_size

    def _send(self, piece: Piece, work: Work) -> None:
        """Copy a piece of the request's blocks, and send it once it is copied."""
        raw = piece.size(self._executor.block_bytes, self._num_layers)
        size = raw if self._form is None else self._form.size(piece.blocks, piece.num_layers)
        header = {"type": "blocks", "number": self._number} | piece.header
        at = None if self._room is None else self._room.take(size)
        body = bytearray(size if at is None else 0)
        memory = memoryview(body)
        if at is not None and self._ring is not None:
            header["at"], memory = at, self._ring[at : at + size]
        kv = memory if self._form is None else memoryview(bytearray(raw))
        tokens = min(self._block_size, work.start + work.count - (piece.end - 1) * self._block_size)
        sent = threading.Event()

        def send(copy: Future[None]) -> None:
            try:
                copy.result()
                if self._form is not None:
                    memory[:] = self._form.pack(kv, piece.blocks, tokens, piece.num_layers)
            except Exception as error:
                self._failed(error)
            self._link.send(header, body)  # after a failure, too: the other side drops it, and frees its memory
            sent.set()

        self._copied(piece, work.blocks[piece.first : piece.end], kv).add_done_callback(send)
        self._copies.append((piece.end, sent))

    def _copied(self, piece: Piece, blocks: Sequence[int], memory: memoryview) -> Future[None]:
        """Copy a piece of these blocks into `memory`."""
        copy: Future[None] = Future()
        try:
            if piece.layers is not None:
                return cast(MovesLayers, self._executor).read_layers(blocks, piece.layers, memory)
            self._executor.read_blocks(blocks, memory)
            copy.set_result(None)
        except Exception as error:
            copy.set_exception(error)
        return copy

    def _failed(self, error: Exception) -> None:
        """End the transfer with an error. It must not end the engine."""
        if self.error is None:
            log.error("KV could not be read", exc_info=error)
            self.error = f"its KV could not be read: {type(error).__name__}"
            self._link.send({"type": "failed", "number": self._number, "why": self.error})


def _last(number: int, output: Output, blocks: _Blocks) -> Header:
    """The last frame of a prompt: its first token, or the reason why there is none."""
    why = output.error or blocks.error
    if why is not None or not output.tokens:
        return {"type": "failed", "number": number, "why": why or "it was ended"}
    details = None
    if isinstance(output.details, TokenLogprob):
        details = [output.details.logprob, output.details.top]
    return {"type": "done", "number": number, "token": output.tokens[0], "details": details, "seconds": blocks.seconds}
