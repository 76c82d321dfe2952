"""The margin: a factor on expected times, so that tokens are late only as often as a target allows.

It sees scores (measured over expected time) and late tokens. It knows neither requests nor shapes.
"""

from collections import deque
from math import exp

AIM = 0.75
"""The share of the allowed late tokens that the margin aims at. If it aimed at all of them, it would miss the target half of the
time."""

STEP = 0.1
"""A late iteration raises the margin by a tenth. The iterations in time that the target allows between two late ones lower it by
as much."""

REACH = 1.25
"""The margin is at most this times the largest score in memory: it does not guard against what it has not seen for a while."""

MEMORY_S, MEMORY = 4.0, 160
"""How long a score is remembered: in seconds and in iterations, whichever ends first. After that a burst of slow iterations is over
for the margin. The budget has to be back within 5 s and 200 iterations, so a fifth of that remains to refill it."""

STILL = 2.0
"""An iteration with a score above this times the margin: the machine stood still. Scatter and wrong prices alone do not reach
it."""

MOST = 3.0
"""How often iterations with prefill may be late, in multiples of what the target allows, if few tokens come from such iterations. A
larger factor would spend at once what quiet hours have saved."""

LEAST_CREDIT, MOST_CREDIT = -2.0, 1.0
"""The bounds of the credit, in iterations. With them neither a bad hour nor a good one counts for long."""

ROUNDING = 1 + 1e-9
"""A score above the margin by less is the same number, rounded otherwise."""

HABIT = 0.01
"""The weight of the newest iteration in running means: they cover about a hundred iterations."""


class Margin:
    """`value`: the factor on expected times with which at most `late_share` of all tokens are late in the long run.

    Quantile tracking (Gibbs and Candes, NeurIPS 2021; Angelopoulos, Candes and Tibshirani, arXiv 2307.16895): an iteration above
    the margin raises it, one below lowers it a little. This holds for any distribution of the scores.

    `credit`: iterations that may still be late. Tokens in time earn it, late ones cost it.
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
        """Whether decodes alone are late too often: then no margin can keep the promise."""
        return self._lone_late > 2 * self.late_share

    def stood_still(self, score: float) -> bool:
        return score > STILL * self.value

    def learn(self, now: float, score: float, late: int, tokens: int, *, filled: bool, withheld: bool = False) -> None:
        """Learn from an iteration that ended at `now` (s) with this `score`. Its decodes had `tokens`, of which `late` were late.

        `filled`: it had prefill. `withheld`: prefill was left out of it. In both cases the margin decided how long it took. Do not
        call this for iterations in which the machine stood still.
        """
        over = score > self.value * ROUNDING
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
        """Keep only scores that no later score exceeds, so the first is the largest in memory."""
        recent = self._recent
        while recent and recent[-1][2] <= score:
            recent.pop()
        recent.append((now, self._count, score))
        self._count += 1
        while now - recent[0][0] > MEMORY_S or self._count - recent[0][1] > MEMORY:
            recent.popleft()
