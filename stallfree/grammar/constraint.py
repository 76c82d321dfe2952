"""The tokens that may follow a request's output, by its grammar. They are found in another thread while the model runs.

A constraint's state follows from the request's output, so it needs no word of preemption, of the prefix cache or of lost KV. It
knows no logits.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher

from stallfree.executors.sampling import mask_of
from stallfree.grammar.sources import Grammar

MOST_WAIT_S = 0.25
"""Seconds after its beginning in which a search must end where an executor cannot defer its request: in several processes."""

HOPELESS_S = 5.0
"""Seconds after which a search has failed, though its request is deferred and disturbs nobody."""


WRONG = ValueError("the draft before it is not allowed")


class _Search(NamedTuple):
    """The search for what may follow `length` output tokens, and each of the `drafts` after them. It `began` at this moment (s)."""

    length: int
    drafts: tuple[int, ...]
    began: float
    found: Future[list[np.ndarray | ValueError | None]]

    def covers(self, output: Sequence[int]) -> bool:
        return self.length <= len(output) <= self.length + len(self.drafts)


class GrammarConstraint:
    """Satisfies `executors.sampling.Constraint`. `compiled`: the `grammar` at its start; this copies it. `vocab_size`: of the
    model. `threads`: where it searches."""

    def __init__(self, compiled: LLMatcher, grammar: Grammar, vocab_size: int, threads: Executor):
        self._compiled, self._vocab_size, self._threads = compiled, vocab_size, threads
        self._opens, self._after = grammar.opens, grammar.after
        self._matcher: LLMatcher | None = None
        self._consumed = int(grammar.after is not None)
        """Tokens of the output that the matcher has consumed, or passed over; after them, it has consumed the drafts `_ahead`."""
        self._ahead: list[int] = []
        self._matching = threading.Lock()
        self._search: _Search | None = None

    def begin(self, output: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """See `Constraint`. A search that has begun for as many tokens and the same drafts goes on."""
        search = self._search
        if search is None or (search.length, search.drafts) != (len(output), tuple(drafts)):
            found = self._threads.submit(self._find, output, len(output), tuple(drafts))
            self._search = _Search(len(output), tuple(drafts), time.monotonic(), found)

    def ready(self, wait_s: float) -> bool:
        """See `Constraint`."""
        if self._search is None:
            return True  # it begins when it is asked
        search = self._search
        return bool(wait([search.found], wait_s).done) or time.monotonic() - search.began > HOPELESS_S

    def mask(self, output: Sequence[int]) -> np.ndarray | None:
        """See `Constraint`. Raises ValueError also if the search does not end in time."""
        search = self._search
        if search is None or not search.covers(output):
            self.begin(output)
            search = self._search
            assert search is not None
        try:
            masks = search.found.result(max(0.0, search.began + MOST_WAIT_S - time.monotonic()))
        except TimeoutError:
            seconds = time.monotonic() - search.began
            raise ValueError(
                f"its grammar takes more than {seconds:.2g} s to say what may follow {len(output)} tokens; make it simpler"
            ) from None
        mask = masks[len(output) - search.length]
        if isinstance(mask, ValueError):
            raise mask
        return mask

    def _find(self, output: Sequence[int], length: int, drafts: tuple[int, ...]) -> list[np.ndarray | ValueError | None]:
        """What `mask` answers after the first `length` tokens of `output`, and after each of the drafts; in the searching thread.
        Nothing follows a draft that the grammar does not allow, and nothing is known yet after one that may begin the grammar.
        """
        if self._after is not None and (length == 0 or output[0] != self._after):
            return [None, *[WRONG if length == 0 else None for _ in drafts]]
        with self._matching:  # a search for other drafts may not have ended
            return self._search_on(output, length, drafts)

    def _search_on(self, output: Sequence[int], length: int, drafts: tuple[int, ...]) -> list[np.ndarray | ValueError | None]:
        self._go_to(output, length)
        masks: list[np.ndarray | ValueError | None] = []
        for number in range(len(drafts) + 1):
            try:
                mask = self._now(length + number)
            except ValueError as error:
                return [*masks, *[error] * (len(drafts) + 1 - number)]
            masks.append(mask)
            if number < len(drafts):
                draft = drafts[number]
                if mask is not None and (draft >= len(mask) or mask[draft] < 0):
                    return [*masks, *[WRONG] * (len(drafts) - number)]
                self._consume(draft)
                self._ahead.append(draft)
        return masks

    def _go_to(self, output: Sequence[int], length: int) -> None:
        """Let the matcher have consumed exactly the first `length` tokens of `output`."""
        matcher = self._matcher = self._matcher or self._compiled.deep_copy()
        new = output[self._consumed : length] if length >= self._consumed else ()
        agree = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(self._ahead, new, strict=False))))
        wrong = len(self._ahead) - agree
        if wrong and not self._opens:
            matcher.rollback(wrong)
        if length < self._consumed or (wrong and (self._opens or matcher.is_error())):
            matcher.reset()
            self._consumed = int(self._after is not None)
            new, agree = output[self._consumed : length], 0
        for token in new[agree:]:
            self._consume(token)
        self._consumed, self._ahead = length, []

    def _consume(self, token: int) -> None:
        assert self._matcher is not None
        if not (self._opens and _complete(self._matcher)):
            self._matcher.consume_token(token)

    def _now(self, length: int) -> np.ndarray | None:
        """What may follow what the matcher has consumed, `length` tokens."""
        matcher = self._matcher
        assert matcher is not None
        if self._opens and _complete(matcher):
            return None
        bits = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"its grammar cannot go on after {length} tokens: {reason(matcher.get_error())}")
        if not any(bits):
            raise ValueError(f"its grammar allows no token of this model after {length} tokens")
        return mask_of(bits)[: self._vocab_size]


def _complete(matcher: LLMatcher) -> bool:
    return bool(matcher.is_stopped() and not matcher.is_error())


def reason(error: str) -> str:
    """llguidance's reason in one line: it may quote the grammar before it."""
    if error.startswith("NoExtension"):
        return "it allows no text that ends"
    lines = [line.strip() for line in error.strip().splitlines()] or ["unknown"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])[:300]
