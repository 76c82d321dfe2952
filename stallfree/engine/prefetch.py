"""Requests whose first tokens another engine computes: a part of the prompt, all of it, or also the first tokens of output. Each
waits for room here, and then its KV transfer starts. Tokens may come while KV is on its way. The transfer ends when its KV is here,
or when it is recalled and computed here.

It does not know how another engine gets a prompt or what moves the KV: a `Transfer` does that.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from stallfree.core.ledger import Ledger
from stallfree.core.record import Delivered
from stallfree.core.request import Request
from stallfree.core.transfer import admit, deliver, expect, extend, recall, resume

log = logging.getLogger(__name__)


class Transfer(Protocol):
    """One KV transfer: tokens that another engine computes. Both methods are called in the engine's thread.

    `cut` is how many of the request's first tokens that shall be: None for its prompt, else at least 1. Less than the prompt is a
    part of it; more is also the first tokens of output. `Request.cut` is how many it will be.
    """

    @property
    def cut(self) -> int | None: ...

    def start(self, request: Request) -> None:
        """Begin to fill the blocks of the request. A transfer ends in `Prefetch.deliver`, in `Prefetch.resume` or in
        `Prefetch.recall`."""

    def cancel(self) -> None:
        """The request has ended. KV that still arrives must not be written, because its blocks belong to others now."""


class News(NamedTuple):
    """What came from other engines: `delivered` transfers, the ids of `recalled` requests, and the tokens `shown` with their times
    (s)."""

    delivered: list[Delivered]
    recalled: list[str]
    shown: list[tuple[str, float]]


class Prefetch:
    """The requests of `ledger` whose first tokens other engines compute. `chunks`: the policy computes prompts in chunks.

    `token` is called for each token from another engine, with the request (which the token may have ended), it and its details.
    `taken` is called after a request got blocks, before anything is written to them.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], float],
        token: Callable[[Request, int, object], None],
        taken: Callable[[], None] = lambda: None,
        *,
        chunks: bool = False,
    ):
        self._ledger, self._clock, self._token, self._taken, self._chunks = ledger, clock, token, taken, chunks
        self._transfers: dict[str, Transfer] = {}
        self._started: dict[str, float] = {}
        self._news = News([], [], [])

    @property
    def under_way(self) -> bool:
        """Whether any transfer has started and not ended."""
        return bool(self._started)

    @property
    def idle(self) -> bool:
        return not (self._transfers or self._started)

    def cut(self, request: Request, transfer: Transfer) -> int:
        """How many of a request's first tokens `transfer` will bring. Not a part of its prompt, if the policy would not go on with
        it. No output after its first token, if a constraint says what may follow: its state is here.
        """
        cut, prompt = transfer.cut, len(request.prompt)
        if cut is None or (cut < prompt and not self._chunks) or (cut > prompt and request.constrained):
            return prompt
        return min(cut, prompt + request.max_tokens - 1)

    def expect(self, request: Request, transfer: Transfer) -> None:
        """Queue a request whose first tokens `transfer` brings. Raises `Refused` for one that can never be served."""
        expect(self._ledger, request, self.cut(request, transfer))
        self._transfers[request.id] = transfer

    def start(self) -> None:
        """Start the transfers that have room now. A prompt whose transfer cannot start is computed here."""
        while (request := admit(self._ledger)) is not None:
            self._started[request.id] = self._clock()
            self._taken()
            try:
                self._transfers[request.id].start(request)
            except Exception:
                log.exception("request %s: the KV transfer cannot start; its prompt is computed here", request.id)
                if request.id in self._transfers:
                    self.recall(request)

    def extend(self, request: Request, token: int, details: object) -> None:
        """The next token of a request is `token`; its KV is still on its way. If the token ends it, its transfer is cancelled."""
        now = self._clock()
        ended = extend(self._ledger, request, token, now)
        self._news.shown.append((request.id, now))
        if ended is not None:
            self.drop(request.id)
        self._token(request, token, details)

    def deliver(self, request: Request, token: int, details: object, num_bytes: int, seconds: float) -> None:
        """The blocks of a request are filled, and its next token is `token`: it decodes from now on."""
        now = self._clock()
        deliver(self._ledger, request, token, now)
        self._note(request, now, num_bytes, seconds, None)
        self._token(request, token, details)

    def resume(self, request: Request, num_bytes: int, seconds: float) -> None:
        """The blocks of the first `Request.cut` tokens of a prompt are filled: the rest is computed here from now on."""
        cut = request.cut
        resume(self._ledger, request, max(cut, request.num_cached))
        self._note(request, self._clock(), num_bytes, seconds, cut)

    def recall(self, request: Request) -> None:
        """No other engine computes the first tokens of `request`: compute them here. The tokens that were shown stay."""
        del self._transfers[request.id], self._started[request.id]
        recall(self._ledger, request)
        self._news.recalled.append(request.id)

    def drop(self, id: str) -> None:
        """Cancel the transfer of a request that has ended. Most requests have none."""
        transfer = self._transfers.pop(id, None)
        self._started.pop(id, None)
        if transfer is not None:
            try:
                transfer.cancel()
            except Exception:
                log.exception("request %s: its KV transfer cannot be cancelled", id)

    def news(self) -> News:
        """What came since the last call."""
        news, self._news = self._news, News([], [], [])
        return news

    def lost(self) -> None:
        """All KV is lost, also the blocks that a transfer is filling now."""
        for id in list(self._started):
            self.drop(id)

    def _note(self, request: Request, now: float, num_bytes: int, seconds: float, cut: int | None) -> None:
        """A transfer is delivered."""
        del self._transfers[request.id]
        started = self._started.pop(request.id)
        self._news.delivered.append(Delivered(request.id, started, now, request.num_cached, num_bytes, seconds, cut))
