"""How long prompts and outputs are, in words: `512/128`, `median=200,p90=800/uniform=16..256`, `openchat`, `FILE.csv`, and mixes of
these such as `FILE.csv + 5%:2000/64`. It knows nothing of when requests arrive.
"""

import math
import re
from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from pathlib import Path
from statistics import NormalDist
from typing import Self

import numpy as np
import numpy.typing as npt

from stallfree.workload.trace import Row, Trace

Z90 = NormalDist().inv_cdf(0.9)
MOST_REDRAWS = 1000
"""Draws in a row above the limit, after which the limit counts as a mistake."""
_EXAMPLE = (
    "write prompt/output, each of them 512, median=200,p90=800, uniform=16..256 or zipf=16..256,s=1.1; "
    "or openchat, arxiv, a FILE.csv or .jsonl; or a mix: 512/128 + 5%:2000/64"
)
_MORE = re.compile(r"\+\s*([0-9.]+)%:")
_FIXED = re.compile(r"([0-9]+)")
_SPREAD = re.compile(r"median=([0-9]+)\s*,\s*p90=([0-9]+)")
_UNIFORM = re.compile(r"uniform=([0-9]+)\.\.([0-9]+)")
_ZIPF = re.compile(r"zipf=([0-9]+)\.\.([0-9]+)\s*,\s*s=([0-9]+\.?[0-9]*)")


@dataclass(frozen=True, slots=True)
class Spread:
    """Log-normal numbers of tokens, by their median and 90th percentile. If these are equal, always that number."""

    median: int
    p90: int

    def __post_init__(self) -> None:
        if not 0 < self.median <= self.p90:
            raise ValueError(
                f"median={self.median},p90={self.p90} is not a spread of lengths: the median is above 0, p90 not below it"
            )

    def draw(self, rng: np.random.Generator) -> int:
        sigma = math.log(self.p90 / self.median) / Z90
        return max(1, round(self.median * math.exp(sigma * rng.standard_normal())))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Numbers of tokens from `low` to `high`, all equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, "uniform")

    @property
    def median(self) -> int:
        return (self.low + self.high) // 2

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))


@dataclass(frozen=True, slots=True)
class Zipf:
    """Numbers of tokens from `low` to `high`. The probability of the k-th is proportional to k to the power of -`s`."""

    low: int
    high: int
    s: float

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, "zipf")

    @property
    def median(self) -> int:
        return self._at(0.5)

    def draw(self, rng: np.random.Generator) -> int:
        return self._at(rng.random())

    def _at(self, share: float) -> int:
        return self.low + int(np.searchsorted(_zipf(self.high - self.low + 1, self.s), share, side="right"))


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of tokens by measured quantiles: (share below, tokens), with straight lines between them."""

    quantiles: tuple[tuple[float, int], ...]

    @property
    def median(self) -> int:
        return self._at(0.5)

    def draw(self, rng: np.random.Generator) -> int:
        return self._at(rng.random())

    def _at(self, share: float) -> int:
        after = bisect(self.quantiles, share, key=lambda point: point[0])
        (a, low), (b, high) = self.quantiles[after - 1 : after + 1]
        return max(1, round(low + (high - low) * (share - a) / (b - a)))


Side = Spread | Uniform | Zipf | Measured


@dataclass(frozen=True, slots=True)
class Pair:
    """The lengths of a prompt and, independent of it, of an output. `max_total` limits their sum (tokens)."""

    prompt: Side
    output: Side
    max_total: int | None = None

    def __post_init__(self) -> None:
        usual = self.prompt.median + self.output.median
        if self.max_total is not None and usual > self.max_total:
            raise ValueError(
                f"requests with a median of {usual} tokens do not fit --max-total {self.max_total}; raise it, or draw shorter ones"
            )

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw both lengths, again if they exceed the limit, so that lengths below it keep their proportions."""
        for _ in range(MOST_REDRAWS):
            prompt, output = self.prompt.draw(rng), self.output.draw(rng)
            if self.max_total is None or prompt + output <= self.max_total:
                return prompt, output
        raise ValueError(f"none of {MOST_REDRAWS} requests had at most {self.max_total} tokens; raise --max-total")


DATASETS = {
    # Deciles of the 30,731 conversation rounds in microsoft/sarathi-serve's openchat_sharegpt4 trace.
    "openchat": Pair(
        Measured(
            ((0.0, 1), (0.1, 74), (0.2, 382), (0.3, 777), (0.4, 1203), (0.5, 1730), (0.6, 2401), (0.7, 3235), (0.8, 4278),
             (0.9, 5696), (0.95, 6563), (0.99, 7434), (1.0, 8141))
        ),
        Measured(
            ((0.0, 2), (0.1, 84), (0.2, 181), (0.3, 271), (0.4, 346), (0.5, 415), (0.6, 493), (0.7, 581), (0.8, 683), (0.9, 834),
             (0.95, 920), (0.99, 998), (1.0, 1024))
        ),
        8192,
    ),
    # arxiv_summarization: median and P90 of Sarathi-Serve (OSDI'24, table 2); the ends are chosen to match its standard deviation.
    "arxiv": Pair(
        Measured(((0.0, 2443), (0.5, 7059), (0.9, 12985), (1.0, 16000))),
        Measured(((0.0, 76), (0.5, 208), (0.9, 371), (1.0, 450))),
        16384,
    ),
}  # fmt: skip
"""The paper's datasets, with its limits of tokens per request."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths of requests: of `base`, or of one of `mixed`, each with its probability."""

    base: Pair | Trace
    mixed: tuple[tuple[float, Pair | Trace], ...] = ()

    def __post_init__(self) -> None:
        share = sum(share for share, _ in self.mixed)
        if not 0 <= share < 1:
            raise ValueError(f"{share:.0%} of the requests are mixed in; mix in less than 100 %")

    @classmethod
    def parse(cls, text: str, max_total: int | None = None) -> Self:
        """Lengths from words, as at the top of this module, of at most `max_total` tokens, prompt and output together. Raises
        ValueError that says what to write.
        """
        base, *more = _MORE.split(text)
        shares = [_share(share, text) for share in more[::2]]
        return cls(_part(base, text, max_total), tuple(zip(shares, (_part(p, text, max_total) for p in more[1::2]), strict=True)))

    def draws(self, rng: np.random.Generator, *, in_order: bool = False) -> Iterator[Row]:
        """An endless series of requests' lengths. `in_order`: the rows of a base trace once, in their order."""
        edges = list(accumulate(share for share, _ in self.mixed))
        rows: Iterable[Row] = (
            self.base.lengths if in_order and isinstance(self.base, Trace) else (self.base.draw(rng) for _ in count())
        )
        for lengths in rows:
            at = bisect(edges, rng.random())
            yield lengths if at == len(edges) else self.mixed[at][1].draw(rng)

    @property
    def traces(self) -> list[Trace]:
        return [part for part in (self.base, *(part for _, part in self.mixed)) if isinstance(part, Trace)]

    def check(self, context: int) -> None:
        """Raises ValueError, with the line, if a trace has a request of more than `context` tokens, prompt and output."""
        for trace in self.traces:
            trace.check(context)


def _check_range(low: int, high: int, name: str) -> None:
    if not 0 < low <= high:
        raise ValueError(f"{name}={low}..{high} is not a range of tokens; begin above 0, and do not end below that")


@lru_cache(8)
def _zipf(size: int, s: float) -> npt.NDArray[np.float64]:
    upto: npt.NDArray[np.float64] = np.cumsum(np.arange(1, size + 1, dtype=float) ** -s)
    upto /= upto[-1]
    return upto


def _share(text: str, spec: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{text}% in {spec!r} is not a share of the requests; {_EXAMPLE}")
    return share


def _part(text: str, spec: str, max_total: int | None) -> Pair | Trace:
    text = text.strip()
    if text.endswith((".csv", ".jsonl")):
        trace = Trace.read(Path(text).expanduser())
        return trace if max_total is None else trace.within(max_total)
    if text in DATASETS:
        pair = DATASETS[text]
        return pair if max_total is None else replace(pair, max_total=max_total)
    prompt, slash, output = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} in {spec!r} is neither prompt/output nor a .csv; {_EXAMPLE}")
    return Pair(_side(prompt, spec), _side(output, spec), max_total)


def _side(text: str, spec: str) -> Side:
    text = text.strip()
    if match := _FIXED.fullmatch(text):
        return Spread(int(match[1]), int(match[1]))
    if match := _SPREAD.fullmatch(text):
        return Spread(int(match[1]), int(match[2]))
    if match := _UNIFORM.fullmatch(text):
        return Uniform(int(match[1]), int(match[2]))
    if match := _ZIPF.fullmatch(text):
        return Zipf(int(match[1]), int(match[2]), float(match[3]))
    raise ValueError(f"{text!r} in {spec!r} is not a number of tokens; {_EXAMPLE}")
