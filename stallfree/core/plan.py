"""What one iteration is: the plan that goes to an executor and the result that comes back.

A plan is complete. An executor keeps KV tensors and nothing about requests. Both types know nothing of how they were chosen.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stallfree.core.request import Request

Shape = Sequence[tuple[int, int]]
"""An iteration as a cost model sees it: (start, count) of each piece of work, in tokens. A piece (rows, 0) stands for extra rows:
the time that the requests' sampling takes on the host, counted in plain rows of logits, and the rows of drafts. A piece (ranks, -1)
stands for adapters: the sum of the ranks of those that the requests use."""


def parts(shape: Shape) -> tuple[int, int, list[tuple[int, int]]]:
    """The number of decodes (pieces of one token), the sum of their contexts in tokens, and the chunks."""
    starts = [start for start, count in shape if count == 1]
    chunks = [piece for piece in shape if piece[1] != 1] if len(starts) < len(shape) else []
    return len(starts), sum(starts), chunks


UNKNOWN = -1
"""Stands for a token that the previous plan, still running, will sample for the same request."""


class Work(NamedTuple):
    """One request's part of an iteration: `count` of its tokens from position `start`. A decode is a chunk of one, and of one more
    for each draft: a token that was guessed to follow.

    `tokens`: the `count` token ids, or `UNKNOWN` alone. `blocks`: the request's KV block numbers, enough for `start + count`
    tokens. `samples`: the last position's logits yield a token; of a decode with drafts, the logits of every position up
    to the first wrong draft yield one. `decode`: the request was a ready decode. `sampling`: the
    request's; the scheduler does not read it. `prompt` and `output`: the request's own sequences; only read them (penalties need
    the history). `output` may have grown since, but its first `start + count - len(prompt)` entries are fixed. If the last of these
    is `UNKNOWN`, it is there once the previous plan is complete.
    """

    id: str
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used
    samples: bool
    decode: bool
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    sampling: object
    adapter: str
    prompt: Sequence[int]
    output: Sequence[int]

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.tokens[1:] if self.decode else ()

    def verified(self, sampled: Iterable[int]) -> tuple[int, ...]:
        """The tokens that the request gets, of those `sampled` at each position in turn: up to the first that is not the draft."""
        tokens = []
        for draft, token in zip((*self.drafts, None), sampled, strict=False):
            tokens.append(token)
            if token != draft:
                break
        return tuple(tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One iteration. `now` in seconds; `preempted`, `stalled`: request ids; `budget` in tokens, with its `reason` in words.

    `stalled`: the ready decodes that get no token in this iteration (generation stalls). `cached`: (id, tokens found in the prefix
    cache) of the requests that this iteration admits. `limit_s`: seconds that the policy allows the iteration; None if it sets no
    limit. `margin`: the policy's factor on expected times, so that the limit holds as often as promised. `ranks`: the sum of the
    ranks of the adapters that the work uses. `restored`: (id, tokens whose KV comes back from host memory before the iteration).
    """

    step: int
    now: float
    work: tuple[Work, ...]
    preempted: tuple[str, ...] = ()
    stalled: tuple[str, ...] = ()
    cached: tuple[tuple[str, int], ...] = ()
    budget: int = 0
    reason: str = ""
    limit_s: float | None = None
    margin: float | None = None
    ranks: int = 0
    restored: tuple[tuple[str, int], ...] = ()

    @property
    def shape(self) -> list[tuple[int, int]]:
        pieces = [*self._adapters, *[(w.start, w.count) for w in self.work]]
        return [*pieces, (drafts, 0)] if (drafts := self.num_drafts) else pieces

    @property
    def decodes(self) -> list[tuple[int, int]]:
        """The part of `shape` that was ready decodes, without drafts, and the adapters."""
        return [*self._adapters, *[(w.start, 1) for w in self.work if w.decode]]

    @property
    def _adapters(self) -> list[tuple[int, int]]:
        return [(self.ranks, -1)] if self.ranks else []

    def decoders(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Those of `requests`, which are those of the work, that were ready decodes."""
        return [r for w, r in zip(self.work, requests, strict=True) if w.decode]

    @property
    def num_tokens(self) -> int:
        return sum(w.count for w in self.work)

    @property
    def num_drafts(self) -> int:
        return sum([w.count - 1 for w in self.work if w.decode])


@dataclass(frozen=True, slots=True)
class GroupPlan(Plan):
    """An iteration of a group of instances: the numbers of its `members`, and for each piece of work, how many of its new tokens
    each member keeps the KV of (`kept`). Work has no blocks then: the executor knows where the KV before it is.
    """

    members: tuple[int, ...] = ()
    kept: tuple[Mapping[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """An executor's result for the plan of the same `step`: sampled token ids by request id, and the seconds that it took. A decode
    with drafts has as many tokens as drafts were right, in order, and one more.

    `details`: by request id, one for each token; the engine passes them to the user unread (log-probabilities). `error`: no token
    counts, and every request of the plan fails with this message. `failed`: the same for single requests, by id. `bubble_s`:
    seconds that the stages of a pipeline waited before they began this plan, summed over the stages, while the pipeline had work.
    `scores`: of requests that need the logits of their prompt: by id, the position of a prompt token, and what is known about it
    and those after it; the engine passes them on unread, too. `deferred`: ids of requests whose token could not be chosen yet,
    because their constraint was still being searched; the last token's KV is computed again in their next iteration.
    """

    step: int
    tokens: Mapping[str, Sequence[int]]
    seconds: float
    error: str | None = None
    details: Mapping[str, Sequence[object]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    bubble_s: float = 0.0
    scores: Mapping[str, tuple[int, Sequence[object]]] = field(default_factory=dict)
    deferred: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an executor can hold: KV blocks of `block_size` tokens, sequences of `max_model_len` tokens, `depth` plans at once.

    `depth` 1 is synchronous; a pipeline of P stages has P plans in flight. With `overlap`, one plan runs while the next is made and
    waits at the executor. This next plan may hold decodes whose token is `UNKNOWN`.
    """

    block_size: int
    num_blocks: int
    max_model_len: int
    depth: int = 1
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.overlap and self.depth != 2:
            raise ValueError(f"an executor with overlap has one plan running and one waiting: set depth 2, not {self.depth}")
