"""Prompts that another engine computes. Each waits for room here, and then its KV transfer starts. The transfer ends when its KV
and first token are delivered, or when it is recalled and computed here.

It does not know how another engine gets a prompt or what moves the KV: a `Transfer` does that.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from stallfree.core.ledger import Ledger
from stallfree.core.record import Delivered
from stallfree.core.request import Request
from stallfree.core.transfer import admit, deliver, expect, recall

log = logging.getLogger(__name__)


class Transfer(Protocol):
    """One KV transfer: a prompt that another engine computes. Both methods are called in the engine's thread."""

    def start(self, request: Request) -> None:
        """Begin to fill the blocks of the request. A transfer ends in `Prefetch.deliver` or in `Prefetch.recall`."""

    def cancel(self) -> None:
        """The request has ended. KV that still arrives must not be written, because its blocks belong to others now."""


class Prefetch:
    """The requests of `ledger` whose prompts other engines compute.

    `first` is called after each delivery with the request, its first token (which may have ended it) and the token's details.
    `taken` is called after a request got blocks, before anything is written to them.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], float],
        first: Callable[[Request, int, object], None],
        taken: Callable[[], None] = lambda: None,
    ):
        self._ledger, self._clock, self._first, self._taken = ledger, clock, first, taken
        self._transfers: dict[str, Transfer] = {}
        self._started: dict[str, float] = {}
        self._delivered: list[Delivered] = []
        self._recalled: list[str] = []

    @property
    def under_way(self) -> bool:
        """Whether any transfer has started and not ended."""
        return bool(self._started)

    @property
    def idle(self) -> bool:
        return not (self._transfers or self._started)

    def expect(self, request: Request, transfer: Transfer) -> None:
        """Queue a request whose prompt `transfer` brings. Raises `Refused` for one that can never be served."""
        expect(self._ledger, request)
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

    def deliver(self, request: Request, token: int, details: object, num_bytes: int, seconds: float) -> None:
        """The blocks of a request are filled, and its first token is `token`: it decodes from now on."""
        now = self._clock()
        del self._transfers[request.id]
        deliver(self._ledger, request, token, now)
        started = self._started.pop(request.id)
        self._delivered.append(Delivered(request.id, started, now, request.num_cached, num_bytes, seconds))
        self._first(request, token, details)

    def recall(self, request: Request) -> None:
        """No other engine computes the prompt of `request`: compute it here."""
        del self._transfers[request.id], self._started[request.id]
        recall(self._ledger, request)
        self._recalled.append(request.id)

    def drop(self, id: str) -> None:
        """Cancel the transfer of a request that has ended. Most requests have none."""
        transfer = self._transfers.pop(id, None)
        self._started.pop(id, None)
        if transfer is not None:
            try:
                transfer.cancel()
            except Exception:
                log.exception("request %s: its KV transfer cannot be cancelled", id)

    def news(self) -> tuple[list[Delivered], list[str]]:
        """The deliveries, and the ids of the recalled requests, since the last call."""
        delivered, recalled, self._delivered, self._recalled = self._delivered, self._recalled, [], []
        return delivered, recalled

    def lost(self) -> None:
        """All KV is lost, also the blocks that a transfer is filling now."""
        for id in list(self._started):
            self.drop(id)
