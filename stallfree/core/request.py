"""One user request, from door to door: the only mutable state that the scheduler, its policies and the engine share.

A request has no prefill or decode phase. It has tokens (prompt and output), and it counts those whose KV exists or is in flight.
The rest, `remaining`, is still to be planned. It knows no text, no contents of blocks and no clock.
"""

from collections.abc import Sequence
from enum import Enum
from math import inf
from typing import Any

from stallfree.core.slo import Slo

Lane = tuple[str, str, int]
"""Requests that are alike: of one tenant and class, and `RESUMED`, new or `RELEGATED`."""
RESUMED, NEW, RELEGATED = range(3)
"""A waiting request whose answer has begun, because it was preempted; one whose targets cannot be met any more; any other one."""


class Refused(ValueError):
    """The request can never be served as it is. `field` names the part of it that is wrong."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


class Status(Enum):
    """The state of a request: `WAITING` -> `RUNNING` -> `FINISHED`. Preemption leads from `RUNNING` back to `WAITING`. `HELD`: it
    keeps its KV and gets no work, while a KV transfer takes this KV to another engine. `RELEASED`: it continues on that engine.
    """

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    RELEASED = "released"
    FINISHED = "finished"


class Request:
    """A prompt, how far its KV has got, and the tokens sampled so far. Compared by identity.

    The user of the scheduler writes, once: `id`, `prompt` (token ids; any sequence, a `range` in simulation), `max_tokens` (output
    tokens, at least 1), `stop_ids` (token ids that end the output), `min_tokens` (output tokens before a stop id counts), `arrival`
    (seconds, any origin), `priority` (lower is served first), `tenant` (whose share of the machine it uses), `weight` (of its
    tenant's share), `slo` (its own targets, or None), `service_class` (the name of the class that these are of), `adapter`, `salt`
    (only requests with the same adapter and salt share cached prefixes; `root` is both), `sampling` (passed on unread),
    `extra_rows` (the time that sampling adds per token, in plain rows of logits), `constrained` (its next token depends on the last
    one beyond the model, so it is never planned before this is known; its last may be a stop id before `min_tokens`), and `scored`
    (the logits of all its prompt are needed, so it takes no cached prefix, and its chunks are small).

    Whoever admits it writes `predicted` (seconds from its arrival to its first token, as forecast; None: nobody asked).

    Only the scheduler writes: `output` (token ids), `blocks` (KV block numbers, in order), `num_tokens` (prompt and output),
    `num_computed` (tokens whose KV exists), `num_planned` (`num_computed` and those in flight), `in_flight` (plans), `transferring`
    (another engine computes its first tokens; the KV is not here yet), `cut` (how many of its tokens get their KV from another
    engine), `num_cached` (prompt tokens found in the prefix cache at the last admission), `status`, `finish_reason` ("stop",
    "length", "abort" or "error"), `num_preemptions`, `first_token` and `last_token` (when they were sampled, in seconds; inf
    before), `relegated` (its targets cannot be met any more), `drafts` (guessed tokens that the plan in flight checks), `key` (its
    place in the order), and `ticket` (its live queue entry; 0 if none). Only
    `Speculation` writes `guess` (what it knows of guesses so far) and `paused` (it is not planned ahead of its last token, after
    which more can be guessed). Only the block pool writes: `num_shared` (leading blocks that are indexed), `prefix` (the node of
    the last of these), `lookup` (what the last search of the index found) and `num_restored` (tokens whose KV came back from host
    memory since the last admission).
    """

    __slots__ = (
        "adapter", "arrival", "blocks", "constrained", "cut", "drafts", "extra_rows", "finish_reason", "first_token", "guess", "id",
        "in_flight", "key", "last_token", "lookup", "max_tokens", "min_tokens", "num_cached", "num_computed", "num_planned",
        "num_preemptions", "num_restored", "num_shared", "num_tokens", "output", "paused", "predicted", "prefix", "priority",
        "prompt", "relegated", "root", "salt", "sampling", "scored", "service_class", "slo", "status", "stop_ids", "tenant",
        "ticket", "transferring", "weight",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        stop_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        arrival: float = 0.0,
        priority: int = 0,
        tenant: str = "",
        weight: float = 1.0,
        slo: Slo | None = None,
        service_class: str = "",
        adapter: str = "",
        salt: str = "",
        sampling: object = None,
        extra_rows: int = 0,
        constrained: bool = False,
        scored: bool = False,
    ):
        self.id = id
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.stop_ids = stop_ids
        self.min_tokens = min_tokens
        self.arrival = arrival
        self.priority = priority
        self.tenant = tenant
        self.weight = weight
        self.service_class = service_class
        self.slo = slo
        self.adapter = adapter
        self.salt = salt
        self.sampling = sampling
        self.extra_rows = extra_rows
        self.constrained = constrained
        self.scored = scored

        self.output: list[int] = []
        self.blocks: list[int] = []
        self.num_tokens = len(prompt)
        self.num_computed = 0
        self.num_planned = 0
        self.in_flight = 0
        self.transferring = False
        self.cut = 0
        self.num_cached = 0
        self.num_shared = 0
        self.num_restored = 0
        self.root = f"{adapter}\0{salt}" if salt else adapter
        self.prefix: object = self.root
        self.lookup: tuple[int, object, int] = (-1, self.root, 0)
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.num_preemptions = 0
        self.first_token = inf
        self.last_token = inf
        self.predicted: float | None = None
        self.relegated = False
        self.drafts: tuple[int, ...] = ()
        self.guess: Any = None
        self.paused = False
        self.key: tuple[Any, ...] = ()
        self.ticket = 0

    @property
    def lane(self) -> Lane:
        return self.tenant, self.service_class, RELEGATED if self.relegated else RESUMED if self.output else NEW

    @property
    def remaining(self) -> int:
        """Tokens still to be planned. 1, with an output: a ready decode. -1: a decode planned before its token is known."""
        return self.num_tokens - self.num_planned

    @property
    def goes_on(self) -> bool:
        """Whether the request, whose next token is in flight, may be planned one more token after it. A stop id cannot be
        foreseen."""
        if self.constrained or self.transferring or self.paused:
            return False
        return self.num_planned == self.num_tokens and len(self.output) + 1 < self.max_tokens

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids at positions start..stop-1 of prompt and output together."""
        split = len(self.prompt)
        if stop <= split:
            return tuple(self.prompt[start:stop])
        if start >= split:
            return tuple(self.output[start - split : stop - split])
        return (*self.prompt[start:split], *self.output[: stop - split])

    def append(self, tokens: Sequence[int], now: float) -> str | None:
        """Add tokens that were sampled at `now`, up to one that ends the request. Returns the finish reason if one does. For the
        scheduler."""
        output = self.output
        if not output:
            self.first_token = now
        self.last_token = now
        for token in tokens:
            output.append(token)
            self.num_tokens += 1
            if token in self.stop_ids and (len(output) > self.min_tokens or self.constrained):
                return "stop"
            if len(output) >= self.max_tokens:
                return "length"
        return None

    def __repr__(self) -> str:
        return (
            f"Request({self.id!r}, {self.status.value}, {len(self.prompt)}+{len(self.output)} tokens, "
            f"{self.num_computed} computed, {self.num_planned} planned)"
        )
