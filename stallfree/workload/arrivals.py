"""When requests arrive, in words: `poisson`, `gamma:cv=2`, `bursts:on=10s,off=50s`, `diurnal:period=24h,swing=0.8`. It knows
nothing of their lengths.

Gaps are drawn with mean 1 and divided by the rate. Bursts and days then stretch time, in the same way at any rate. So at another
rate the same requests come in the same order, only closer.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import accumulate, count
from typing import Protocol

import numpy as np

_EXAMPLES = "poisson, poisson:cut=3, gamma:cv=2, bursts:on=10s,off=50s, diurnal:period=24h,swing=0.8, or trace"
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([smh]?)")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Arrivals(Protocol):
    """A process of arrivals."""

    def times(self, rate: float, rng: np.random.Generator) -> Iterator[float]:
        """An endless series of arrivals, in seconds from the start of the run. `rate`: their mean number per second."""


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps with coefficient of variation `cv`: 1 is Poisson, more is burstier.

    `cut`: the longest gap, in mean gaps; None is no limit. Sarathi-Serve's artifact (OSDI'24) cuts at 3, so its real load is 1 / (1
    - exp(-3)) = 1.052 times the nominal one. Only a comparison with it needs this.
    """

    cv: float = 1.0
    cut: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.cv <= 100:
            raise ValueError(f"a coefficient of variation of {self.cv:g} is not above 0 and at most 100; 1 is Poisson")
        if self.cut is not None and not self.cut > 0:
            raise ValueError(f"a cut at {self.cut:g} times the mean gap leaves no gaps; cut=3 is the paper's")

    def times(self, rate: float, rng: np.random.Generator) -> Iterator[float]:
        shape = self.cv**-2
        scale = 1 / (shape * rate)
        gaps = (rng.standard_gamma(shape) * scale for _ in count())
        if self.cut is None:
            return accumulate(gaps)
        longest = self.cut / rate
        return accumulate(min(gap, longest) for gap in gaps)


@dataclass(frozen=True, slots=True)
class Bursts:
    """Poisson arrivals for a while, then none for a while (an interrupted Poisson process). These times are exponential with means
    `on` and `off` (s); the first is on. The rate while on makes the mean over all time the given one.
    """

    on: float
    off: float

    def __post_init__(self) -> None:
        if not (0 < self.on < math.inf and 0 < self.off < math.inf):
            raise ValueError(f"bursts of {self.on:g} s with {self.off:g} s between them are invalid; give seconds above 0")

    def times(self, rate: float, rng: np.random.Generator) -> Iterator[float]:
        gaps, lengths = rng.spawn(2)
        busier = (self.on + self.off) / self.on
        begin, length, before = 0.0, lengths.exponential(self.on), 0.0
        for steady in Gamma().times(rate, gaps):
            while steady - before > length * busier:
                before += length * busier
                begin += length + lengths.exponential(self.off)
                length = lengths.exponential(self.on)
            yield begin + (steady - before) / busier


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson arrivals whose rate follows a cosine with `period` (s), up and down by `swing` times the mean rate. The run begins at
    the lowest rate.
    """

    period: float
    swing: float

    def __post_init__(self) -> None:
        if not (0 < self.period < math.inf and 0 < self.swing <= 1):
            raise ValueError(
                f"a swing of {self.swing:g} times the rate every {self.period:g} s is invalid; give a swing above 0 and at most 1"
            )

    def times(self, rate: float, rng: np.random.Generator) -> Iterator[float]:
        return (self._when(steady) for steady in Gamma().times(rate, rng))

    def _when(self, steady: float) -> float:
        """The time until which as many requests arrive as in `steady` seconds at the mean rate, by bisection."""
        reach = self.swing * self.period / (2 * math.pi)
        low, high = steady - reach, steady + reach
        while True:
            middle = (low + high) / 2
            if middle in (low, high):
                return max(0.0, middle)
            if middle - reach * math.sin(2 * math.pi * middle / self.period) < steady:
                low = middle
            else:
                high = middle


KINDS: dict[str, type] = {"poisson": Gamma, "gamma": Gamma, "bursts": Bursts, "diurnal": Diurnal}


def parse(text: str) -> Arrivals:
    """Arrivals from words: a name, and after a colon its options. Raises ValueError that says what to write."""
    name, colon, rest = text.partition(":")
    message = f"unknown arrivals {text!r}; write {_EXAMPLES}"
    if name not in KINDS or (colon and not rest):
        raise ValueError(message)
    known = {"poisson": ["cut"], "gamma": ["cv"]}.get(name) or [f.name for f in fields(KINDS[name])]
    options: dict[str, float] = {}
    for item in rest.split(",") if rest else []:
        key, _, value = item.partition("=")
        match = _NUMBER.fullmatch(value.strip())
        if key.strip() not in known or key.strip() in options or match is None:
            raise ValueError(message)
        options[key.strip()] = float(match[1]) * _UNITS[match[2]]
    if name != "poisson" and options.keys() != set(known):
        raise ValueError(f"{text!r} lacks {', '.join(sorted(set(known) - options.keys()))}; write {_EXAMPLES}")
    arrivals: Arrivals = KINDS[name](**options)
    return arrivals
