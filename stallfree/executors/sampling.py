"""From logits to tokens, on the host, in numpy.

Sampling is stateless: the random number of a token depends on the request's seed and the token's position alone, so a request
samples the same tokens alone or batched, chunked or whole, preempted or not. It knows nothing of models or devices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stallfree.core.plan import Work

PIECE = 64
"""Logits per piece, where a search goes by pieces first."""

COLD = 0.5
"""Below this temperature few tokens have any weight, and only these are looked at."""

NEGLIGIBLE = 25.0
"""Temperatures below the largest logit at which a token's weight is below 2e-11. A whole vocabulary of such tokens is less than the
last bit of a float."""

MOST_KEPT = 10_000
"""Logits kept by top_k from which more do not count as more rows: a vocabulary may be smaller than top_k."""

FEW = 2048
"""Candidates that are sorted as they are; more are told apart by the leading bits of their weights first."""

BITS = 19
"""Bits of a 32-bit float that are left away for that. The exponent and 4 bits of the fraction stay: 16 steps in a factor of 2."""


class Bias(dict[int, float]):
    """What is added to logits, by token id; as two arrays, too, `tokens` int64 and `amounts` float32, made once."""

    def __init__(self, biases: Mapping[int, float] = MappingProxyType({})):
        super().__init__(biases)
        self.tokens = np.fromiter(self, np.int64, len(self))
        self.amounts = np.fromiter(self.values(), np.float32, len(self))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's next token is chosen from its logits. The defaults sample from the model's own distribution.

    Applied in this order: `logit_bias` (added, by token id), `repetition_penalty` (over prompt and output: positive logits are
    divided by it, negative ones multiplied; Keskar et al. 2019), `presence_penalty` (subtracted once) and `frequency_penalty`
    (subtracted per occurrence, both over the output), `stop_ids` masked while fewer than `min_tokens` tokens are out, `temperature`
    (0 is greedy), `top_k` (0 is off), `top_p`, and `min_p` (relative to the most probable token). `seed` is any int.
    `logprobs`: how many alternatives to report beside the chosen token's log-probability; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=Bias)
    seed: int = 0
    logprobs: int | None = None
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    _prompts: list[tuple[Sequence[int], np.ndarray]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.logit_bias, Bias):
            object.__setattr__(self, "logit_bias", Bias(self.logit_bias))

    @property
    def plain(self) -> bool:
        """Whether the model's logits are used as they are."""
        return (
            not self.logit_bias
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and (self.min_tokens == 0 or not self.stop_ids)
        )

    @property
    def extra_rows(self) -> int:
        """How many plain rows of logits take as long as what this asks for beyond one, on a processor. A plain row takes its part
        of the last product, and one exponential for each logit: 0.16 ms for 49,152 logits on a Zen 4. By that measure penalties
        take 0.3 rows, top_p 2, top_k 0.1 for 50 and 2 for 1,000, log-probabilities 0.3. A cost model learns what a row takes.
        """
        warm = self.temperature >= COLD
        return (
            (not self.plain)
            + 2 * (warm and self.top_p < 1)
            + (1 + min(self.top_k, MOST_KEPT) // 1000 if warm and self.top_k > 0 else 0)
            + (0 if self.logprobs is None else (self.logprobs + 7) // 8)
        )

    def prompt_array(self, prompt: Sequence[int]) -> np.ndarray:
        """`prompt` as an array, made once for the request that samples so."""
        if not self._prompts or self._prompts[0][0] is not prompt:
            self._prompts[:] = [(prompt, np.fromiter(prompt, np.int64, len(prompt)))]
        return self._prompts[0][1]


GREEDY = Sampling(temperature=0.0)


def to_values(how: Sampling) -> dict[str, Any]:
    """A sampling in plain numbers and lists, for another process."""
    values = {f.name: getattr(how, f.name) for f in fields(how) if f.init}
    return values | {
        "logit_bias": [list(pair) for pair in how.logit_bias.items()],
        "seed": how.seed & (2**64 - 1),
        "stop_ids": list(how.stop_ids),
    }


def of_values(values: Mapping[str, Any]) -> Sampling:
    """The sampling that `to_values` put so. Raises ValueError for what is none."""
    try:
        numbers = {name: value for name, value in values.items() if name not in ("logit_bias", "stop_ids")}
        for name, value in numbers.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value)) and not (name == "logprobs" and value is None):
                raise ValueError(f"{name} is {str(value)[:80]}, expected a number")
        bias = {int(token): float(by) for token, by in values["logit_bias"]}
        return Sampling(**numbers, logit_bias=bias, stop_ids=frozenset(int(token) for token in values["stop_ids"]))
    except (AttributeError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"this is no sampling: {error}") from None


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities under the model's own distribution, before penalties and temperature.

    `logprob` is the chosen token's; `top` the most probable tokens as (token id, log-probability), best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def sample(logits: np.ndarray, works: Sequence[Work]) -> tuple[dict[str, tuple[int, ...]], dict[str, TokenLogprob], dict[str, str]]:
    """One token for each row of `logits` [rows, vocabulary] float32, which is left as it is. Row i belongs to `works[i]`.

    Gives the tokens by request id, the log-probabilities of those that asked, and why rows without a token have none: logits that
    are not finite, and parameters that cannot be applied, fail their own request only. A request without a `Sampling` is greedy.
    """
    if len(logits) != len(works):
        raise ValueError(f"{len(logits)} rows of logits for {len(works)} requests")
    tokens: dict[str, tuple[int, ...]] = {}
    details: dict[str, TokenLogprob] = {}
    failed: dict[str, str] = {}
    asked: list[tuple[int, int, int]] = []
    if not works:
        return tokens, details, failed
    best = logits.argmax(axis=1)
    # argmax stops at the first NaN, so a row with one is seen here at no cost.
    peaks = logits[np.arange(len(works)), best]
    finite = np.isfinite(peaks)
    for row, work in enumerate(works):
        how = work.sampling if isinstance(work.sampling, Sampling) else GREEDY
        token: int | None = None
        try:
            if finite[row]:
                token = int(best[row]) if how.plain and how.temperature == 0 else _choose(logits[row], work, how)
            if token is None:
                failed[work.id] = not_finite(work)
                continue
            if how.logprobs is not None:
                asked.append((row, token, how.logprobs))
        except Exception as error:  # whatever this request asks for, the others get their tokens
            failed[work.id] = f"no token can be sampled: {error or type(error).__name__}"
            continue
        tokens[work.id] = (token,)
    for (row, token, alternatives), total in zip(asked, _totals(logits, peaks, [row for row, _, _ in asked]), strict=True):
        details[works[row].id] = _logprob(logits[row], token, alternatives, total)
    return tokens, details, failed


def not_finite(work: Work) -> str:
    """Why a row has no token, in words."""
    return f"no token can be sampled at position {work.start + work.count}: the logits are not finite"


def _choose(row: np.ndarray, work: Work, how: Sampling) -> int | None:
    if not how.plain:
        row = _adjusted(row, work, how)
    peak = float(row.max())
    if not np.isfinite(peak):
        return None
    if how.temperature == 0:
        return int(row.argmax())
    ids = None
    if how.temperature < COLD:
        ids = np.flatnonzero(row >= peak - NEGLIGIBLE * how.temperature)
        row = row[ids]
    if 0 < how.top_k < len(row):
        largest = _largest(row, how.top_k)
        row, ids = row[largest], largest if ids is None else ids[largest]
    # A temperature near 0 is greedy; below this bound the division could overflow.
    weights = np.exp((row - np.float32(peak)) / np.float32(max(how.temperature, 1e-6)))
    if how.top_p < 1:
        kept = _nucleus(weights, how.top_p)
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    if how.min_p > 0:
        kept = np.flatnonzero(weights >= how.min_p)  # the largest weight is 1
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    chosen = _draw(weights, uniform(how.seed, work.start + work.count))
    return chosen if ids is None else int(ids[chosen])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest largest weights that hold `top_p` of the sum, in ascending order (Holtzman et al. 2020). The largest
    weight is 1."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    # Only what may be in the nucleus is looked at, which is little unless the distribution is flat.
    for floor in (0.1, 0.01, 0.001, 0.0):
        kept = np.flatnonzero(weights >= floor)
        if floor == 0 or float(weights[kept].sum(dtype=np.float64)) > wanted:
            break
    sure = kept[:0]
    if len(kept) > FEW:
        steps = weights[kept].view(np.int32) >> BITS  # weights are not negative: their bits are in the order of their values
        masses = np.bincount(steps, weights[kept])[::-1].cumsum()
        last = len(masses) - 1 - min(int(np.searchsorted(masses, wanted)), len(masses) - 1)
        sure, kept = kept[steps > last], kept[steps == last]
        wanted -= float(weights[sure].sum(dtype=np.float64))
    kept = kept[np.argsort(-weights[kept], kind="stable")]
    kept = kept[: int(np.searchsorted(np.cumsum(weights[kept], dtype=np.float64), wanted)) + 1]
    return np.sort(np.concatenate([sure, kept]))


def _draw(weights: np.ndarray, number: float) -> int:
    """The index at which the cumulative share of `weights` passes `number`, found piece by piece."""
    whole = len(weights) // PIECE * PIECE
    pieces = np.append(weights[:whole].reshape(-1, PIECE).sum(axis=1), weights[whole:].sum()).cumsum(dtype=np.float64)
    wanted = number * pieces[-1]
    # Rounding may leave a sum just short of what is wanted: then the last weight above 0 is meant.
    piece = min(int(np.searchsorted(pieces, wanted, side="right")), int(np.searchsorted(pieces, pieces[-1])))
    before = pieces[piece - 1] if piece else 0.0
    within = weights[piece * PIECE : (piece + 1) * PIECE if piece * PIECE < whole else None].cumsum(dtype=np.float64)
    return piece * PIECE + min(
        int(np.searchsorted(within, wanted - before, side="right")), int(np.searchsorted(within, within[-1]))
    )


def _adjusted(row: np.ndarray, work: Work, how: Sampling) -> np.ndarray:
    bias = how.logit_bias
    assert isinstance(bias, Bias)
    stops = np.fromiter(how.stop_ids if how.min_tokens else (), np.int64)
    for name, ids in (("logit_bias", bias.tokens), ("stop_ids", stops)):
        if ids.size and (ids.min() < 0 or ids.max() >= len(row)):
            wrong = ids[(ids < 0) | (ids >= len(row))][0]
            raise ValueError(f"{name} has token id {wrong}, which is outside the vocabulary (0 to {len(row) - 1})")
    row = row.copy()
    num_out = work.start + work.count - len(work.prompt)
    row[bias.tokens] += bias.amounts
    out = np.fromiter(work.output[:num_out] if num_out > 0 else (), np.int64)
    if how.repetition_penalty != 1:
        seen = np.concatenate([how.prompt_array(work.prompt), out])  # a token that comes twice is written twice, alike
        penalty = np.float32(how.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if out.size and (how.presence_penalty or how.frequency_penalty):
        seen, counts = np.unique(out, return_counts=True)
        row[seen] -= (how.presence_penalty + how.frequency_penalty * counts).astype(np.float32)
    if num_out < how.min_tokens:
        row[stops] = -np.inf
    return row


def _largest(row: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest, in ascending order; among equals the lowest indices win, as with argmax."""
    piece = min(PIECE, len(row) // (2 * k))
    ids = None
    if piece > 1:
        # k pieces have a maximum of at least the k-th largest maximum, so the k-th largest of all is no smaller.
        whole = len(row) // piece
        floor = np.partition(row[: whole * piece].reshape(whole, piece).max(axis=1), whole - k)[whole - k]
        ids = np.flatnonzero(row >= floor)
        row = row[ids]
    least = np.partition(row, len(row) - k)[len(row) - k]
    kept = np.flatnonzero(row >= least)
    if surplus := len(kept) - k:
        equal = np.flatnonzero(row[kept] == least)
        kept = np.delete(kept, equal[len(equal) - surplus :])
    return kept if ids is None else ids[kept]


def _totals(logits: np.ndarray, peaks: np.ndarray, rows: Sequence[int]) -> list[float]:
    """The logarithms of the sums of exp(logits) of these rows, all in one go."""
    if not rows:
        return []
    own = peaks[list(rows)]
    sums = np.exp(logits[list(rows)] - own[:, None]).sum(axis=1, dtype=np.float64)
    return [float(total) for total in own.astype(np.float64) + np.log(sums)]


def _logprob(row: np.ndarray, token: int, alternatives: int, total: float) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if alternatives > 0:
        ids = _largest(row, min(alternatives, len(row)))
        ids = ids[np.argsort(-row[ids], kind="stable")]
        top = tuple(zip(ids.tolist(), (row[ids].astype(np.float64) - total).tolist(), strict=True))
    return TokenLogprob(float(row[token]) - total, top)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (SplitMix64, Steele et al. 2014, over both)."""
    return (_mix(_mix(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


_MASK = 2**64 - 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
