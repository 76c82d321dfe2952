"""A proposer that may fail, or answer with something that is no guess: then there are no guesses, and everything goes on. It does
not know how guesses are made.
"""

import logging
from collections.abc import Sequence

from stallfree.core.request import Request
from stallfree.core.speculation import Closes, Proposer

log = logging.getLogger(__name__)

FAILURES = 3
"""After as many calls in a row that failed, a proposer is not asked again."""


class Guarded:
    """The proposer `inner`, which may raise anything. `name`: for the log."""

    def __init__(self, inner: Proposer, name: str):
        self.draft_s = inner.draft_s
        self._inner, self._name, self._failures = inner, name, 0

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[Sequence[int]]:
        if self._failures >= FAILURES or not requests:
            return [()] * len(requests)
        try:
            guesses = [tuple(guess)[:count] for guess, count in zip(self._inner.propose(requests, most), most, strict=True)]
            if not all(isinstance(token, int) for guess in guesses for token in guess):
                raise TypeError("a guess is not made of token ids")
            self._failures, self.draft_s = 0, self._inner.draft_s
        except Exception:
            self._failures += 1
            more = "it is asked no more" if self._failures >= FAILURES else "the iteration goes on without its guesses"
            log.exception("%s failed; %s", self._name, more)
            return [()] * len(requests)
        return guesses

    def close(self) -> None:
        if isinstance(self._inner, Closes):
            self._inner.close()
