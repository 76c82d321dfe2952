"""Guesses by looking back: what followed the last few tokens when they came before, in the prompt or in the answer. So answers that
quote or edit their prompt are guessed well. There is no model (prompt lookup decoding, Saxena 2023).

It knows token ids, and not what they mean.
"""

from collections.abc import Sequence

from stallfree.core.request import Request

LENGTH = 3
"""Tokens that must have come before. With fewer, guesses are often wrong; with more, they begin later after a difference."""

INDEXED = 1024
"""The most tokens of a request that are indexed in an iteration, in about a quarter of a millisecond. A long prompt takes
several."""


class _Index:
    """Where each `LENGTH` tokens of a request ended last. `upto`: tokens that are indexed. The last guess, made with `at` tokens,
    was copied from position `source`."""

    __slots__ = ("at", "ends", "source", "upto")

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.upto = LENGTH
        self.at = self.source = -1


class Ngram:
    """A `Proposer` without a model."""

    draft_s = 0.0

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Sequence[int]]:
        guesses = list[Sequence[int]]()
        for request, count in zip(requests, most, strict=True):
            index = request.guess.state
            if index is None:
                index = request.guess.state = _Index()
            upto = min(request.num_tokens, index.upto + INDEXED)
            _extend(index, request, upto)
            guesses.append(_guess(index, request, count) if upto == request.num_tokens else ())
        return guesses


def _extend(index: _Index, request: Request, upto: int) -> None:
    """Index the tokens before `upto`. The last ones are indexed once a token follows them."""
    if upto <= index.upto:
        return
    first = index.upto - LENGTH
    tokens = request.tokens(first, upto - 1)
    ends = index.ends
    for at, key in enumerate(zip(*(tokens[k:] for k in range(LENGTH)), strict=False), index.upto):
        ends[key] = at
    index.upto = upto


def _guess(index: _Index, request: Request, count: int) -> Sequence[int]:
    number, at, source = request.num_tokens, index.at, index.source
    if source >= 0 and request.tokens(at, number) == request.tokens(source, source + number - at):
        source += number - at  # the last guess was right so far: go on copying from there
    else:
        source = index.ends.get(request.tokens(number - LENGTH, number), -1) if number > LENGTH else -1
    index.at, index.source = number, source
    if source < 0 or count <= 0:
        return ()
    copied = request.tokens(source, min(source + count, number))
    return (copied * -(-count // len(copied)))[:count]  # the end repeats itself
