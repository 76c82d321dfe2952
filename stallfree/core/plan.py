"""What one iteration is: the plan that goes to an executor and the result that comes back.

A plan is complete. An executor keeps KV tensors and nothing about requests. Both types know nothing of how they were chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Shape = Sequence[tuple[int, int]]
"""An iteration as a cost model sees it: (start, count) of each piece of work, in tokens. A piece (rows, 0) stands for so many plain
rows more: what requests ask of sampling takes time on the host."""


def parts(shape: Shape) -> tuple[int, int, list[tuple[int, int]]]:
    """How many decodes (pieces of one token), their context in all, and the chunks."""
    decodes = context = 0
    chunks = []
    for start, count in shape:
        if count == 1:
            decodes += 1
            context += start
        else:
            chunks.append((start, count))
    return decodes, context, chunks


UNKNOWN = -1
"""The token of a decode that is planned while the iteration that samples it runs: what the plan before brings its request."""


class Work(NamedTuple):
    """One request's part of an iteration: `count` of its tokens from position `start`. A decode is a chunk of one.

    `tokens` are the `count` token ids, or `UNKNOWN` alone; `blocks` the request's KV block numbers, enough for `start + count`
    tokens; `samples` says that the last position's logits yield a token; `decode` that the request was a ready decode.
    `sampling` is the request's, unread by the scheduler. `prompt` and `output` are the request's own sequences, to be read only
    (penalties need the history); `output` may have grown since, but its first `start + count - len(prompt)` entries are fixed; the
    last of them is there, where it is `UNKNOWN`, once the plan before is complete.
    """

    id: str
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody counts with
    samples: bool
    decode: bool
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    sampling: object
    adapter: str
    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """One iteration. `now` in seconds; `preempted`, `stalled`: request ids; `budget` in tokens, with its `reason` in words.

    `stalled` are the ready decodes that got no token in this iteration: the generation stalls. `cached`: (id, tokens found in the
    prefix cache) of the requests that this iteration admits. `limit_s`: seconds that the policy allowed the iteration, None if it
    set no limit; `margin`: what it multiplied the expected time with, to be within that limit as often as promised.
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

    @property
    def shape(self) -> list[tuple[int, int]]:
        return [(w.start, w.count) for w in self.work]

    @property
    def num_tokens(self) -> int:
        return sum(w.count for w in self.work)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an executor made of the plan of the same `step`: sampled token ids by request id, and the seconds that it took.

    `details` holds what the engine passes through to the user, by request id (log-probabilities). With `error` set no token
    counts, and every request of the plan fails with that message; `failed` does the same to single requests. `bubble_s`: what the
    stages of a pipeline waited before they took this plan up, all together, while there was work in the pipeline.
    """

    step: int
    tokens: Mapping[str, Sequence[int]]
    seconds: float
    error: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    bubble_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an executor can hold: KV blocks of `block_size` tokens, sequences of `max_model_len` tokens, `depth` plans at once.

    `depth` 1 is synchronous; a pipeline of P stages has P plans in flight. With `overlap` the second of two plans is made, and
    waits at the executor, while the first one runs: it may hold decodes whose token is `UNKNOWN`.
    """

    block_size: int
    num_blocks: int
    max_model_len: int
    depth: int = 1
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.overlap and self.depth != 2:
            raise ValueError(f"an executor that overlaps has a plan that runs and one that waits: depth 2, not {self.depth}")
