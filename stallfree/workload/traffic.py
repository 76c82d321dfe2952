"""A load in words that fit on a command line, in a file and through a pipe: arrivals, lengths and the number of requests. It does
not know what the words mean; `arrivals` and `lengths` do.
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
"""Minimum seconds of arrivals, on average, in a trial of capacity, however few requests were chosen. In less time, the waits in a
queue that grows without bound do not yet differ from those in a stable one.
"""


@dataclass(frozen=True, slots=True)
class Traffic:
    """A load. `arrivals`, `lengths`, `max_total`: see `Workload.parse`. `rate`: requests per second; only a trace has its own. It
    ends after `requests` arrivals or `duration` seconds; without either, at a trace's end. The same `seed` draws the same requests.
    `mix`: whose they are, with which class and priority (see `mix`). `adapters`: how many different ones they ask for (None: they
    ask for none), by a popularity with the exponent `adapter_zipf` (see `workload.Popular`).
    """

    arrivals: str = "poisson"
    lengths: str = "512/128"
    max_total: int | None = None
    rate: float | None = None
    requests: int | None = None
    duration: float | None = None
    seed: int = 0
    mix: str | None = None
    adapters: int | None = None
    adapter_zipf: float = 1.0

    @property
    def workload(self) -> Workload:
        """The workload of these words. Raises ValueError for words that are not understood."""
        return _parsed(self.arrivals, self.lengths, self.max_total, self.mix, self.adapters, self.adapter_zipf)

    def ending(self, requests: int) -> Self:
        """This traffic; if its arrivals are drawn and have no end, only so many `requests` of it."""
        if self.arrivals == "trace" or self.requests is not None or self.duration is not None:
            return self
        return replace(self, requests=requests)

    def lasting(self, seconds: float, rate: float) -> Self:
        """This traffic; if its arrivals are drawn and `requests` end it, at least as many as come in `seconds` at `rate`. Raises
        ValueError for invalid seconds.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a trial of at least {seconds:g} s is invalid; give seconds from 0 on")
        if self.arrivals == "trace" or self.requests is None or self.requests < 1:
            return self
        return replace(self, requests=max(self.requests, math.ceil(seconds * rate)))

    def draw(self) -> list[Arrival]:
        """All arrivals. Raises ValueError as `Workload.draw` does, and for a missing rate."""
        self._check_rate(self.rate)
        return self.workload.draw(self.rate, self.seed, requests=self.requests, duration_s=self.duration)

    def stream(self, rate: float | None = None, seed: int | None = None) -> Iterator[Arrival]:
        """The arrivals one by one, with another `rate` or `seed` if these are given. Raises ValueError as `draw` does."""
        rate = self.rate if rate is None else rate
        self._check_rate(rate)
        seed = self.seed if seed is None else seed
        return self.workload.stream(rate, seed, requests=self.requests, duration_s=self.duration)

    def facts(self, requests: int) -> dict[str, Any]:
        """The traffic as JSON values, for reports. `requests`: how many arrived."""
        return {
            "arrivals": self.arrivals,
            "lengths": self.lengths,
            "max_total": self.max_total,
            "rate": self.rate,
            "requests": requests,
            "seed": self.seed,
            "mix": self.mix,
            "adapters": self.adapters,
            "adapter_zipf": self.adapter_zipf if self.adapters is not None else None,
        }

    def _check_rate(self, rate: float | None) -> None:
        if rate is None and self.arrivals != "trace":
            raise ValueError(
                "how many requests a second? give a mean, such as --rate 2, or take a trace's times with --arrivals trace"
            )


@lru_cache(16)
def _parsed(
    arrivals: str, lengths: str, max_total: int | None, mix: str | None, adapters: int | None, adapter_zipf: float
) -> Workload:
    """The workload, parsed once for all trials: a trace is a file to read."""
    from stallfree.workload.workload import Popular, Workload  # only here, because a command line needs the words alone

    popular = None if adapters is None else Popular(adapters, adapter_zipf)
    return Workload.parse(arrivals, lengths, max_total, mix, popular)
