"""vLLM's requests as a policy sees them, and the iteration that it writes. This changes nothing in vLLM; `scheduler.py` applies
it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from math import inf
from typing import Any

from stallfree.core.draft import ENGINE_LIMIT
from stallfree.core.request import Status
from stallfree.core.slo import Slo

RUNNING = Status.RUNNING  # looked up once: attributes of an enum are slow


class View:
    """One of vLLM's requests under the names that a policy reads (see `core.request.Request`). Times in seconds of one clock.

    `request`: vLLM's own; `tokens`: its list of prompt and output; `asked`: the targets that it asked for; `slo`: what has to be
    kept of them here. With asynchronous scheduling vLLM counts tokens in flight as placeholders. `num_tokens` counts them too, so
    a stream whose next token is in flight is a ready decode again. `offered_from`: the number of the draft from which on it is
    offered again after vLLM could not take it. `cached`: its tokens in the prefix cache, looked up in the draft `looked`.
    """

    __slots__ = (
        "arrival", "arrival_time", "asked", "cached", "extra_rows", "first_token", "id", "last_token", "looked", "num_planned",
        "num_tokens", "offered_from", "output", "priority", "relegated", "request", "slo", "status", "tokens",
    )  # fmt: skip

    def __init__(self, request: Any, arrival: float, slo: Slo | None, asked: Slo | None):
        self.request, self.id, self.priority, self.arrival, self.slo = request, request.request_id, request.priority, arrival, slo
        self.output: Sequence[int] = request._output_token_ids  # the public ones are wrapped, and four times slower to look at
        self.tokens: Sequence[int] = request._all_token_ids
        self.num_tokens: int = len(self.tokens)
        self.num_planned: int = request.num_computed_tokens
        self.asked = asked
        self.arrival_time: float = request.arrival_time
        self.cached, self.looked = 0, -1_000_000
        self.extra_rows = 0  # vLLM samples on the device
        self.first_token = self.last_token = inf
        self.status = Status.WAITING
        self.offered_from = 0
        self.relegated = False

    # vLLM knows no tenants.
    tenant, service_class, weight = "", "", 1.0

    @property
    def max_tokens(self) -> int:
        return int(self.request.max_tokens)

    @property
    def remaining(self) -> int:
        return self.num_tokens - self.num_planned


class VllmDraft:
    """One iteration while a policy writes it, with the names of `core.draft.Draft`. vLLM keeps the KV accounts, so nobody is
    preempted here, and an admission looks only whether the request fits into the free KV blocks.

    `running`: vLLM's running requests and those that wait with KV; `waiting`: the others, as far as they can begin; `num_waiting`:
    how many others there are. `most`: tokens that vLLM allows; `seats`: how many more requests may run; `free`: free KV blocks of
    `block_size` tokens; `cached` gives the tokens of a waiting request that are in the prefix cache. `ahead`: tokens may be in
    flight; `speculates`: decodes may have tokens to verify. `work`: the (start, count) of everybody who gets tokens; `pieces`:
    those that each of `decoding` would get.
    """

    __slots__ = (
        "_block_size", "_cached", "_free", "_seats", "_speculates", "_waiting", "admitted", "budget", "chunks",
        "decoding", "left", "limit_s", "margin", "now", "num_waiting", "pieces", "prefilling", "reason", "work",
    )  # fmt: skip

    def __init__(
        self,
        running: Iterable[View],
        waiting: Iterator[View],
        now: float,
        *,
        num_waiting: int,
        most: int,
        seats: int,
        free: int,
        block_size: int,
        cached: Callable[[View], int],
        ahead: bool = False,
        speculates: bool = False,
    ):
        self.now = now
        self.num_waiting = num_waiting
        self.left = self.budget = most
        self.reason = ENGINE_LIMIT
        self.limit_s: float | None = None
        self.margin: float | None = None
        self.work: dict[View, tuple[int, int]] = {}
        self.chunks: dict[View, int] = {}
        self.admitted: list[View] = []
        self.decoding: list[View] = []
        self.prefilling: list[View] = []
        self.pieces: list[tuple[int, int]] = []
        self._waiting, self._seats, self._free, self._block_size, self._cached = waiting, seats, free, block_size, cached
        self._speculates = speculates
        decoding, pieces = self.decoding, self.pieces
        for view in running:  # once for every stream in every iteration
            request = view.request
            start = request.num_computed_tokens
            in_flight = request.num_output_placeholders if ahead else 0
            missing = len(view.tokens) + in_flight - start
            if missing == 1 and (view.output or in_flight):
                # With its last token in flight, vLLM gives it no further one.
                if not in_flight or len(view.output) + 1 < request.max_tokens:
                    decoding.append(view)
                    pieces.append((start, 1 + len(request.spec_token_ids) if speculates else 1))
            elif missing > 0:
                view.num_planned, view.num_tokens = start, start + missing
                view.status = RUNNING  # also if it waits with KV
                self.prefilling.append(view)

    @property
    def empty(self) -> bool:
        return not self.work

    @property
    def shape(self) -> list[tuple[int, int]]:
        return list(self.work.values())

    # vLLM knows no tenants, and loads adapters where no policy sees it.
    lanes: tuple[()] = ()
    running: tuple[()] = ()
    parked: frozenset[str] = frozenset()

    @staticmethod
    def brings(view: View) -> list[tuple[int, int]]:
        return []

    @property
    def waiting(self) -> Iterator[View]:
        return self._waiting

    def start(self, view: View) -> int:
        """The position at which the next chunk of a request begins."""
        return view.num_planned if view.status is RUNNING else self._cached(view)

    def cap(self, tokens: int, reason: str) -> None:
        tokens = max(0, tokens)
        if tokens < self.budget:
            self.left -= self.budget - tokens
            self.budget, self.reason = tokens, reason

    def decode_all(self, but: Collection[View] = ()) -> None:
        """Give each ready decode its token, and the speculated ones that vLLM will verify with it, while tokens are left; but not
        those of `but`."""
        pieces = zip(self.decoding, self.pieces, strict=True)
        if not (but or self._speculates or self.work or len(self.decoding) > self.left):
            self.work = dict(pieces)  # the usual case, for every stream in every iteration
            self.left -= len(self.decoding)
            return
        for view, (start, count) in pieces:
            if count <= self.left and view not in self.work and view not in but:
                self.work[view] = start, count
                self.left -= count

    @staticmethod
    def relegate(view: View, relegated: bool = True) -> None:
        view.relegated = relegated

    def prefill(self, view: View, count: int | None = None) -> int:
        size = min(view.remaining, self.left, view.remaining if count is None else count)
        if size <= 0 or view.status is not RUNNING or view in self.work:
            return 0
        self._write(view, size)
        return size

    def admit(self, view: View, count: int | None = None) -> int:
        start = self.start(view)
        remaining = view.num_tokens - start
        size = min(remaining, self.left, remaining if count is None else count)
        blocks = -(-remaining // self._block_size)
        if size <= 0 or view.status is RUNNING or len(self.admitted) >= self._seats or blocks > self._free:
            return 0
        self._free -= blocks
        view.status, view.num_planned = RUNNING, start
        self.admitted.append(view)
        self._write(view, size)
        return size

    @property
    def caps(self) -> dict[str, int]:
        """Request id -> the most tokens that it may get, for those that do not get all that they need."""
        caps = {view.id: count for view, count in self.chunks.items() if view.remaining > 0}
        if len(self.decoding) + len(self.prefilling) + len(self.admitted) > len(self.work):
            caps.update((view.id, 0) for views in (self.decoding, self.prefilling) for view in views if view not in self.work)
        return caps

    def _write(self, view: View, count: int) -> None:
        self.work[view] = view.num_planned, count
        self.chunks[view] = count
        view.num_planned += count
        self.left -= count


class Iteration:
    """An iteration as vLLM scheduled it, with the names of `core.plan.Plan` that a policy learns from.

    `decoding`: the ready decodes in it; `others`: the rest, and of each in `samples` whether it gets a token. `shape`: first the
    decodes, then the others. It was `planned`, began at `now` and ended at `end` (s). The rest is as in `Plan`.
    """

    __slots__ = (
        "budget", "cached", "decoding", "end", "limit_s", "margin", "now", "others", "planned", "preempted", "reason", "samples",
        "shape", "stalled", "step",
    )  # fmt: skip

    def __init__(
        self,
        step: int,
        draft: VllmDraft,
        decoding: list[View],
        others: list[View],
        samples: list[bool],
        shape: list[tuple[int, int]],
        preempted: list[str],
        stalled: list[str],
        cached: list[tuple[str, int]],
    ):
        self.step, self.decoding, self.others, self.samples, self.shape = step, decoding, others, samples, shape
        self.preempted, self.stalled, self.cached = preempted, stalled, cached
        self.planned = self.now = self.end = draft.now
        self.budget, self.reason, self.limit_s, self.margin = draft.budget, draft.reason, draft.limit_s, draft.margin

    @property
    def requests(self) -> list[View]:
        return self.decoding + self.others

    @property
    def decodes(self) -> list[tuple[int, int]]:
        return self.shape[: len(self.decoding)]

    def decoders(self, requests: Sequence[View]) -> Sequence[View]:
        return self.decoding
