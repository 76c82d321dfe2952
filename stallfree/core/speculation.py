"""Drafts: tokens that a proposer guesses to follow a request's last one. An iteration checks them together with the request's own
decode, so that it may yield several tokens.

How many are checked is decided in every iteration, by how often guesses were right lately and by what they cost: as many as make
the iteration yield the most tokens per second, and never so many that it takes longer than the policy allows. It does not know who
guesses, or what the tokens mean.
"""

from collections.abc import Sequence
from itertools import takewhile
from math import inf
from typing import Protocol, runtime_checkable

from stallfree.core.draft import Draft
from stallfree.core.policy import CostModel
from stallfree.core.request import Request

MOST = 15
"""The most drafts of a request in an iteration that can be chosen. Beyond it, few are right even where guessing is easy."""

WORTH = 1.1
"""Drafts are checked if the iteration then yields at least this many times the tokens per second. Less may be an error of the cost
model."""

MEMORY = 0.9
"""The weight of a guess relative to the next one of the same request: about ten count."""

LIKELY = 0.5
"""Guesses that are less likely than this share of what they would have to be, by the price of one more token, are not weighed."""

FIRST, PRIOR = 0.75, 2.0
"""How often guesses are right before anything is known, and the weight of what was known before, in guesses."""

COMMON_MEMORY = 0.99
"""As `MEMORY`, for the guesses of all requests."""

RETURN = 0.98
"""What is left of a request's own experience after a token without a guess; and of that of all after an iteration without one,
where guesses take time. So guessing is tried again."""


class Proposer(Protocol):
    """Guesses tokens. `draft_s`: the seconds that one more token for each of some requests takes. If it is 0 at first, there is a
    guess after every token, which is compared with what comes even if it is not checked. Otherwise only what will be checked is
    guessed."""

    draft_s: float

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[Sequence[int]]:
        """For each request, up to so many tokens that may follow its last one; none if there is no good guess. Raises nothing: what
        goes wrong means that there is no guess."""


class Drafter(Protocol):
    """Adds drafts to iterations, and sees what came of them."""

    def add(self, draft: Draft) -> None:
        """Add drafts to an iteration that the policy has written."""

    def learn(self, request: Request, before: int, tokens: Sequence[int]) -> None:
        """`tokens` followed the first `before` ones of the request. Its drafts, if it had any, were among the guesses."""

    def close(self) -> None:
        """Free everything. Called once, when the engine ends."""


@runtime_checkable
class Closes(Protocol):
    """Optional ability of a proposer."""

    def close(self) -> None:
        """Free everything. Called once, when the engine ends."""


class Guess:
    """What is known about the guesses of one request. `tokens` were guessed to be at position `at` and after it. Of about `tries`
    tokens lately, `hits` were right. `state`: the proposer's own."""

    __slots__ = ("at", "hits", "state", "tokens", "tries")

    def __init__(self) -> None:
        self.tokens: Sequence[int] = ()
        self.at = -1
        self.hits = self.tries = 0.0
        self.state: object = None


class Speculation:
    """A `Drafter` that weighs what drafts bring against what they cost. `most`: the most for a request. `vocab_size`: the number
    of tokens that the model has (None: any); a guess ends before one that it does not have. `cost` prices iterations;
    where a policy has a cost model, it is the same one.

    `drafted`, `accepted`: drafts that were checked, and those of them that were right, since the start.
    """

    def __init__(self, proposer: Proposer, cost: CostModel, most: int = 7, vocab_size: int | None = None):
        if not 1 <= most <= MOST:
            raise ValueError(f"{most} draft tokens are not possible; take 1 to {MOST}")
        self.proposer = proposer
        self.cost = cost
        self.most = most
        self._vocab_size = vocab_size
        self.drafted = self.accepted = 0
        self._free = not proposer.draft_s
        self._overlap = False
        self._hits = self._tries = 0.0

    def add(self, draft: Draft) -> None:
        self._overlap = draft.overlap
        requests = draft.guessable if draft.left > 0 else []
        if draft.overlap:  # with drafts in flight, a stream cannot be planned ahead, which costs it a token
            requests = [r for r in requests if r.paused]
        if not requests:
            return
        guesses = [self._of(r) for r in requests]
        most = [
            min(self.most, r.max_tokens - len(r.output) - 1, len(guess.tokens) if self._free else self.most)
            for r, guess in zip(requests, guesses, strict=True)
        ]
        wanted = self._choose(draft, requests, [self._chance(guess) for guess in guesses], most)
        if not self._free:
            chosen = [number for number, count in enumerate(wanted) if count]
            self._propose([requests[i] for i in chosen], [wanted[i] for i in chosen])
            if not chosen:
                self._hits, self._tries = self._hits * RETURN, self._tries * RETURN
        for request, guess, count in zip(requests, guesses, wanted, strict=True):
            if count:
                draft.guess(request, guess.tokens[:count])

    def learn(self, request: Request, before: int, tokens: Sequence[int]) -> None:
        guess = self._of(request)
        if guess.at == before:
            self._score(guess, tokens, len(request.drafts))
        else:
            guess.hits, guess.tries = guess.hits * RETURN, guess.tries * RETURN
        guess.tokens, guess.at = (), -1
        if self._free:
            self._propose([request], [self.most])
        if self._overlap:
            chance, most = self._chance(guess), len(guess.tokens) if self._free else self.most
            request.paused = sum([chance**depth for depth in range(1, most + 1)]) > 1

    def close(self) -> None:
        if isinstance(self.proposer, Closes):
            self.proposer.close()

    def _score(self, guess: Guess, tokens: Sequence[int], drafts: int) -> None:
        right = 0
        for guessed, token in zip(guess.tokens, tokens, strict=False):
            hit = guessed == token
            right += hit
            guess.hits, guess.tries = MEMORY * guess.hits + hit, MEMORY * guess.tries + 1
            self._hits, self._tries = COMMON_MEMORY * self._hits + hit, COMMON_MEMORY * self._tries + 1
            if not hit:
                break
        self.drafted += drafts
        self.accepted += min(right, drafts)

    def _of(self, request: Request) -> Guess:
        if request.guess is None:
            request.guess = Guess()
        guess: Guess = request.guess
        return guess

    def _propose(self, requests: Sequence[Request], most: Sequence[int]) -> None:
        """Let the proposer guess what follows the last tokens of some requests."""
        for request, tokens in zip(requests, self.proposer.propose(requests, most), strict=True):
            if tokens and self._vocab_size is not None and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
                tokens = tuple(takewhile(range(self._vocab_size).__contains__, tokens))
            guess = self._of(request)
            guess.tokens, guess.at = tokens, request.num_tokens if tokens else -1

    def _chance(self, guess: Guess) -> float:
        """How likely the next guess is right."""
        common = (self._hits + PRIOR * FIRST) / (self._tries + PRIOR)
        return (guess.hits + PRIOR * common) / (guess.tries + PRIOR)

    def _choose(self, draft: Draft, requests: Sequence[Request], chances: Sequence[float], most: Sequence[int]) -> list[int]:
        """How many drafts each request gets. The likeliest come first, in steps that double; of these, the best step is taken."""
        counts = [0] * len(requests)
        if not any(most):
            return counts
        pieces = draft.shape
        places = {r: place for place, r in enumerate(draft.work, len(pieces) - len(draft.work))}
        rows = sum([r.extra_rows for r in draft.work if r not in draft.chunks])
        yielded = float(sum(draft.work.values()))
        limit = inf if draft.limit_s is None else draft.limit_s / (draft.margin or 1)
        seconds = self.cost.seconds([*pieces, (rows, 0)] if rows else pieces)
        if seconds <= 0:
            return counts
        # What one more token costs, in tokens that the iteration yields meanwhile: a guess that is less likely brings nothing.
        one = self.cost.seconds([*pieces, (pieces[-1][0], 2), (rows + 1, 0)]) - self.cost.seconds(
            [*pieces, (pieces[-1][0], 1), (rows, 0)]
        )
        floor = LIKELY * one * yielded / seconds
        candidates = sorted(
            (-(chance**depth), depth, number)
            for number, (chance, count) in enumerate(zip(chances, most, strict=True))
            if chance >= floor
            for depth in range(1, count + 1)
            if chance**depth >= floor
        )
        least, best = WORTH * yielded / seconds, list(counts)
        size, end = 0, min(len(candidates), draft.left)
        while size < end:
            first, size = size, min(max(1, 2 * size), end)
            for chance, _, number in candidates[first:size]:
                yielded -= chance  # which is negative here
                counts[number] += 1
                start, count = pieces[places[requests[number]]]
                pieces[places[requests[number]]] = start, count + 1
                rows += 1 + requests[number].extra_rows
            seconds = self.cost.seconds([*pieces, (rows, 0)]) + self.proposer.draft_s * max(counts)
            if seconds > limit:
                break
            if yielded / seconds > least:
                least, best = yielded / seconds, list(counts)
        return best
