"""One user request, from door to door: the only mutable state that the scheduler, its policies and the engine share.

A request has no prefill or decode phase. It has tokens (prompt and output) and the number of them whose KV exists or is in
flight; the rest, `remaining`, is what it has to catch up on. It does not know blocks' contents, text or time other than its
arrival.
"""

from collections.abc import Sequence
from enum import Enum
from math import inf
from typing import Any

from stallfree.core.slo import Slo


class Refused(ValueError):
    """A request that can never be served as asked. `field` names the part of it that is at fault."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


class Status(Enum):
    """Where a request is: `WAITING` -> `RUNNING` -> `FINISHED`; preemption leads from `RUNNING` back to `WAITING`. `HELD`: it has
    KV and gets no work, while that KV is on its way from here, or to here.
    """

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


class Request:
    """A prompt, how far its KV has got, and the tokens sampled so far. Compared by identity.

    Written by the user of the scheduler, once: `id`, `prompt` (token ids; any sequence, a `range` in simulation), `max_tokens`
    (output tokens, at least 1), `stop_ids` (token ids that end the output), `min_tokens` (output tokens before a stop id
    counts), `arrival` (seconds, any origin), `priority` (lower is served first), `tenant`, `slo` (its own targets, or None),
    `adapter`, `sampling`, which the scheduler passes on unread, and `extra_rows`: sampling a token so takes as long as that many
    more plain rows of logits.

    Written by the scheduler alone: `output` (token ids), `blocks` (KV block numbers, in order), `num_tokens` (prompt and
    output), `num_computed` (tokens whose KV exists), `num_planned` (`num_computed` and those in flight), `in_flight` (plans),
    `reserved` (its prompt is computed elsewhere, its KV is on the way here), `num_cached` (prompt tokens found in the prefix cache
    at the last admission), `status`, `finish_reason` ("stop", "length", "abort" or "error"), `num_preemptions`, `first_token` and
    `last_token` (when they came; inf before), and the place in the queue, `key`, with `ticket`, the live queue entry.
    `num_shared`, `prefix` and `looked` belong to the block pool: the leading blocks that it has indexed, the last one's node, and
    what its last look at the index found.
    """

    __slots__ = (
        "adapter", "arrival", "blocks", "extra_rows", "finish_reason", "first_token", "id", "in_flight", "key", "last_token",
        "looked", "max_tokens", "min_tokens", "num_cached", "num_computed", "num_planned", "num_preemptions", "num_shared",
        "num_tokens", "output", "prefix", "priority", "prompt", "reserved", "sampling", "slo", "status", "stop_ids", "tenant",
        "ticket",
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
        slo: Slo | None = None,
        adapter: str = "",
        sampling: object = None,
        extra_rows: int = 0,
    ):
        self.id = id
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.stop_ids = stop_ids
        self.min_tokens = min_tokens
        self.arrival = arrival
        self.priority = priority
        self.tenant = tenant
        self.slo = slo
        self.adapter = adapter
        self.sampling = sampling
        self.extra_rows = extra_rows

        self.output: list[int] = []
        self.blocks: list[int] = []
        self.num_tokens = len(prompt)
        self.num_computed = 0
        self.num_planned = 0
        self.in_flight = 0
        self.reserved = False
        self.num_cached = 0
        self.num_shared = 0
        self.prefix: object = adapter
        self.looked: tuple[int, object, int] = (-1, adapter, 0)
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.num_preemptions = 0
        self.first_token = inf
        self.last_token = inf
        self.key: tuple[Any, ...] = ()
        self.ticket = 0

    @property
    def remaining(self) -> int:
        """Tokens still to be planned. 1 with an output is a ready decode; -1 one that is planned ahead of its token."""
        return self.num_tokens - self.num_planned

    @property
    def goes_on(self) -> bool:
        """Of a request whose next token is in flight: whether it wants another one, as far as can be known before that token is."""
        return self.num_planned == self.num_tokens and len(self.output) + 1 < self.max_tokens and not self.reserved

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids at positions start..stop-1 of prompt and output together."""
        split = len(self.prompt)
        if stop <= split:
            return tuple(self.prompt[start:stop])
        if start >= split:
            return tuple(self.output[start - split : stop - split])
        return (*self.prompt[start:split], *self.output[: stop - split])

    def append(self, tokens: Sequence[int], now: float) -> str | None:
        """Add tokens that were sampled at `now`; the finish reason if one of them ends the request. For the scheduler."""
        output = self.output
        if not output:
            self.first_token = now
        self.last_token = now
        for token in tokens:
            output.append(token)
            self.num_tokens += 1
            if token in self.stop_ids and len(output) > self.min_tokens:
                return "stop"
            if len(output) >= self.max_tokens:
                return "length"
        return None

    def __repr__(self) -> str:
        return (
            f"Request({self.id!r}, {self.status.value}, {len(self.prompt)}+{len(self.output)} tokens, "
            f"{self.num_computed} computed, {self.num_planned} planned)"
        )
