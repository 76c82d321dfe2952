"""By how much iterations take longer than a cost model expects, as a factor that is exceeded as often as a target allows.

It sees scores (measured over expected time) and late tokens, and knows neither requests nor shapes.
"""

from collections import deque
from math import exp

AIM = 0.75
"""Share of the allowed late tokens that the margin aims at. An aim at all of them would miss the target half of the time."""

STEP = 0.1
"""A late iteration raises the margin by a tenth; the iterations in time that the target allows between two late ones lower it by
as much."""

REACH = 1.25
"""The margin is at most this times the largest score in memory: what has not been seen for a while is not guarded against."""

MEMORY_S, MEMORY = 4.0, 160
"""A score is remembered for so many seconds and so many iterations, whichever ends first. Then a burst of slow iterations is over
for the margin: with the 5 s and 200 iterations in which the budget is to be back, a fifth remains to refill it."""

STILL = 2.0
"""A machine that takes more than this times the margin has stood still: usual scatter and wrong prices do not do that at once."""

MOST = 3.0
"""Iterations with prefill may be late up to this times as often as the target allows, if few tokens come out of such iterations.
More, and what quiet hours saved up would be spent at once."""

LEAST_CREDIT, MOST_CREDIT = -2.0, 1.0
"""Iterations. Bounded, so that neither a bad hour nor a good one counts for long."""

HABIT = 0.01
"""Weight of the newest iteration in what is usual: a hundred iterations."""


class Margin:
    """`value`: what to multiply an expected time with, so that at most `late_share` of all tokens are late in the long run.

    Quantile tracking (Gibbs and Candes, NeurIPS 2021; Angelopoulos, Candes and Tibshirani, arXiv 2307.16895): an iteration above
    the margin raises it, one below lowers it a little, whatever the scores are distributed like.

    `credit`: what the target leaves, in iterations that may be late: tokens in time earn it, late ones cost it.
    """

    def __init__(self, late_share: float):
        self.late_share = late_share
        self.credit = MOST_CREDIT
        self._tracked = 1.25
        self._usual = 0.0
        self._filled = 1.0
        self._lone_late = 0.0
        self._recent: deque[tuple[float, int, float]] = deque()
        self._count = 0

    @property
    def value(self) -> float:
        """At least 1."""
        return min(self._tracked, max(1.0, REACH * self._recent[0][2])) if self._recent else self._tracked

    @property
    def broken(self) -> bool:
        """Whether decodes are late too often by themselves: no margin keeps the promise then."""
        return self._lone_late > 2 * self.late_share

    def stood_still(self, score: float) -> bool:
        return score > STILL * self.value

    def learn(self, now: float, score: float, late: int, tokens: int, *, filled: bool, withheld: bool = False) -> None:
        """An iteration that ended at `now` (s) had this `score`; of the `tokens` of its decodes `late` were late. The margin had a
        say in how long it took if it was `filled`, holding prefill too, or if prefill was `withheld` from it. Iterations in which
        the machine stood still are not to be told.
        """
        over = score > self.value
        self._remember(now, score)
        aim = AIM * self.late_share
        self._usual += (HABIT if self._usual else 1.0) * (tokens - self._usual)
        size = tokens / self._usual
        late_size = late / self._usual
        self.credit = min(MOST_CREDIT, max(LEAST_CREDIT, self.credit + aim * size - late_size))
        self._filled += HABIT * (filled - self._filled)
        if filled or withheld:
            allowed = max(aim / MOST, aim - self._lone_late * (1 - self._filled)) / max(self._filled, 1 / MOST)
            self._tracked = max(1.0, self._tracked * exp(STEP * size * (over - allowed)))
        if not filled:
            self._lone_late += self.late_share * (late_size - self._lone_late)

    def _remember(self, now: float, score: float) -> None:
        """Keeps the scores of which none later is larger: the first is the largest in memory."""
        recent = self._recent
        while recent and recent[-1][2] <= score:
            recent.pop()
        recent.append((now, self._count, score))
        self._count += 1
        while now - recent[0][0] > MEMORY_S or self._count - recent[0][1] > MEMORY:
            recent.popleft()
