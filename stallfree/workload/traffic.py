"""What arrives, in words that fit on a command line, in a file, and through a pipe to another process: arrivals, lengths, how many.
What the words mean is said in `arrivals` and `lengths`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from stallfree.workload.workload import Arrival, Workload


SHORTEST_S = 60.0
"""Seconds that the arrivals of a trial of capacity last at least, on average, however few requests were asked for: in less time,
requests that queue without bound have not waited for long enough to be told from those that do not.
"""


@dataclass(frozen=True, slots=True)
class Traffic:
    """`arrivals`, `lengths`, `max_total`: see `Workload.parse`. `rate`: requests per second, which only a trace has of its own;
    `requests` of them, or those of `duration` seconds; a trace's whole if neither is given. `seed` draws the same ones again.
    """

    arrivals: str = "poisson"
    lengths: str = "512/128"
    max_total: int | None = None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None
    seed: int = 0

    @property
    def workload(self) -> Workload:
        """Raises ValueError for words that are not understood."""
        return _parsed(self.arrivals, self.lengths, self.max_total)

    def ending(self, requests: int) -> Self:
        """This; or, of arrivals that are drawn and have no end of their own, so many `requests`."""
        if self.arrivals == "trace" or self.requests is not None or self.duration is not None:
            return self
        return replace(self, requests=requests)

    def lasting(self, seconds: float, rate: float) -> Self:
        """This; or, of drawn arrivals that `requests` end, as many as come in `seconds` at `rate`, if those are more. Raises
        ValueError for seconds that cannot be.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a trial of at least {seconds:g} s cannot be; give seconds, 0 or more")
        if self.arrivals == "trace" or self.requests is None or self.requests < 1:
            return self
        return replace(self, requests=max(self.requests, math.ceil(seconds * rate)))

    def draw(self) -> list[Arrival]:
        """All that arrives. Raises ValueError as `Workload.draw` does, and for a rate that is missing."""
        self._check_rate(self.rate)
        return self.workload.draw(self.rate, self.seed, requests=self.requests, duration_s=self.duration)

    def stream(self, rate: float | None = None, seed: int | None = None) -> Iterator[Arrival]:
        """What arrives, one after another, at another `rate` or with another `seed` if these are given; errors as `draw`."""
        rate = self.rate if rate is None else rate
        self._check_rate(rate)
        seed = self.seed if seed is None else seed
        return self.workload.stream(rate, seed, requests=self.requests, duration_s=self.duration)

    def facts(self, requests: int) -> dict[str, Any]:
        """For reports; `requests` came of it."""
        return {
            "arrivals": self.arrivals,
            "lengths": self.lengths,
            "max_total": self.max_total,
            "rate": self.rate,
            "requests": requests,
            "seed": self.seed,
        }

    def _check_rate(self, rate: float | None) -> None:
        if rate is None and self.arrivals != "trace":
            raise ValueError(
                "how many requests a second? --rate 2 makes it two, on average; --arrivals trace takes a trace's times"
            )


@lru_cache(16)
def _parsed(arrivals: str, lengths: str, max_total: int | None) -> Workload:
    """Once for all trials: a trace is a file to be read."""
    from stallfree.workload.workload import Workload  # not before it is wanted: a command line needs the words alone

    return Workload.parse(arrivals, lengths, max_total)
