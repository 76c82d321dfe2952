"""KV transfers in the ledger: the states of a request and its blocks when one engine computes the prompt and another decodes. It
does not know how the blocks travel.

The first calls `hold` (no more work), then `release`. The second calls `expect` (queue it), `admit` (reserve blocks), then one of
three: `deliver` (the KV of the prompt and the first token are here), `resume` (the KV of some of its tokens is here, and it goes on
with the others), or `recall` (give up the transfer and compute the prompt here).
"""

from bisect import insort

from stallfree.core.ledger import Ledger
from stallfree.core.request import Request, Status


def hold(ledger: Ledger, id: str) -> None:
    """Give a running request, not in flight, no more work until it is released or aborted. It keeps its KV. KeyError if unknown."""
    request = ledger.requests[id]
    if request.status is not Status.RUNNING or request.in_flight:
        raise ValueError(f"only a running request that is not in flight can be held, not {request!r}")
    ledger.running.remove(request)
    request.status = Status.HELD
    ledger.num_held += 1


def release(ledger: Ledger, id: str) -> Request:
    """Remove a request that continues on another engine. It keeps its tokens and leaves its KV. Raises KeyError if unknown."""
    request = ledger.requests[id]
    if request.in_flight:
        raise ValueError(f"{request!r} is in flight; it can be released once its plan is complete")
    ledger.leave(request)
    ledger.drop_kv(request)
    request.status = Status.RELEASED
    return request


def expect(ledger: Ledger, request: Request) -> None:
    """Queue a new request whose prompt another engine computes after `admit` has reserved blocks. Raises `Refused`."""
    ledger.enter(request)
    insort(ledger.expected, request, key=lambda r: r.key)


def admit(ledger: Ledger, *, ahead: bool = False) -> Request | None:
    """Admit the first expected request whose adapter is here: reserve blocks for the KV of its prompt. The first `num_cached`
    tokens are already here. Until `deliver` or `recall`, a policy sees a prompt that is entirely in flight.

    Returns None and changes nothing if there is none, if there is no room, or, unless it may go `ahead`, if the head of the queue
    comes before it.
    """
    if not ledger.expected or ledger.full:
        return None
    request, head = next(filter(ledger.adapters.ready, ledger.expected), None), ledger.queue.head()
    if request is None or (head is not None and head[0] < request.key and not ahead):
        return None
    spare = ledger.kept_free(request)
    cached = ledger.pool.match(request, spare)
    upto = request.num_tokens + (request.max_tokens if ledger.reserve == "max" else 0)
    if not ledger.pool.grow(request, upto, spare):
        ledger.pool.release(request)
        return None
    ledger.expected.remove(request)
    request.num_cached = request.num_computed = cached
    request.num_planned = request.num_tokens
    request.in_flight, request.transferring = 1, True
    ledger.run(request)
    return request


def deliver(ledger: Ledger, request: Request, token: int, now: float) -> Request | None:
    """The KV and the first token of an admitted request are here: it is a ready decode now. Returned if this token ends it."""
    request.in_flight, request.transferring = 0, False
    request.num_computed = request.num_planned
    ledger.pool.commit(request)
    reason = request.append((token,), now)
    if reason is None:
        return None
    ledger.end(request, reason)
    ledger.sweep()
    return request


def resume(ledger: Ledger, request: Request, computed: int, stream: Request | None = None) -> None:
    """The KV of the first `computed` tokens of an admitted request is here: it goes on with the rest. `stream`: the same request on
    the other engine, if it has output; its tokens and their times are taken over. If blocks are short, the KV that has no block is
    lost, and its tokens are computed again.
    """
    if stream is not None:
        request.output, request.num_tokens = stream.output, stream.num_tokens
        request.first_token, request.last_token = stream.first_token, stream.last_token
    if not ledger.pool.grow(request, computed):
        computed = len(request.blocks) * ledger.pool.block_size
    request.in_flight, request.transferring = 0, False
    request.num_computed = request.num_planned = computed
    ledger.pool.commit(request)


def recall(ledger: Ledger, request: Request) -> None:
    """Give up the KV transfer of an admitted request. It returns to its old place in the queue; its prompt is computed here."""
    request.in_flight = 0
    ledger.requeue(request)
