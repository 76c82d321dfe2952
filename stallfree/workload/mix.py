"""Whose the arriving requests are, in words: `acme: 75% class=interactive; crawler: 25% class=batch priority=1`. It knows neither
when they arrive nor how long they are, nor what a class promises.
"""

import math
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np

_PART = re.compile(r"\s*([^\s:;=]{1,64})\s*:\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*%(.*)")
_EXAMPLE = "write NAME: SHARE%, then class=NAME and priority=NUMBER if wanted: acme: 75% class=interactive; crawler: 25% priority=1"
ROUNDING = 5e-3
"""By so much shares may exceed the whole: thirds are written as 33.4 %."""


@dataclass(frozen=True, slots=True)
class Part:
    """A `share` of the requests, from 0 to 1: of one tenant, of one service class ("" for none), with one priority (lower is served
    first)."""

    tenant: str
    share: float
    service_class: str = ""
    priority: int = 0


NOBODY = Part("", 0.0)
"""What requests have that are in no part."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Parts of the requests. What they leave of the whole has no tenant. A tenant may have several parts."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        total = sum(part.share for part in self.parts)
        if total > 1 + ROUNDING:
            raise ValueError(f"the parts of the mix are {total:.4g} times the requests; make them 100 % or less")

    @classmethod
    def parse(cls, text: str) -> Self:
        """A mix from words, as at the top of this module. Raises ValueError that says what to write."""
        parts = tuple(_part(item) for item in text.split(";") if item.strip())
        if not parts:
            raise ValueError(f"the mix is empty; {_EXAMPLE}")
        return cls(parts)

    def draws(self, rng: np.random.Generator) -> Iterator[Part]:
        """An endless series of parts, each at random by its share."""
        edges = list(accumulate(part.share for part in self.parts))
        choices = (*self.parts, NOBODY)
        if edges[-1] >= 1 - ROUNDING:  # shares that are rounded leave nothing over
            edges.pop()
        while True:
            yield choices[bisect(edges, rng.random())]


def weights(text: str) -> dict[str, float]:
    """Tenants' weights from words: NAME=WEIGHT, separated by commas. Raises ValueError that says what to write."""
    values: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = (word.strip() for word in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"{item.strip()!r} is not the weight of a tenant; write NAME=WEIGHT, above 0: acme=3,crawler=1")
        if name in values:
            raise ValueError(f"tenant {name!r} has two weights; give one")
        values[name] = weight
    return values


def _part(item: str) -> Part:
    match = _PART.fullmatch(item)
    if match is None:
        raise ValueError(f"{item.strip()!r} is no part of a mix; {_EXAMPLE}")
    share = float(match[2]) / 100
    if not 0 < share <= 1:
        raise ValueError(f"{item.strip()!r} is {share:.4g} times the requests; give a share above 0 and at most 100%")
    values: dict[str, str] = {}
    for word in match[3].split():
        key, _, value = word.partition("=")
        if key not in ("class", "priority") or not value or key in values:
            raise ValueError(f"{word!r} in {item.strip()!r} is not understood; {_EXAMPLE}")
        values[key] = value
    try:
        priority = int(values.get("priority", "0"))
    except ValueError:
        raise ValueError(f"priority {values['priority']!r} in {item.strip()!r} is no whole number; {_EXAMPLE}") from None
    return Part(match[1], share, values.get("class", ""), priority)
