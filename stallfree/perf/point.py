"""One measured kernel with its price, and the errors of prices on many. It does not know which files they come from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stallfree.perf.hardware import Hardware


class Point(NamedTuple):
    """One measurement: the name of its file, device, operator, measured `seconds`, and `price`: the seconds by the roofline."""

    file: str
    device: Hardware
    operator: str
    seconds: float
    price: Callable[[Hardware], float]


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors |model / measured - 1| of `points` measurements: their median and 90th percentile, and the median with its
    sign."""

    points: int
    median: float
    p90: float
    bias: float

    @classmethod
    def of(cls, points: Iterable[Point]) -> "Error":
        """The errors of `points`. Raises ValueError if there are none."""
        signed = sorted(point.price(point.device) / point.seconds - 1 for point in points)
        if not signed:
            raise ValueError("errors need at least one measurement; there is none")
        errors, size = sorted(abs(error) for error in signed), len(signed)
        return cls(size, errors[size // 2], errors[min(size - 1, size * 9 // 10)], signed[size // 2])


MOST = 1_000_000_000
"""No number of tokens, rows, sequences or devices is larger; a larger one is a mistake."""


class Row:
    """A line of a csv. Its methods read a cell as what it has to be, and raise ValueError with `where` otherwise."""

    def __init__(self, cells: Mapping[str, str], where: str):
        self.cells, self.where = cells, where

    def number(self, column: str, least: float = 0.0) -> float:
        text = self.cells[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise ValueError(f"{self.where}: {column} is {text!r}; write a number of at least {least:g}")
        return value

    def whole(self, column: str, least: int = 1) -> int:
        value = self.number(column, least)
        if value != int(value) or value > MOST:
            raise ValueError(f"{self.where}: {column} is {self.cells[column]!r}; write a whole number up to {MOST:,}")
        return int(value)

    def measured(self, column: str) -> float | None:
        """Seconds in a column of milliseconds; None for an empty cell or a time of 0."""
        return self.number(column) / 1000 or None if self.cells.get(column, "").strip() else None


def by(points: Sequence[Point], key: Callable[[Point], str]) -> dict[str, list[Point]]:
    """The measurements by their `key`, in their order."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups
