"""A cost model for an engine that runs only certain numbers of tokens: it fills each iteration with padding up to the next one, as
engines with CUDA graphs do. It knows these sizes, and another cost model for the rest.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from stallfree.core.plan import Shape
from stallfree.perf.fitted import Fitted


class Padded:
    """`cost` for iterations that are padded to the next of `sizes`, in tokens. Above the largest size nothing is padded.

    Padding is priced as tokens at the beginning of a prompt: they are computed, and read no KV.
    """

    def __init__(self, cost: Fitted, sizes: Iterable[int]):
        self.cost = cost
        self.sizes = sorted(set(sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"sizes are numbers of tokens, each at least 1; these are {self.sizes}")

    def seconds(self, shape: Shape) -> float:
        return self.cost.seconds(self._filled(shape))

    def learn(self, shape: Shape, seconds: float) -> float:
        return self.cost.learn(self._filled(shape), seconds)

    def room(self, shape: Shape, start: int, most: int, limit: float) -> int:
        """A chunk that fills a size costs as much as one that almost does, so it ends at a size, or uses all that it may."""
        tokens = sum(count for _, count in shape)
        if tokens + most > self.sizes[-1]:
            above = self.cost.room(shape, start, most, limit)
            if tokens + above > self.sizes[-1]:
                return above
        fits = 0
        low, high = bisect_left(self.sizes, tokens + 1), bisect_left(self.sizes, tokens + most)
        while low <= high:  # the last size whose chunk is in time
            middle = (low + high) // 2
            count = most if middle == len(self.sizes) else min(most, self.sizes[middle] - tokens)
            if self.seconds([*shape, (start, count)]) <= limit:
                fits, low = count, middle + 1
            else:
                high = middle - 1
        return fits

    def state(self) -> Mapping[str, Any]:
        return self.cost.state()

    def _filled(self, shape: Shape) -> Shape:
        tokens = sum(count for _, count in shape)
        index = bisect_left(self.sizes, tokens)
        padding = self.sizes[index] - tokens if index < len(self.sizes) else 0
        return [*shape, (0, padding)] if padding else shape
