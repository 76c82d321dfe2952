"""How long prompts and outputs are, in words: `512/128`, `median=200,p90=800/median=60,p90=150`, `FILE.csv`, and mixes of these
such as `FILE.csv + 5%:2000/64`. It knows nothing of when requests arrive.
"""

import math
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from statistics import NormalDist
from typing import Self

import numpy as np

from stallfree.workload.trace import Trace

Z90 = NormalDist().inv_cdf(0.9)
MOST_REDRAWS = 1000
"""Lengths above the limit that are drawn again, one after another, before the limit is taken for a mistake."""
_EXAMPLE = "write 512/128, median=200,p90=800/median=60,p90=150, a FILE.csv, or a mix: 512/128 + 5%:2000/64"
_MORE = re.compile(r"\+\s*([0-9.]+)%:")
_SIDE = re.compile(r"(?:(?P<tokens>[0-9]+)|median=(?P<median>[0-9]+)\s*,\s*p90=(?P<p90>[0-9]+))")


@dataclass(frozen=True, slots=True)
class Spread:
    """Log-normal numbers of tokens, given by their median and 90th percentile; where these are equal, always that number."""

    median: int
    p90: int

    def __post_init__(self) -> None:
        if not 0 < self.median <= self.p90:
            raise ValueError(
                f"median={self.median},p90={self.p90} is no spread of lengths: the median is above 0, p90 not below it"
            )

    @classmethod
    def parse(cls, text: str, spec: str) -> Self:
        match = _SIDE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text.strip()!r} in {spec!r} is not a number of tokens; {_EXAMPLE}")
        return cls(int(match["tokens"] or match["median"]), int(match["tokens"] or match["p90"]))

    def draw(self, rng: np.random.Generator) -> int:
        sigma = math.log(self.p90 / self.median) / Z90
        return max(1, round(self.median * math.exp(sigma * rng.standard_normal())))


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt's length and, independent of it, an output's; `max_total` limits their sum."""

    prompt: Spread
    output: Spread
    max_total: int | None = None

    def __post_init__(self) -> None:
        if self.max_total is not None and self.prompt.median + self.output.median > self.max_total:
            usual = self.prompt.median + self.output.median
            raise ValueError(f"requests of {usual} tokens as a rule do not fit a limit of {self.max_total}; raise the limit")

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """What is above the limit is drawn again, so that the lengths below it keep their proportions."""
        for _ in range(MOST_REDRAWS):
            prompt, output = self.prompt.draw(rng), self.output.draw(rng)
            if self.max_total is None or prompt + output <= self.max_total:
                return prompt, output
        raise ValueError(f"of {MOST_REDRAWS} requests none had at most {self.max_total} tokens; raise the limit")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Most requests are as `base` says; each is, with the probability beside it, one of `mixed` instead."""

    base: Pair | Trace
    mixed: tuple[tuple[float, Pair | Trace], ...] = ()

    def __post_init__(self) -> None:
        share = sum(share for share, _ in self.mixed)
        if not 0 <= share < 1:
            raise ValueError(f"{share:.0%} of the requests are mixed in; leave some of the others")

    @classmethod
    def parse(cls, text: str, max_total: int | None = None) -> Self:
        """Lengths from words; of `max_total` tokens, prompt and output together, at the most. Raises ValueError that says what to
        write.
        """
        base, *more = _MORE.split(text)
        shares = [_share(share, text) for share in more[::2]]
        return cls(_part(base, text, max_total), tuple(zip(shares, (_part(p, text, max_total) for p in more[1::2]), strict=True)))

    def draws(self, rng: np.random.Generator, *, in_order: bool = False) -> Iterator[tuple[int, int]]:
        """(prompt, output) tokens of one request after another, without end; `in_order`: a base trace's rows once, as they are."""
        edges = list(accumulate(share for share, _ in self.mixed))
        rows = self.base.lengths if in_order and isinstance(self.base, Trace) else (self.base.draw(rng) for _ in count())
        for lengths in rows:
            at = bisect(edges, rng.random())
            yield lengths if at == len(edges) else self.mixed[at][1].draw(rng)


def _share(text: str, spec: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{text}% in {spec!r} is no share of the requests; {_EXAMPLE}")
    return share


def _part(text: str, spec: str, max_total: int | None) -> Pair | Trace:
    text = text.strip()
    if text.endswith(".csv"):
        trace = Trace.read(Path(text).expanduser())
        return trace if max_total is None else trace.within(max_total)
    prompt, slash, output = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} in {spec!r} is neither prompt/output nor a .csv; {_EXAMPLE}")
    return Pair(Spread.parse(prompt, spec), Spread.parse(output, spec), max_total)
