"""A multiset of numbers, many of them equal, for percentiles of millions in little memory. It does not know what they measure."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Pool:
    """Each number is kept once with its count: all decodes of an iteration have the same gap. `size`: how many numbers."""

    BUFFER = 1 << 20

    def __init__(self) -> None:
        self.size = 0
        self._values: Floats = np.array([])
        self._counts: npt.NDArray[np.int64] = np.array([], dtype=np.int64)
        self._new: list[Floats] = []
        self._unsorted = 0

    def add(self, values: Floats) -> None:
        self._new.append(values)
        self._unsorted += len(values)
        self.size += len(values)
        if self._unsorted > max(self.BUFFER, len(self._values)):
            self._sort()

    def above(self, limit: float) -> int:
        """How many numbers are above `limit`."""
        self._sort()
        return int(self._counts[np.searchsorted(self._values, limit, side="right") :].sum())

    def percentiles(self, percents: Sequence[float], largest: int | None = None) -> list[float]:
        """Percentiles of all numbers, or of the `largest` so many; linear between two numbers, as numpy's."""
        self._sort()
        size = self.size if largest is None else largest
        upto = np.cumsum(self._counts)

        def at(rank: int) -> float:
            return float(self._values[np.searchsorted(upto, self.size - size + rank, side="right")])

        values = []
        for percent in percents:
            place = (size - 1) * (percent / 100)
            low, share = int(place), place % 1
            a, b = at(low), at(min(low + 1, size - 1))
            values.append(a + (b - a) * share if share < 0.5 else b - (b - a) * (1 - share))
        return values

    def _sort(self) -> None:
        if not self._new:
            return
        values, counts = np.unique(np.concatenate(self._new), return_counts=True)
        self._new.clear()
        self._unsorted = 0
        if len(self._values):
            values, counts = np.concatenate([self._values, values]), np.concatenate([self._counts, counts])
            order = np.argsort(values, kind="stable")
            values, counts = values[order], counts[order]
            firsts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
            values, counts = values[firsts], np.add.reduceat(counts, firsts)
        self._values, self._counts = values, counts
