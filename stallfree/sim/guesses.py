"""Guesses in a simulation, which has no real tokens: each is right with the same probability, whatever the others are. It does not
know how many are checked.
"""

from collections.abc import Sequence
from zlib import crc32

from stallfree.core.request import Request
from stallfree.core.uniform import uniform

WRONG = 0
"""No request gets this token in a simulation."""


class Chance:
    """A `Proposer` whose guesses are right with probability `acceptance`. One more for each request takes `draft_s` seconds.

    Whether a guess is right depends on the request and the position alone, so that runs are alike.
    """

    def __init__(self, acceptance: float, draft_s: float = 0.0):
        if not 0 <= acceptance <= 1:
            raise ValueError(f"--draft-acceptance {acceptance:g} is no probability; give one from 0 to 1")
        self.draft_s = draft_s
        self._acceptance = acceptance

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Sequence[int]]:
        return [self._of(request, count) for request, count in zip(requests, most, strict=True)]

    def _of(self, request: Request, count: int) -> Sequence[int]:
        answer: Sequence[int] = request.sampling.answer  # type: ignore[attr-defined]
        done, key = len(request.output), crc32(request.id.encode())
        return [
            token if uniform(key, number) < self._acceptance else WRONG
            for number, token in enumerate(answer[done : done + count], done)
        ]
