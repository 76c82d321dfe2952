"""The KV transfer of one request, on the side that decodes: what is asked of which peer, the blocks and tokens that came, and what
becomes of the request if they do not come. It does not know how peers are connected.

Asked for is a prompt, a part of it, or a prompt with the first tokens of output, which are shown as they come. All steps happen in
the engine's thread, between two iterations, so a block is written only while it is reserved for its request. A transfer that fails
goes to the next peer. Without one, and after a token was shown, the rest is computed here: this side is a whole engine.
"""

import logging
import math
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from stallfree.core.policy import Forecasting
from stallfree.core.request import Request
from stallfree.engine.adapters import name_of
from stallfree.executors.base import MovesKV, MovesLayers
from stallfree.executors.sampling import GREEDY, Sampling, TokenLogprob, to_values
from stallfree.transfer.frames import Broken, Header, whole
from stallfree.transfer.pieces import Arrived, Piece

if TYPE_CHECKING:
    from stallfree.transfer.asking import Asking, Peer

log = logging.getLogger(__name__)


class Fetch:
    """One request's KV transfer, a `Transfer`: the peer that was asked, and the blocks so far. Only the engine's thread uses it."""

    def __init__(self, asking: "Asking", preferred: "Peer | None", cut: int | None):
        self._asking, self._preferred = asking, preferred
        self.cut = cut
        self._engine = asking.thread.engine
        self._executor = cast(MovesKV, self._engine.executor)
        self._peer: Peer | None = None
        self._number = 0
        self._num_bytes, self._seconds = 0, 0.0
        self.heard = 0.0

    def start(self, request: Request) -> None:
        size = self._asking.terms.block_size
        self._request = request
        self._first, self._blocks = request.num_cached // size, -(-request.cut // size)
        if self._ends_there:
            self._first = min(self._blocks, len(request.prompt))  # its peer knows no larger one
        if self._is_part and request.num_cached >= request.cut:
            self._engine.prefetch.resume(request, 0, 0.0)
            return
        self._left = self._asking.order(self._preferred)
        self._ask()

    @property
    def _is_part(self) -> bool:
        """Whether it brings a part of the prompt, and no token."""
        return self._request.cut < len(self._request.prompt)

    @property
    def _ends_there(self) -> bool:
        """Whether all output is sampled there, after its first token too, so that no KV is needed here."""
        prompt = len(self._request.prompt)
        return self._request.cut > prompt and self._request.cut + 1 == prompt + self._request.max_tokens

    def cancel(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Cancel the transfer at the peer that was asked."""
        peer, self._peer = self._peer, None
        if peer is not None and peer.transfers.pop(self._number, None) is not None and peer.link is not None:
            peer.link.send({"type": "cancel", "number": self._number})

    def write(self, piece: Piece, memory: memoryview, seconds: float) -> None:
        """Write a piece of the KV, which arrived in `seconds`. Raises Broken unless it is the next one."""

        def into(blocks: Sequence[int]) -> None:
            form = self._asking.form
            kv = memory if form is None else memoryview(form.unpack(memory, piece.blocks, piece.num_layers))
            if piece.layers is None:
                self._executor.write_blocks(blocks, kv)
            else:
                cast(MovesLayers, self._executor).write_layers(blocks, piece.layers, kv)

        self.place(piece, into, len(memory), seconds)

    def place(self, piece: Piece, into: Callable[[Sequence[int]], None], num_bytes: int, seconds: float) -> None:
        """Let `into` write a piece of the KV, which arrived as so many bytes in `seconds`, into its blocks. Raises as `write`."""
        self._arrived.add(piece)
        began = time.perf_counter()
        try:
            into(self._request.blocks[piece.first : piece.end])
        except Exception as error:  # it must not end the engine
            log.exception("KV could not be written")
            self.stop()
            self.failed(f"its KV could not be written: {type(error).__name__}")
            return
        self._num_bytes += num_bytes
        self._seconds += seconds + time.perf_counter() - began
        self.heard = time.monotonic()

    def extend(self, header: Header) -> None:
        """Show a token whose KV follows. Raises Broken for one that was not asked for."""
        token, details = self._token(header), _details(header.get("details"))
        if self._request.num_tokens >= self._request.cut:
            raise Broken(f"a token came for position {self._request.num_tokens}, and its KV was not asked for")
        self.heard = time.monotonic()
        self._engine.prefetch.extend(self._request, token, details)

    def done(self, header: Header) -> None:
        """Deliver the request with its next token, or let it go on with the rest of its prompt. Raises Broken if blocks are
        missing. A peer of an older release ends after the first token of output: then the KV of the prompt is all.
        """
        token, details, copying = self._token(header), _details(header.get("details")), header.get("seconds")
        computed = self._request.cut if self._is_part else self._request.num_tokens
        if self._ends_there:
            if computed < self._request.cut:
                self.failed("it ended before the last token")
            else:
                self._drop()
                self._engine.prefetch.extend(self._request, token, details)
            return
        self._arrived.check(-(-computed // self._asking.terms.block_size))
        self._drop()
        seconds = self._seconds + (copying if isinstance(copying, float) and 0 <= copying < math.inf else 0.0)
        if self._is_part:
            self._engine.prefetch.resume(self._request, self._num_bytes, seconds)
        else:
            self._engine.prefetch.deliver(self._request, token, details, self._num_bytes, seconds)

    def _token(self, header: Header) -> int:
        return whole(header, "token", self._engine.text.vocab_size - 1)

    def failed(self, why: str) -> None:
        """Ask the next peer, or have all computed here."""
        log.warning("request %s: its KV transfer failed: %s", self._request.id, why)
        self._drop()
        self._ask()

    def _drop(self) -> None:
        if self._peer is not None:
            self._peer.transfers.pop(self._number, None)
            self._peer = None

    def _ask(self) -> None:
        while self._left and not self._request.output:  # a peer that began anew would send tokens that were shown
            peer = self._left.pop(0)
            if peer.link is not None:
                self._peer, self._number = peer, next(self._asking.numbers)
                self._arrived = Arrived(self._first, self._blocks, self._asking.terms.num_layers)
                self.heard = time.monotonic()
                peer.transfers[self._number] = self
                peer.link.send(self._header(), _packed(self._request.prompt[: self._request.cut]))
                return
        self._engine.prefetch.recall(self._request)

    def _header(self) -> Header:
        request = self._request
        sampling = request.sampling if isinstance(request.sampling, Sampling) else GREEDY
        return {
            "type": "prefill",
            "number": self._number,
            "first": self._first,
            "tokens": max(0, request.cut - len(request.prompt)) + 1,
            "sampling": to_values(GREEDY if self._is_part else sampling),  # the token after a part is nobody's
            "salt": request.salt,
            "priority": request.priority,
            "slo": self._slo(),
            "tenant": request.tenant,
            "weight": request.weight,
            "class": request.service_class,
            **self._adapter(),
        }

    def _slo(self) -> str:
        """The request's own targets. A part of a prompt is due after its share of the time for the first token; else it would look
        less urgent than a whole prompt.
        """
        request, policy = self._request, self._engine.scheduler.policy
        slo = request.slo
        if self._is_part:
            slo = policy.targets(request) if isinstance(policy, Forecasting) else slo
            if slo is not None and slo.ttft is not None:
                share = request.cut / len(request.prompt)
                slo = replace(slo, ttft=replace(slo.ttft, seconds=slo.ttft.seconds * share))
        return "" if slo is None else str(slo)

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
