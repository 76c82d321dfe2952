"""The tokens that may follow a request's output, by its grammar. They are found in another thread while the model runs.

A constraint's state follows from the request's output, so it needs no word of preemption, of the prefix cache or of lost KV. It
knows no logits.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait

import numpy as np
from llguidance import LLMatcher

from stallfree.executors.sampling import mask_of
from stallfree.grammar.sources import Grammar

MOST_WAIT_S = 0.25
"""Seconds after its beginning in which a search must end where an executor cannot defer its request: in several processes."""

HOPELESS_S = 5.0
"""Seconds after which a search has failed, though its request is deferred and disturbs nobody."""


class GrammarConstraint:
    """Satisfies `executors.sampling.Constraint`. `compiled`: the `grammar` at its start; this copies it. `vocab_size`: of the
    model. `threads`: where it searches."""

    def __init__(self, compiled: LLMatcher, grammar: Grammar, vocab_size: int, threads: Executor):
        self._compiled, self._vocab_size, self._threads = compiled, vocab_size, threads
        self._opens, self._after = grammar.opens, grammar.after
        self._matcher: LLMatcher | None = None
        self._consumed = 0
        self._search: tuple[int, float, Future[np.ndarray | None]] | None = None

    def begin(self, output: Sequence[int]) -> None:
        """See `Constraint`. A search that has begun for as many tokens goes on."""
        if self._search is None or self._search[0] != len(output):
            self._search = len(output), time.monotonic(), self._threads.submit(self._find, output, len(output))

    def ready(self, wait_s: float) -> bool:
        """See `Constraint`."""
        if self._search is None:
            return True  # it begins when it is asked
        _, began, search = self._search
        return bool(wait([search], wait_s).done) or time.monotonic() - began > HOPELESS_S

    def mask(self, output: Sequence[int]) -> np.ndarray | None:
        """See `Constraint`. Raises ValueError also if the search does not end in time."""
        self.begin(output)
        assert self._search is not None
        _, began, search = self._search
        try:
            return search.result(max(0.0, began + MOST_WAIT_S - time.monotonic()))
        except TimeoutError:
            seconds = time.monotonic() - began
            raise ValueError(
                f"its grammar takes more than {seconds:.2g} s to say what may follow {len(output)} tokens; make it simpler"
            ) from None

    def _find(self, output: Sequence[int], length: int) -> np.ndarray | None:
        """`mask`, in the searching thread."""
        matcher = self._matcher = self._matcher or self._compiled.deep_copy()
        if length < self._consumed:
            matcher.reset()
            self._consumed = 0
        if self._after is not None and (length == 0 or output[0] != self._after):
            return None
        for token in output[max(self._consumed, self._after is not None) : length]:
            if not (self._opens and _complete(matcher)):
                matcher.consume_token(token)
        self._consumed = length
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
