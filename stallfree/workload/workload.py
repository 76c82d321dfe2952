"""A workload: arrivals and lengths in words, drawn from a seed. What is drawn is the same for the same seed, on any machine.

Gaps are drawn with mean 1 and divided by the rate, apart from the lengths: at another rate the same requests come in the same
order, only closer. Comparisons of rates then differ in the rate and not in luck.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count, islice, takewhile
from typing import Self

import numpy as np

from stallfree.workload.lengths import Lengths
from stallfree.workload.trace import Trace

MOST_REQUESTS = 1_000_000
"""More are taken for a mistake: they would be drawn, and a file opened for each, before the first is sent."""
_GAMMA = re.compile(r"gamma:cv=([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come: `at` in seconds from the start of the run, and its sizes in tokens."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """`cv`: coefficient of variation of the gaps between arrivals, which are gamma-distributed; 1 is Poisson, more is burstier.
    None: at the times of the trace that is the lengths' base, in its order.
    """

    lengths: Lengths
    cv: float | None = 1.0

    def __post_init__(self) -> None:
        if self.cv is not None and not 0 < self.cv <= 100:
            raise ValueError(f"a coefficient of variation of {self.cv:g} is not above 0 and at most 100; 1 is Poisson")
        if self.cv is None and not (isinstance(self.lengths.base, Trace) and self.lengths.base.times):
            raise ValueError("arrivals as in a trace need lengths from a .csv with a column arrived_at")

    @classmethod
    def parse(cls, arrivals: str, lengths: str, max_total: int | None = None) -> Self:
        """`arrivals`: poisson, gamma:cv=NUMBER or trace; `lengths`, `max_total`: see `Lengths.parse`, and the errors too."""
        drawn = Lengths.parse(lengths, max_total)
        if arrivals in ("poisson", "trace"):
            return cls(drawn, 1.0 if arrivals == "poisson" else None)
        match = _GAMMA.fullmatch(arrivals)
        if match is None or match[1].count(".") > 1 or match[1] == ".":
            raise ValueError(f"unknown arrivals {arrivals!r}; write poisson, gamma:cv=2 or trace")
        return cls(drawn, float(match[1]))

    def draw(self, rate: float | None, seed: int, *, requests: int | None = None, duration_s: float | None = None) -> list[Arrival]:
        """`requests` arrivals, or those of the first `duration_s` seconds; a trace's whole if neither is given.

        `rate`: mean arrivals per second; a trace's times are stretched to it, or kept if it is None. The rate is that of the
        distribution, so a run's own differs by chance. Raises ValueError for what cannot be drawn.
        """
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"a rate of {rate:g} requests per second cannot be; give one above 0")
        if seed < 0:
            raise ValueError(f"the seed {seed} is negative; give 0 or more")
        if requests is not None and requests < 1:
            raise ValueError(f"{requests} requests are no workload; ask for at least 1")
        if duration_s is not None and not 0 < duration_s < float("inf"):
            raise ValueError(f"a duration of {duration_s:g} s cannot be; give seconds above 0")
        if self.cv is not None and (requests is None) == (duration_s is None):
            raise ValueError("arrivals that are drawn have no end of their own; give either a number of requests or a duration")
        asked = requests if duration_s is None or rate is None else rate * duration_s
        if self.cv is not None and asked is not None and asked > MOST_REQUESTS:
            raise ValueError(f"about {asked:,.0f} requests are more than the {MOST_REQUESTS:,} that can be; ask for fewer")
        timing, sizes = np.random.default_rng(seed).spawn(2)
        coming: Iterator[Arrival] = (
            Arrival(at, prompt, output)
            for at, (prompt, output) in zip(
                self._times(rate, timing), self.lengths.draws(sizes, in_order=self.cv is None), strict=False
            )
        )
        if duration_s is not None:
            coming = takewhile(lambda arrival: arrival.at < duration_s, coming)
        drawn = list(islice(coming, requests))
        if not drawn:
            raise ValueError(f"nothing arrives in the first {duration_s:g} seconds; take a longer duration or a higher rate")
        if requests is not None and duration_s is None and len(drawn) < requests:
            raise ValueError(f"the trace has {len(drawn)} requests that fit, fewer than {requests}; ask for that many or fewer")
        return drawn

    def _times(self, rate: float | None, rng: np.random.Generator) -> Iterator[float]:
        if self.cv is None and isinstance(self.lengths.base, Trace):
            stretch = 1.0 if rate is None else self.lengths.base.rate / rate
            return (t * stretch for t in self.lengths.base.times or ())
        if rate is None or self.cv is None:
            raise ValueError("arrivals that are drawn need a rate; give requests per second")
        shape = self.cv**-2
        scale = 1 / (shape * rate)
        return accumulate(rng.standard_gamma(shape) * scale for _ in count())
