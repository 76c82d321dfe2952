"""The side that prefills. Decode engines connect and ask for prompts. They get the KV blocks as iterations fill them, and one token
after them, or several while they are sampled. For its own engine each prompt is a request of so many tokens. It does not know how
the other side reserves blocks, or what it does with the tokens.

The other side bounds the work: it asks only for prompts that it has reserved blocks for.
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
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import cast

from stallfree.core.plan import Work
from stallfree.core.request import Refused, Request
from stallfree.core.slo import Slo
from stallfree.engine.streams import Output
from stallfree.engine.thread import EngineThread, Outputs, Unavailable
from stallfree.executors.base import KVLine, LinksKV, MovesLayers
from stallfree.executors.sampling import TokenLogprob, of_values
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import Broken, Header, Link, shut, whole
from stallfree.transfer.line import meeting_at
from stallfree.transfer.ring import Room
from stallfree.transfer.sending import Pipe, Sending
from stallfree.transfer.terms import Met, Refusal, Terms, address, welcome

log = logging.getLogger(__name__)

CALLERS = 64
"""At most this many decode engines may be connected, and at most this many may be meeting."""
MEETING_S = 15.0
"""Seconds within which a decode engine must introduce itself."""
MOST_NUMBER = 2**63
MOST_TOKENS = 2**31
"""Most tokens of output that a decode engine may name. The engine refuses what is longer than its longest sequence."""


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
            met = welcome(sock, self._terms, self._key)
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
        caller = _Caller(self._thread, self._loop, self._terms.transfer_kv, Link(sock), met)
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
    """A decode engine that is connected by `link`, what was agreed with it, and the prompts it asked for."""

    def __init__(self, thread: EngineThread, loop: asyncio.AbstractEventLoop, transfer_kv: str, link: Link, met: Met):
        self.link = link
        self._thread, self._loop = thread, loop
        form, room = Form.of(transfer_kv, thread.engine.executor), None if met.memory is None else Room(len(met.memory))
        self._pipe = Pipe(link, form, met.memory, room, met.num_layers)
        self._line: Future[KVLine | None] | None = None
        """The line between the devices, once it is asked for; None if it could not be opened."""
        self._may_line = met.line
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
            case "taken" if self._pipe.room is not None:
                try:
                    self._pipe.room.free()
                except IndexError:
                    raise Broken("a piece of memory was freed that was not taken") from None
            case "line" if self._may_line and "name" in header and self._line is None:
                self._line = Future()
                threading.Thread(target=self._open_line, args=(self._line, meeting_at(header["name"])), daemon=True).start()
            case "line" if self._line is not None:
                self._line.add_done_callback(self._use_line if header.get("open") is True else _close)
            case "alive":
                pass
            case other:
                raise Broken(f"a frame of unknown type {str(other)[:80]!r}")

    def ended(self) -> None:
        if self._line is not None:
            self._line.add_done_callback(_close)
        self._do(self._cancel_all)

    def _open_line(self, line: "Future[KVLine | None]", path: Path) -> None:
        executor = cast(LinksKV, self._thread.engine.executor)
        try:
            line.set_result(executor.open_line(str(path), 1, self.link.close))
        except (OSError, RuntimeError) as error:
            log.warning("no line to the devices of a decode engine (%s); KV goes through the host's memory", error)
            line.set_result(None)

    def _use_line(self, line: "Future[KVLine | None]") -> None:
        self._pipe.line = line.result()

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
        max_tokens = whole({"tokens": 1} | header, "tokens", MOST_TOKENS)  # older releases ask for one
        if not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise Broken(f"a weight of {str(weight)[:20]}, which is no number above 0")
        return Request(
            secrets.token_hex(12),
            tokens.tolist(),
            max_tokens,
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
        upto = len(request.prompt) + request.max_tokens - 1
        blocks = Sending(self._thread, self._pipe, number, first, upto)
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
        if self._pipe.num_layers:
            cast(MovesLayers, self._thread.engine.executor).follow(id, computed)

    async def _answer(self, number: int, outputs: Outputs, blocks: Sending) -> None:
        with outputs:
            async for batch in outputs:
                for output in batch:
                    frame = _frame(number, output, blocks)
                    self.link.send(frame, ahead=frame["type"] == "token")  # the client need not wait for KV
                    if frame["type"] == "failed":
                        outputs.close()
        self._outputs.pop(number, None)

    def _cancel(self, number: int) -> None:
        outputs = self._outputs.pop(number, None)
        if outputs is not None:
            outputs.close()

    def _cancel_all(self) -> None:
        for number in list(self._outputs):
            self._cancel(number)


def _close(line: "Future[KVLine | None]") -> None:
    if (end := line.result()) is not None:
        end.close()


def _frame(number: int, output: Output, blocks: Sending) -> Header:
    """The frame for a token, the last one of a request as `done`; or the reason why there is none."""
    why = output.error or blocks.error
    if why is not None or not output.tokens:
        return {"type": "failed", "number": number, "why": why or "it was ended"}
    details = None
    if isinstance(output.details, TokenLogprob):
        details = [output.details.logprob, output.details.top]
    frame = {"number": number, "token": output.tokens[0], "details": details}
    return frame | ({"type": "token"} if output.finish_reason is None else {"type": "done", "seconds": blocks.seconds})
