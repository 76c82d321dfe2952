"""Prompts that another engine computes: each waits for room here, is asked for once it has some, and then comes with its first
token, or is computed here after all. How it is asked for, and what moves its KV, is a `Fetch`'s affair.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from stallfree.core import transfer
from stallfree.core.ledger import Ledger
from stallfree.core.record import Delivered
from stallfree.core.request import Request

log = logging.getLogger(__name__)


class Fetch(Protocol):
    """A prompt that another engine computes. Both are called in the engine's thread."""

    def start(self, request: Request) -> None:
        """Its blocks are there: have them filled. It ends in `Prefetch.deliver` or in `Prefetch.recall`."""

    def cancel(self) -> None:
        """Nobody wants it any more: what still comes must not be written, for the blocks are others'."""


class Prefetch:
    """The requests of `ledger` whose prompts come from elsewhere. `first` is called with each that has come, its first token, which
    may have ended it, and the token's details.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float], first: Callable[[Request, int, object], None]):
        self._ledger, self._clock, self._first = ledger, clock, first
        self._fetches: dict[str, Fetch] = {}
        self._asked: dict[str, float] = {}
        self._delivered: list[Delivered] = []
        self._recalled: list[str] = []

    @property
    def under_way(self) -> bool:
        """Whether any has been asked for and has not come."""
        return bool(self._asked)

    @property
    def idle(self) -> bool:
        return not (self._fetches or self._asked)

    def expect(self, request: Request, fetch: Fetch) -> None:
        """Queue a request whose prompt `fetch` gets. Raises `Refused` for one that can never be served."""
        transfer.expect(self._ledger, request)
        self._fetches[request.id] = fetch

    def start(self) -> None:
        """Ask for the prompts of those for which there is room now; compute them here if they cannot even be asked for."""
        while (request := transfer.admit(self._ledger)) is not None:
            self._asked[request.id] = self._clock()
            try:
                self._fetches[request.id].start(request)
            except Exception:
                log.exception("request %s: its prompt cannot be asked for elsewhere and is computed here", request.id)
                if request.id in self._fetches:
                    self.recall(request)

    def deliver(self, request: Request, token: int, details: object, num_bytes: int, seconds: float) -> None:
        """The blocks of a request are filled, and its first token is `token`: it decodes from now on."""
        now = self._clock()
        del self._fetches[request.id]
        transfer.deliver(self._ledger, request, token, now)
        asked = self._asked.pop(request.id)
        self._delivered.append(Delivered(request.id, asked, now, request.num_cached, num_bytes, seconds))
        self._first(request, token, details)

    def recall(self, request: Request) -> None:
        """Nobody elsewhere computes the prompt of a request: it is computed here."""
        del self._fetches[request.id], self._asked[request.id]
        transfer.recall(self._ledger, request)
        self._recalled.append(request.id)

    def drop(self, id: str) -> None:
        """What is fetched for a request is not wanted any more; most have nothing fetched."""
        fetch = self._fetches.pop(id, None)
        self._asked.pop(id, None)
        if fetch is not None:
            try:
                fetch.cancel()
            except Exception:
                log.exception("request %s: what is computed for it elsewhere cannot be called off", id)

    def news(self) -> tuple[list[Delivered], list[str]]:
        """Who was delivered, and the ids of those recalled, since the last call."""
        delivered, recalled, self._delivered, self._recalled = self._delivered, self._recalled, [], []
        return delivered, recalled

    def lost(self) -> None:
        """All KV is gone, that which is filled at the moment included."""
        for id in list(self._asked):
            self.drop(id)
