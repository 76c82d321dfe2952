"""An iteration's time as a sum of a few named features, with prices fitted to iterations that were timed.

The prices say what things cost relative to each other, which the model and the machine decide; they are learned slowly. `pace` says
how fast the machine is just now, whatever else it does; it is learned within some ten iterations. The model knows shapes and
seconds, not who ran them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, Self

from stallfree.core.plan import Shape, parts

FEATURES = ("iteration", "tokens", "decode context", "prefill context", "prefill attention", "sampled rows")
"""1; the iteration's tokens; tokens of KV that its decodes read, and its prefill chunks; pairs of query and key in those chunks;
its pieces of work, of which each yields at most one row of logits, and the plain rows that sampling counts for beyond these."""

SCALE = (1.0, 100.0, 10_000.0, 10_000.0, 100_000.0, 10.0)
"""What a feature is counted in, so that all are of one order and the sums well conditioned."""

ANCHOR = 50.0
"""Iterations that the calibration counts for, against those seen while serving: what traffic never shows stays as calibrated."""

FORGET = 0.99
"""Weight of an iteration against the next: about a hundred count."""

HASTE = 0.1
"""Weight of the newest iteration in `pace`: after ten iterations, two thirds of a change of speed are in it."""

Row = list[float]
Sample = tuple[Shape, float]
"""An iteration's shape and the seconds that it took."""


@dataclass(frozen=True, slots=True)
class Errors:
    """How well a model describes iterations: relative errors |predicted / measured - 1|, and the shape with the largest. `scatter`:
    measured over predicted, of each iteration.
    """

    iterations: int
    median: float
    p90: float
    largest: float
    worst: Shape
    scatter: tuple[float, ...]


class Fitted:
    """A cost model with `prices` in seconds for each of `FEATURES`, counted in `SCALE`; none is negative.

    `quantum`: executors work in tiles, and an iteration whose tokens fill whole ones wastes nothing; `room` keeps to its multiples.
    Least squares on relative errors (a millisecond matters more in a short iteration), recursive with forgetting (Ljung, System
    Identification, chapter 11), and solved for prices that are not negative by coordinate descent from where they stood.
    """

    def __init__(self, prices: Sequence[float] = (0.008, 0.04, 0.007, 0.007, 0.02, 0.005), quantum: int = 1):
        if len(prices) != len(FEATURES) or not all(0 <= price < inf for price in prices) or not any(prices):
            raise ValueError(f"prices are {len(FEATURES)} times in seconds, none negative and not all 0; these are {list(prices)}")
        if quantum < 1:
            raise ValueError(f"quantum is {quantum}, expected at least 1 token")
        self.prices = [float(price) for price in prices]
        self.quantum = quantum
        self.pace = 1.0
        self.error = 0.0
        # Uncalibrated, each price stands for itself.
        size = len(prices)
        self._anchor_to([[ANCHOR / size / p**2 if i == j and p else 0.0 for j in range(size)] for i, p in enumerate(prices)])

    @classmethod
    def fit(cls, samples: Sequence[Sample], quantum: int = 1) -> Self:
        """The model that describes `samples` best. Raises ValueError without any, or for times that are not above 0."""
        if not samples or not all(0 < seconds < inf for _, seconds in samples):
            raise ValueError(f"a fit needs iterations that took time; these are {len(samples)}")
        size = len(FEATURES)
        matrix, target = [[0.0] * size for _ in range(size)], [0.0] * size
        for shape, seconds in samples:
            _add(matrix, target, [x / seconds for x in features(shape)])
        prices = [0.0] * size
        for _ in range(5000):
            _improve(prices, matrix, target)
        model = cls(prices, quantum)
        model._anchor_to([[value * ANCHOR / len(samples) for value in row] for row in matrix])
        return model

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The model that `state` was taken of, as it was before it learned. Raises ValueError for anything else."""
        try:
            model = cls(state["prices"], state["quantum"])
            anchor = [[float(value) for value in row] for row in state["anchor"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a cost model: {error!r}") from None
        if [len(FEATURES)] * len(FEATURES) != [len(row) for row in anchor]:
            raise ValueError("not the state of a cost model: its anchor is not square")
        model._anchor_to(anchor)
        return model

    def state(self) -> dict[str, Any]:
        """What the model starts from, for JSON. What it has learned while serving is not in it."""
        return {"prices": self._start, "quantum": self.quantum, "anchor": self._anchor}

    def seconds(self, shape: Shape) -> float:
        return self.batch(*parts(shape))

    def batch(self, decodes: int, context: int, chunks: Shape) -> float:
        _, tokens, decoding, prefilling, pairs, rows = _row(decodes, context, chunks)
        one, per_token, per_decoding, per_prefilling, per_pair, per_row = self.prices
        return self.pace * (
            one + per_token * tokens + per_decoding * decoding + per_prefilling * prefilling + per_pair * pairs + per_row * rows
        )

    def room(self, shape: Shape, start: int, most: int, limit: float) -> int:
        prices = (self.pace * price / scale for price, scale in zip(self.prices, SCALE, strict=True))
        _, per_token, _, per_context, per_pair, per_row = prices
        spare = limit - self.seconds(shape) - per_row - per_context * start
        if spare <= 0:
            return 0
        # A chunk of c tokens costs linear x c + square x c^2.
        linear, square = per_token + per_pair * (start + 0.5), per_pair / 2
        if linear * most + square * most**2 <= spare:
            return most
        count = int(2 * spare / (linear + sqrt(linear**2 + 4 * square * spare)))
        waste = (sum(count for _, count in shape) + count) % self.quantum
        return count - waste if waste < count else count

    def learn(self, shape: Shape, seconds: float) -> float:
        row = features(shape)
        ratio = seconds / (self.pace * _product(self.prices, row))
        self.error += 0.05 * (abs(1 / ratio - 1) - self.error)
        self.pace *= min(max(ratio, 1 / 3), 3) ** HASTE
        for values in (*self._matrix, self._target):
            for i in range(len(values)):
                values[i] *= FORGET
        _add(self._matrix, self._target, [x * self.pace / seconds for x in row])
        matrix = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self._anchor, self._matrix, strict=True)]
        _improve(self.prices, matrix, [a + b for a, b in zip(self._pull, self._target, strict=True)])
        return ratio

    def errors(self, samples: Sequence[Sample]) -> Errors:
        """How well `samples` are described. Raises ValueError without any."""
        if not samples:
            raise ValueError("errors are of iterations; there are none")
        scatter = tuple(seconds / self.seconds(shape) for shape, seconds in samples)
        found = sorted(((abs(1 / s - 1), tuple(shape)) for s, (shape, _) in zip(scatter, samples, strict=True)), key=lambda e: e[0])
        size = len(found)
        return Errors(size, found[size // 2][0], found[min(size - 1, size * 9 // 10)][0], *found[-1], scatter)

    def _anchor_to(self, anchor: list[Row]) -> None:
        self._start = list(self.prices)
        self._anchor = anchor
        self._pull = [_product(row, self.prices) for row in anchor]
        self._matrix: list[Row] = [[0.0] * len(self.prices) for _ in self.prices]
        self._target: Row = [0.0] * len(self.prices)


def features(shape: Shape) -> Row:
    """The `FEATURES` of an iteration, counted in `SCALE`."""
    return list(_row(*parts(shape)))


def _row(decodes: int, context: int, chunks: Shape) -> tuple[float, float, float, float, float, float]:
    tokens, before, pairs, rows = decodes, 0, 0.0, decodes
    for start, count in chunks:
        if not count:
            rows += start
            continue
        rows += 1
        tokens += count
        before += start
        pairs += count * (start + (count + 1) / 2)
    one, per_token, per_decoding, per_prefilling, per_pair, per_row = SCALE
    return 1 / one, tokens / per_token, context / per_decoding, before / per_prefilling, pairs / per_pair, rows / per_row


def _product(a: Iterable[float], b: Iterable[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _add(matrix: list[Row], target: Row, row: Row) -> None:
    """One more equation, `row` times prices = 1."""
    for i, value in enumerate(row):
        target[i] += value
        line = matrix[i]
        for j, other in enumerate(row):
            line[j] += value * other


def _improve(prices: Row, matrix: list[Row], target: Row) -> None:
    """One sweep of coordinate descent towards the least squares, in which no price is negative."""
    for i, line in enumerate(matrix):
        if line[i] > 0:
            prices[i] = max(0.0, prices[i] + (target[i] - _product(line, prices)) / line[i])
