"""An iteration's time as a sum of a few named features, with prices fitted to timed iterations.

The prices are costs relative to each other. The model and the machine decide them, and they are learned slowly. `pace` is the
machine's speed at present; it is learned within about ten iterations. This cost model knows shapes and seconds, not who ran them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, Self

from stallfree.core.plan import Shape, parts

FEATURES = (
    "iteration", "tokens", "decode context", "prefill context", "prefill attention", "sampled rows", "adapter ranks",
    "adapter products", "experts", "many tokens", "few tokens",
)  # fmt: skip
"""In this order: 1; the iteration's tokens, if they are many; tokens of KV that its decodes read; tokens of KV that its prefill
chunks read; pairs of query and key in those chunks; rows of logits, one for each piece of work, with the extra rows that sampling
counts as; the sum of the ranks of its adapters; that sum times the tokens; the expected share of a layer's experts that at least
one token meets, or 0 for a dense model; 1 if the tokens are many; its tokens, if they are few. Only executors that take a few
tokens another way know few: for others, the last two are 0."""

SIZES = (len(FEATURES) - 5, len(FEATURES) - 3, len(FEATURES) - 2, len(FEATURES))
"""How many prices a cost model may be made of: those of few tokens may be left out, that of experts, and those of adapters."""

SCALE = (1.0, 100.0, 10_000.0, 10_000.0, 100_000.0, 10.0, 100.0, 10_000.0, 1.0, 1.0, 1.0)
"""The unit of each feature. With these units all prices have one order of magnitude, and the least squares are well conditioned."""

GUESSES = {6: (0, 0.3), 7: (1, 0.05)}
"""A calibration has no adapters. Until iterations have some, 100 ranks cost 0.3 times what an iteration costs before its tokens,
and ranks times tokens 0.05 times what tokens cost, in units of `SCALE`: as many bytes and products, for models of a few hundred
million to a few thousand million weights."""

HELD = 0.01
"""How firmly a guess is held: as by the first few iterations with adapters. Without it, the first one sets the price, and it may be
slow for another reason."""

ANCHOR = 50.0
"""The weight of the calibration, in iterations seen while serving. Prices that traffic never shows stay as calibrated."""

FORGET = 0.99
"""The weight of an iteration relative to the next one: about a hundred count."""

HASTE = 0.1
"""The weight of the newest iteration in `pace`, which has two thirds of a change of speed after ten iterations."""

ALL_MANY = -1
"""A value of `few` with which any number of tokens is many."""

Row = list[float]
Features = tuple[float, float, float, float, float, float, float, float, float, float, float]
Sample = tuple[Shape, float]
"""An iteration's shape and the seconds that it took."""


@dataclass(frozen=True, slots=True)
class Errors:
    """How well a cost model describes iterations: relative errors |predicted / measured - 1|, and the shape with the largest.
    `scatter`: measured over predicted time of each iteration.
    """

    iterations: int
    median: float
    p90: float
    largest: float
    worst: Shape
    scatter: tuple[float, ...]


class Fitted:
    """A cost model with `prices`: seconds for each of `FEATURES`, in units of `SCALE`; those that are left out are 0, and none is
    negative.

    `unmet`: the share of a layer's experts that a token does not meet, so that b tokens meet 1 - `unmet`^b of them; 0 for a dense
    model.
    `quantum`: tokens of an executor's tile. An iteration that fills whole tiles wastes nothing, so `room` keeps to multiples of it.
    The fit is least squares on relative errors, because a millisecond matters more in a short iteration. It is recursive with
    forgetting (Ljung, System Identification, chapter 11). Coordinate descent from the present prices keeps them above or at 0.
    """

    def __init__(
        self,
        prices: Sequence[float] = (0.008, 0.04, 0.007, 0.007, 0.02, 0.005),
        quantum: int = 1,
        unmet: float = 0.0,
        few: int = 0,
    ):
        if len(prices) not in SIZES or not all(0 <= price < inf for price in prices) or not any(prices):
            raise ValueError(f"prices are {len(FEATURES)} times in seconds, none negative and not all 0; these are {list(prices)}")
        if quantum < 1:
            raise ValueError(f"quantum is {quantum}, expected at least 1 token")
        if not 0 <= unmet < 1:
            raise ValueError(f"unmet is {unmet:g}; the share of experts that a token does not meet is from 0 to below 1")
        if few < 0:
            raise ValueError(f"few is {few}, expected a number of tokens, or 0")
        self.prices = _padded(prices)
        self.quantum = quantum
        self.unmet = unmet
        self.few = few
        self.pace = 1.0
        self.error = 0.0
        # Without a calibration, each price is anchored by itself.
        size = len(prices)
        self._anchor_to([[ANCHOR / size / p**2 if i == j and p else 0.0 for j in range(size)] for i, p in enumerate(self.prices)])

    @classmethod
    def fit(cls, samples: Sequence[Sample], quantum: int = 1, unmet: float = 0.0, few: int = 0) -> Self:
        """The cost model that describes `samples` best. Raises ValueError if there are none, or for times that are not above 0."""
        if not samples or not all(0 < seconds < inf for _, seconds in samples):
            raise ValueError(f"a fit needs iterations that took time; these are {len(samples)}")
        size = len(FEATURES)
        matrix, target = [[0.0] * size for _ in range(size)], [0.0] * size
        for shape, seconds in samples:
            _add(matrix, target, [x / seconds for x in _row(*parts(shape), unmet, few)])
        prices = [0.0] * size
        for _ in range(5000):
            _improve(prices, matrix, target)
        model = cls(prices, quantum, unmet, few)
        model._anchor_to([[value * ANCHOR / len(samples) for value in row] for row in matrix])
        return model

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The cost model with this `state`, as it was before it learned. Raises ValueError if `state` is not one."""
        try:
            model = cls(state["prices"], state["quantum"], state.get("unmet", 0.0), state.get("few", 0))
            anchor = [[float(value) for value in row] for row in state["anchor"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a cost model: {error!r}") from None
        if [len(anchor)] * len(anchor) != [len(row) for row in anchor] or len(anchor) not in SIZES:
            raise ValueError("not the state of a cost model: its anchor is not square")
        model._anchor_to(anchor)
        return model

    def state(self) -> dict[str, Any]:
        """The state before any learning, for JSON."""
        return {"prices": self._start, "quantum": self.quantum, "anchor": self._anchor, "unmet": self.unmet, "few": self.few}

    def seconds(self, shape: Shape) -> float:
        return self.batch(*parts(shape))

    def batch(self, decodes: int, context: int, chunks: Shape) -> float:
        return self._priced(_row(decodes, context, chunks, self.unmet, self.few))

    def _priced(self, row: Features) -> float:
        _, tokens, decoding, prefilling, pairs, rows, ranks, products, met, many, few = row
        fixed, per_token, per_decoding, per_prefilling, per_pair, per_row, per_rank, per_product, per_met, per_many, per_few = (
            self.prices
        )
        return self.pace * (
            fixed + per_token * tokens + per_decoding * decoding + per_prefilling * prefilling + per_pair * pairs + per_row * rows
            + per_rank * ranks + per_product * products + per_met * met + per_many * many + per_few * few
        )  # fmt: skip

    def room(self, shape: Shape, start: int, most: int, limit: float) -> int:
        decodes, _, chunks = beside = parts(shape)
        tokens = decodes + sum([count for _, count in chunks if count > 0])
        ranks = sum([ranks for ranks, count in chunks if count < 0])
        count = self._room(beside, start, most, limit, tokens, ranks, ALL_MANY)
        if tokens + count > self.few or ranks:
            return count
        return self._room(beside, start, min(most, self.few - tokens), limit, tokens, 0, self.few)

    def _room(self, beside: tuple[int, int, Shape], start: int, most: int, limit: float, tokens: int, ranks: int, few: int) -> int:
        """`room` beside `parts` of an iteration with so many `tokens` and `ranks`, where its tokens are few, or many (`few` is
        `ALL_MANY`)."""
        prices = (self.pace * price / scale for price, scale in zip(self.prices, SCALE, strict=True))
        _, per_token, _, per_context, per_pair, per_row, _, per_product, per_met, _, per_few = prices
        per_token = per_token + per_product * ranks if few == ALL_MANY else per_few
        spare = limit - self._priced(_row(*beside, self.unmet, few)) - per_row - per_context * start
        if self.unmet:  # a chunk may meet all other experts
            spare -= per_met * self.unmet**tokens
        if spare <= 0:
            return 0
        # A chunk of c tokens costs linear x c + square x c^2.
        linear, square = per_token + per_pair * (start + 0.5), per_pair / 2
        if linear * most + square * most**2 <= spare:
            return most
        count = int(2 * spare / (linear + sqrt(linear**2 + 4 * square * spare)))
        if self.quantum == 1 or few != ALL_MANY:
            return count
        waste = (tokens + count) % self.quantum
        return count - waste if waste < count else count

    def learn(self, shape: Shape, seconds: float) -> float:
        row = self.features(shape)
        ratio = seconds / (self.pace * _product(self.prices, row))
        self.error += 0.05 * (abs(1 / ratio - 1) - self.error)
        self.pace *= min(max(ratio, 1 / 3), 3) ** HASTE
        self._refit([x * self.pace / seconds for x in row])
        return ratio

    def features(self, shape: Shape) -> Row:
        """The `FEATURES` of an iteration, in units of `SCALE`."""
        return list(_row(*parts(shape), self.unmet, self.few))

    def errors(self, samples: Sequence[Sample]) -> Errors:
        """How well the cost model describes `samples`. Raises ValueError if there are none."""
        if not samples:
            raise ValueError("errors need at least one iteration; there is none")
        scatter = tuple(seconds / self.seconds(shape) for shape, seconds in samples)
        errors = sorted(
            ((abs(1 / s - 1), tuple(shape)) for s, (shape, _) in zip(scatter, samples, strict=True)), key=lambda e: e[0]
        )
        size = len(errors)
        return Errors(size, errors[size // 2][0], errors[min(size - 1, size * 9 // 10)][0], *errors[-1], scatter)

    def _refit(self, row: Row) -> None:
        """Add the equation that `row` times prices is 1, and move each price towards the least squares. This runs after every
        iteration, so features that no iteration had yet, whose sums are all 0, are left out."""
        anchor, matrix, target, prices = self._anchor, self._matrix, self._target, self.prices
        seen = [i for i, x in enumerate(row) if x or matrix[i][i] or anchor[i][i]]
        for i in seen:
            line, held, value, total = matrix[i], anchor[i], row[i], 0.0
            for j in seen:
                both = line[j] = FORGET * line[j] + value * row[j]
                total += (held[j] + both) * prices[j]
            target[i] = FORGET * target[i] + value
            diagonal = held[i] + line[i]
            prices[i] = max(0.0, prices[i] + (self._pull[i] + target[i] - total) / diagonal)

    def _anchor_to(self, anchor: list[Row]) -> None:
        anchor = [_padded(row) for row in (*anchor, *[[]] * (len(FEATURES) - len(anchor)))]
        for feature, (other, share) in GUESSES.items():
            if not anchor[feature][feature] and (guess := share * self.prices[other]):
                self.prices[feature], anchor[feature][feature] = guess, HELD / guess**2
        self._start, self._anchor = list(self.prices), anchor
        self._pull = [_product(row, self.prices) for row in anchor]
        self._matrix: list[Row] = [[0.0] * len(self.prices) for _ in self.prices]
        self._target: Row = [0.0] * len(self.prices)


def device_shapes(longest: int) -> list[list[tuple[int, int]]]:
    """Shapes as a server on a GPU meets them, whose sequences have up to `longest` tokens."""
    contexts = sorted({16, min(1024, longest // 2), min(4096, longest // 2)})
    shapes = [[(context, 1)] * batch for context in contexts for batch in (1, 8, 32, 64, 128)]
    for start in contexts:
        for count in (64, 128, 256, 512, 1024, 2048):
            if start + count <= longest:
                shapes += [[(start, count)], [(contexts[1], 1)] * 32 + [(start, count)]]
    return shapes


def _padded(row: Sequence[float]) -> Row:
    """The values of all features, of those of the first few."""
    return [*map(float, row), *[0.0] * (len(FEATURES) - len(row))]


def _row(decodes: int, context: int, chunks: Shape, unmet: float, few: int) -> Features:
    tokens, before, pairs, rows, ranks = decodes, 0, 0.0, decodes, 0
    for start, count in chunks:
        if count <= 0:
            rows, ranks = (rows, ranks + start) if count else (rows + start, ranks)
            continue
        rows += 1
        tokens += count
        before += start
        pairs += count * (start + (count + 1) / 2)
    fixed, per_token, per_decoding, per_prefilling, per_pair, per_row, per_rank, per_product, per_met, _, _ = SCALE
    met, many, little, much = (1 - unmet**tokens) / per_met if unmet else 0.0, 0.0, 0.0, tokens / per_token
    if few:
        many, little, much = (0.0, float(tokens), 0.0) if tokens <= few and not ranks else (1.0, 0.0, much)
    return (
        1 / fixed, much, context / per_decoding, before / per_prefilling, pairs / per_pair, rows / per_row, ranks / per_rank,
        ranks * tokens / per_product, met, many, little,
    )  # fmt: skip


def _product(a: Iterable[float], b: Iterable[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _add(matrix: list[Row], target: Row, row: Row) -> None:
    """Add one equation: `row` times prices is 1."""
    for i, value in enumerate(row):
        target[i] += value
        line = matrix[i]
        for j, other in enumerate(row):
            line[j] += value * other


def _improve(prices: Row, matrix: list[Row], target: Row) -> None:
    """One sweep of coordinate descent towards the least squares; no price becomes negative."""
    for i, line in enumerate(matrix):
        if line[i] > 0:
            prices[i] = max(0.0, prices[i] + (target[i] - _product(line, prices)) / line[i])
