"""From logits to tokens, on the host, in numpy.

Sampling is stateless: the random number of a token depends only on the request's seed and the token's position. So a request gets
the same tokens alone or batched, chunked or whole, preempted or not. A `Constraint` says which tokens may come at all; its state
follows from the request's output, too. It knows nothing of models, devices or grammars.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from stallfree.core.plan import Work
from stallfree.core.uniform import uniform

PIECE = 64
"""Logits per piece, if a search goes piece by piece first."""

COLD = 0.5
"""Below this temperature few tokens have any weight, and only these are computed."""

NEGLIGIBLE = 25.0
"""A logit this many temperatures below the largest has a weight below 2e-11. The weights of a whole vocabulary of such tokens are
less than the last bit of a float."""

GRACE_S = 0.005
"""Seconds that an iteration waits for constraints after the model has run. Those that take longer are deferred."""

MOST_KEPT = 10_000
"""Values of top_k above this count as this in `extra_rows`, because a vocabulary may be smaller than top_k."""

FEW = 2048
"""Up to this many candidates are sorted directly; more are first separated by the leading bits of their weights."""

BITS = 19
"""Low bits of a 32-bit float that this ignores. The exponent and 4 bits of the fraction stay: 16 steps per factor of 2."""


class Bias(dict[int, float]):
    """Amounts added to logits, by token id; also as two arrays, made once: `tokens` int64 and `amounts` float32."""

    def __init__(self, biases: Mapping[int, float] = MappingProxyType({})):
        super().__init__(biases)
        self.tokens = np.fromiter(self, np.int64, len(self))
        self.amounts = np.fromiter(self.values(), np.float32, len(self))


class Constraint(Protocol):
    """Which tokens one request may get next, as structured output needs it. It belongs to the thread that runs the executor."""

    def begin(self, output: Sequence[int], drafts: Sequence[int] = ()) -> None:
        """Begin to find out what may follow `output` (token ids), and each of the `drafts` after it, in another thread, while the
        model runs. May be left out."""

    def ready(self, wait_s: float) -> bool:
        """Whether the answer of `mask` is there. Waits for at most `wait_s` seconds."""

    def mask(self, output: Sequence[int]) -> np.ndarray | None:
        """What is added to each logit after `output`: float32, 0 for tokens that may follow, -inf for others; None if any may
        follow. Raises ValueError if none may."""


class Fixed:
    """A constraint for a few positions, from `first` output tokens on, which another process has found out. For each position there
    are `bits`, one for each logit, the lowest of a byte first; or an `error`, the reason why no token may come."""

    def __init__(self, answers: Sequence[tuple[bytes, str]], first: int):
        self._answers, self._first = answers, first

    def begin(self, output: Sequence[int], drafts: Sequence[int] = ()) -> None:
        pass

    def ready(self, wait_s: float) -> bool:
        return True

    def mask(self, output: Sequence[int]) -> np.ndarray | None:
        bits, error = self._answers[len(output) - self._first]
        if error:
            raise ValueError(error)
        return mask_of(bits) if bits else None


@dataclass(frozen=True, slots=True)
class Sampling:
    """The way to choose a request's next token from its logits. The defaults sample from the model's own distribution.

    Applied in this order: `logit_bias` (added, by token id), `repetition_penalty` (over prompt and output: positive logits are
    divided by it, negative ones multiplied; Keskar et al. 2019), `presence_penalty` (subtracted once) and `frequency_penalty`
    (subtracted per occurrence, both over the output), `constraint`, `stop_ids` masked below `min_tokens` output tokens unless the
    constraint allows nothing else, `temperature` (0 is greedy), `top_k` (0 is off), `top_p`, and `min_p` (relative to the most
    probable token). `seed`: any int. `logprobs`: the number of alternatives to report with the chosen token's log-probability; None
    reports nothing. `prompt_logprobs`: the same for every token of the prompt but the first.
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
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    _prompts: list[tuple[Sequence[int], np.ndarray]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.logit_bias, Bias):
            object.__setattr__(self, "logit_bias", Bias(self.logit_bias))

    @property
    def plain(self) -> bool:
        """Whether the model's logits are used unchanged, except that a constraint may leave some out."""
        return (
            not self.logit_bias
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and (self.min_tokens == 0 or not self.stop_ids)
        )

    @property
    def extra_rows(self) -> int:
        """The time that this sampling takes on a processor beyond a plain row of logits, in such rows. A plain row takes its part
        of the last product, and one exponential per logit: 0.16 ms for 49,152 logits on a Zen 4. In these rows, penalties take 0.3,
        top_p 2, top_k 0.1 for 50 and 2 for 1,000, log-probabilities 0.3. A cost model learns the time of a row.
        """
        warm = self.temperature >= COLD
        return (
            (not self.plain or self.constraint is not None)
            + 2 * (warm and self.top_p < 1)
            + (1 + min(self.top_k, MOST_KEPT) // 1000 if warm and self.top_k > 0 else 0)
            + (0 if self.logprobs is None else (self.logprobs + 7) // 8)
        )

    def prompt_array(self, prompt: Sequence[int]) -> np.ndarray:
        """`prompt` as an array, which is made once per request."""
        if not self._prompts or self._prompts[0][0] is not prompt:
            self._prompts[:] = [(prompt, np.fromiter(prompt, np.int64, len(prompt)))]
        return self._prompts[0][1]


GREEDY = Sampling(temperature=0.0)


def to_values(sampling: Sampling, output: Sequence[int] = (), drafts: Sequence[int] = ()) -> dict[str, Any]:
    """A sampling as plain numbers, lists and texts, for another process. Its constraint is sent for the position after `output`,
    and for that after each of the `drafts`."""
    values = {f.name: getattr(sampling, f.name) for f in fields(sampling) if f.init and f.name != "constraint"}
    return (
        values
        | {
            "logit_bias": [list(pair) for pair in sampling.logit_bias.items()],
            "seed": sampling.seed & (2**64 - 1),
            "stop_ids": list(sampling.stop_ids),
        }
        | _of_constraint(sampling.constraint, output, drafts)
    )


def _of_constraint(constraint: Constraint | None, output: Sequence[int], drafts: Sequence[int]) -> dict[str, Any]:
    if constraint is None:
        return {}
    constraint.begin(output, drafts)
    return {"allowed": [_allowed(constraint, [*output, *drafts[:number]]) for number in range(len(drafts) + 1)]}


def _allowed(constraint: Constraint, output: Sequence[int]) -> list[str]:
    try:
        mask = constraint.mask(output)
    except ValueError as error:
        return ["", str(error)]
    return ["" if mask is None else np.packbits(mask == 0, bitorder="little").tobytes().hex(), ""]


def of_values(values: Mapping[str, Any], first: int = 0) -> Sampling:
    """The sampling from the result of `to_values`. Its constraint holds from `first` output tokens on. Raises ValueError if a value
    is wrong."""
    try:
        numbers = {name: value for name, value in values.items() if name not in ("logit_bias", "stop_ids", "allowed")}
        for name, value in numbers.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value)) and not (name.endswith("logprobs") and value is None):
                raise ValueError(f"{name} is {str(value)[:80]}, expected a number")
        bias = {int(token): float(by) for token, by in values["logit_bias"]}
        stop_ids = frozenset(int(token) for token in values["stop_ids"])
        return Sampling(**numbers, logit_bias=bias, stop_ids=stop_ids, constraint=_to_constraint(values.get("allowed"), first))
    except (AttributeError, TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"these values are not a sampling: {error}") from None


def _to_constraint(values: Any, first: int) -> Fixed | None:
    if values is None:
        return None
    return Fixed([(bytes.fromhex(bits), str(error)) for bits, error in values], first)


class Score(NamedTuple):
    """As `TokenLogprob`, for a token of a prompt. `rank`: its place among all tokens, from 1, the most probable."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int


Scores = dict[str, tuple[int, Sequence[object]]]
"""`StepResult.scores`."""


class TokenLogprob(NamedTuple):
    """Natural logarithms of probabilities under the model's own distribution, before penalties and temperature.

    `logprob`: the chosen token's. `top`: the most probable tokens as (token id, log-probability), best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Rows:
    """The rows of logits that an iteration needs: one for each of `works` that samples, one for each of its drafts, and one for
    each prompt token that is scored. `rows`: their places in the batch, in order. `sampled`: those of them that belong to works
    that sample."""

    def __init__(self, works: Sequence[Work]):
        self._own: list[range] = []
        self.rows: list[int] = []
        self._scored: list[tuple[Work, int, int]] = []
        begin = 0
        for work in works:
            number = _num_scored(work)
            if number:
                self._scored.append((work, len(self.rows), number))
                self.rows += range(begin, begin + number)
            begin += work.count
            if work.samples:
                own = 1 + len(work.drafts)
                if number < work.count:
                    self.rows += range(begin - own, begin)
                self._own.append(range(len(self.rows) - own, len(self.rows)))

    @property
    def sampled(self) -> list[int]:
        return list(chain.from_iterable(self._own))

    def of(self, which: Sequence[int]) -> list[int]:
        """The rows of some of the works that sample, by their numbers among these."""
        return [row for number in which for row in self._own[number]]

    @property
    def scored(self) -> bool:
        """Whether any prompt token is scored."""
        return bool(self._scored)

    def scores(self, logits: np.ndarray) -> Scores:
        """What is known about the prompt tokens, from the logits of all rows."""
        return {work.id: (work.start + 1, _scores(logits[at : at + number], work)) for work, at, number in self._scored}


def _num_scored(work: Work) -> int:
    """How many rows of a work are followed by a prompt token whose log-probability is wanted."""
    if not isinstance(work.sampling, Sampling) or work.sampling.prompt_logprobs is None:
        return 0
    return max(0, min(work.count, len(work.prompt) - 1 - work.start))


def _scores(logits: np.ndarray, work: Work) -> list[Score]:
    sampling = work.sampling
    assert isinstance(sampling, Sampling)
    tokens = np.fromiter(work.prompt[work.start + 1 : work.start + 1 + len(logits)], np.int64, len(logits))
    totals = _totals(logits, logits.max(axis=1), range(len(logits)))
    ranks = 1 + (logits > np.take_along_axis(logits, tokens[:, None], axis=1)).sum(axis=1)
    alternatives = sampling.prompt_logprobs or 0
    rows = zip(logits, tokens.tolist(), totals, ranks.tolist(), strict=True)
    return [Score(*_logprob(row, token, alternatives, total), rank) for row, token, total, rank in rows]


def begin_constraints(works: Iterable[Work]) -> None:
    """Begin to find out which tokens the constrained ones of `works` may get. For an executor, before it runs the model."""
    for work in works:
        if work.samples and isinstance(work.sampling, Sampling) and work.sampling.constraint is not None:
            work.sampling.constraint.begin(sampled_before(work), work.drafts)


def ready_rows(works: Sequence[Work]) -> tuple[list[int], frozenset[str]]:
    """Which of `works`, which all sample, can have their token now, and the ids of the others: after at most `GRACE_S` those whose
    constraint is not ready are left out. For an executor, after it has run the model."""
    end = None
    rows, deferred = [], set()
    for row, work in enumerate(works):
        if isinstance(work.sampling, Sampling) and work.sampling.constraint is not None:
            now = time.monotonic()
            end = now + GRACE_S if end is None else end
            if not work.sampling.constraint.ready(max(0.0, end - now)):
                deferred.add(work.id)
                continue
        rows.append(row)
    return rows, frozenset(deferred)


def sampled_before(work: Work) -> Sequence[int]:
    """The output tokens of a request before the first one that `work` samples."""
    number = work.start + work.count - len(work.drafts) - len(work.prompt)
    return work.output[:number] if number > 0 else ()


def positions(work: Work) -> list[Work]:
    """The positions at which `work` samples, each as a work of its own: several if it has drafts. Each is as if the drafts before
    it were right, so what it samples counts only if they are."""
    if not work.drafts:
        return [work]
    before = sampled_before(work)
    return [
        work._replace(start=work.start + i, count=1, tokens=work.tokens[i : i + 1], output=[*before, *work.drafts[:i]])
        for i in range(work.count)
    ]


Sampled = tuple[dict[str, tuple[int, ...]], dict[str, list[TokenLogprob]], dict[str, str]]
"""By request id: tokens, the log-probability of each if they are wanted, and why there is no token."""


def sample(logits: np.ndarray, works: Sequence[Work]) -> Sampled:
    """Tokens from the rows of `logits` [rows, vocabulary] float32, which it does not change. The rows of a work follow each other:
    one, and one more for each draft (see `positions`). The rows after a wrong draft are not used.

    Logits that are not finite and parameters that cannot be applied fail only their own request. At a draft, they end what the
    request gets. A request without a `Sampling` is greedy.
    """
    number = sum([1 + len(work.drafts) for work in works])
    if len(logits) != number:
        raise ValueError(f"{len(logits)} rows of logits for {number} positions of {len(works)} requests")
    tokens: dict[str, tuple[int, ...]] = {}
    details: dict[str, list[TokenLogprob]] = {}
    failed: dict[str, str] = {}
    logprobs: list[tuple[int, str, int, int]] = []
    if not works:
        return tokens, details, failed
    best = logits.argmax(axis=1)
    # argmax stops at the first NaN, so this finds a row with NaN at no cost.
    peaks = logits[np.arange(number), best]
    finite = np.isfinite(peaks)

    row = 0
    for work in works:
        sampling = work.sampling if isinstance(work.sampling, Sampling) else GREEDY
        as_is = sampling.temperature == 0 and sampling.plain and sampling.constraint is None
        sampled: list[int] = []
        for place, (at, draft) in enumerate(zip(positions(work), (*work.drafts, None), strict=True), row):
            token: int | None = None
            why = ""
            try:
                if finite[place]:
                    token = int(best[place]) if as_is else _choose(logits[place], at, sampling)
            except Exception as error:  # an error in this request must not fail the others
                why = no_token(error)
            if token is None:
                if not sampled:
                    failed[work.id] = why or not_finite(work)
                break
            sampled.append(token)
            if token != draft:
                break
        if sampled:
            tokens[work.id] = tuple(sampled)
            if sampling.logprobs is not None:
                logprobs += [(place, work.id, token, sampling.logprobs) for place, token in enumerate(sampled, row)]
        row += 1 + len(work.drafts)
    totals = _totals(logits, peaks, [row for row, *_ in logprobs])
    for (row, id, token, alternatives), total in zip(logprobs, totals, strict=True):
        details.setdefault(id, []).append(_logprob(logits[row], token, alternatives, total))
    return tokens, details, failed


def no_token(error: Exception) -> str:
    """The reason in words if a request's own parameters allow no token."""
    return f"no token can be sampled: {error or type(error).__name__}"


def not_finite(work: Work) -> str:
    """The reason in words if a row's logits are not finite."""
    return f"no token can be sampled at position {work.start + work.count}: the logits are not finite"


def _choose(row: np.ndarray, work: Work, sampling: Sampling) -> int | None:
    if not sampling.plain or sampling.constraint is not None:
        row = _adjusted(row, work, sampling)
    peak = float(row.max())
    if not np.isfinite(peak):
        return None
    if sampling.temperature == 0:
        return int(row.argmax())
    ids = None
    if sampling.temperature < COLD:
        ids = np.flatnonzero(row >= peak - NEGLIGIBLE * sampling.temperature)
        row = row[ids]
    if 0 < sampling.top_k < len(row):
        largest = _largest(row, sampling.top_k)
        row, ids = row[largest], largest if ids is None else ids[largest]
    # A temperature near 0 is greedy; below this bound the division could overflow.
    weights = np.exp((row - np.float32(peak)) / np.float32(max(sampling.temperature, 1e-6)))
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights >= sampling.min_p)  # the largest weight is 1
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    chosen = _draw(weights, uniform(sampling.seed, work.start + work.count))
    return chosen if ids is None else int(ids[chosen])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest largest weights that hold `top_p` of the sum, in ascending order (Holtzman et al. 2020). The largest
    weight is 1."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    # Only tokens that may be in the nucleus are used, which are few unless the distribution is flat.
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
    """The index at which the cumulative share of `weights` passes `number`, searched piece by piece."""
    whole = len(weights) // PIECE * PIECE
    pieces = np.append(weights[:whole].reshape(-1, PIECE).sum(axis=1), weights[whole:].sum()).cumsum(dtype=np.float64)
    wanted = number * pieces[-1]
    # Rounding may leave the sum just below `wanted`: then the last weight above 0 is meant.
    piece = min(int(np.searchsorted(pieces, wanted, side="right")), int(np.searchsorted(pieces, pieces[-1])))
    before = pieces[piece - 1] if piece else 0.0
    within = weights[piece * PIECE : (piece + 1) * PIECE if piece * PIECE < whole else None].cumsum(dtype=np.float64)
    return piece * PIECE + min(
        int(np.searchsorted(within, wanted - before, side="right")), int(np.searchsorted(within, within[-1]))
    )


def _adjusted(row: np.ndarray, work: Work, sampling: Sampling) -> np.ndarray:
    bias = sampling.logit_bias
    assert isinstance(bias, Bias)
    stops = np.fromiter(sampling.stop_ids if sampling.min_tokens else (), np.int64)
    for name, ids in (("logit_bias", bias.tokens), ("stop_ids", stops)):
        if ids.size and (ids.min() < 0 or ids.max() >= len(row)):
            wrong = ids[(ids < 0) | (ids >= len(row))][0]
            raise ValueError(f"{name} has token id {wrong}, which is outside the vocabulary (0 to {len(row) - 1})")
    row = row.copy()
    output = sampled_before(work)
    row[bias.tokens] += bias.amounts
    out = np.fromiter(output, np.int64, len(output))
    if sampling.repetition_penalty != 1:
        seen = np.concatenate([sampling.prompt_array(work.prompt), out])  # a repeated token is written again with the same value
        penalty = np.float32(sampling.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if out.size and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = np.unique(out, return_counts=True)
        row[seen] -= (sampling.presence_penalty + sampling.frequency_penalty * counts).astype(np.float32)
    mask = mask_after(output, sampling, len(row))
    if mask is not None:
        row += mask
    if len(output) < sampling.min_tokens and (mask is None or np.count_nonzero(mask == 0) > np.count_nonzero(mask[stops] == 0)):
        row[stops] = -np.inf
    return row


def mask_after(output: Sequence[int], sampling: Sampling, vocab_size: int) -> np.ndarray | None:
    """What a constraint adds to each of `vocab_size` logits after `output`; None without one. Raises ValueError if no token may
    follow."""
    mask = None if sampling.constraint is None else sampling.constraint.mask(output)
    return None if mask is None else mask[:vocab_size]


def mask_of(bits: bytes) -> np.ndarray:
    """The mask from a bit for each token, the lowest of a byte first: float32, 0 where the bit is set, else -inf."""
    allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").view(bool)
    return np.where(allowed, np.float32(0), np.float32(-np.inf))


def _largest(row: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest, in ascending order; among equals the lowest indices win, as with argmax."""
    piece = min(PIECE, len(row) // (2 * k))
    ids = None
    if piece > 1:
        # k pieces have a maximum of at least the k-th largest maximum, so the k-th largest logit is not smaller.
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
    """The logarithm of the sum of exp(logits) for each of these rows."""
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
