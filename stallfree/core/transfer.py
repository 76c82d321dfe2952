"""KV transfers in the ledger: the states of a request and its blocks when one engine computes the prompt and another decodes. It
does not know how the blocks travel.

The first calls `hold` (no more work), then `release`. The second calls `expect` (queue it), `admit` (reserve blocks), `extend` for
each token that the first samples while KV is on its way, then one of three: `deliver` (KV and one more token are here), `resume`
(the KV of some of its tokens is here, and it goes on with the others), or `recall` (give up the transfer and compute it here).
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


def expect(ledger: Ledger, request: Request, cut: int | None = None) -> None:
    """Queue a new request whose first `cut` tokens (None: its prompt) another engine computes after `admit` has reserved blocks. A
    cut beyond the prompt includes output, all but its last token. Raises `Refused`.
    """
    ledger.enter(request)
    request.cut = len(request.prompt) if cut is None else cut
    insort(ledger.expected, request, key=lambda r: r.key)


def admit(ledger: Ledger, *, ahead: bool = False, owed: int = 0) -> Request | None:
    """Admit the first expected request whose adapter is here: reserve blocks for the KV of its prompt, and of the output before its
    cut. The first `num_cached` tokens are already here. Until `deliver`, `resume` or `recall`, a policy sees a request that is
    entirely in flight. `owed`: free blocks that belong to others.

    Returns None and changes nothing if there is none, if there is no room, or, unless it may go `ahead`, if the head of the queue
    comes before it.
    """
    if not ledger.expected or ledger.full:
        return None
    request, head = next(filter(ledger.adapters.ready, ledger.expected), None), ledger.queue.head()
    if request is None or (head is not None and head[0] < request.key and not ahead):
        return None
    spare = ledger.kept_free(request) + owed
    cached = ledger.pool.match(request, spare)
    upto = request.num_tokens + request.max_tokens if ledger.reserve == "max" else max(request.num_tokens, request.cut)
    if not ledger.pool.grow(request, upto, spare):
        ledger.pool.release(request)
        return None
    ledger.expected.remove(request)
    request.num_cached = request.num_computed = cached
    request.num_planned = request.num_tokens
    request.in_flight, request.transferring = 1, True
    ledger.run(request)
    return request


def extend(ledger: Ledger, request: Request, token: int, now: float) -> Request | None:
    """The other engine has sampled a token of an admitted request, before its cut; the KV is still on its way. Returned if this
    token ends it.
    """
    ended = _append(ledger, request, token, now)
    request.num_planned = request.num_tokens
    return ended


def deliver(ledger: Ledger, request: Request, token: int, now: float) -> Request | None:
    """The KV of all tokens of an admitted request is here, and one more token: it is a ready decode now. Returned if this token
    ends it.
    """
    request.in_flight, request.transferring = 0, False
    request.num_computed = request.num_planned
    ledger.pool.commit(request)
    return _append(ledger, request, token, now)


def resume(ledger: Ledger, request: Request, computed: int, stream: Request | None = None) -> None:
    """The KV of the first `computed` tokens of an admitted request is here: it goes on with the rest. `stream`: the same request on
    the other engine, if it has output; its tokens and their times are taken over. If blocks are short, the KV that has no block is
    lost, and its tokens are computed again.
    """
    request.cut = computed
    if stream is not None:
        request.output, request.num_tokens = stream.output, stream.num_tokens
        request.first_token, request.last_token = stream.first_token, stream.last_token
    if not ledger.pool.grow(request, computed):
        computed = len(request.blocks) * ledger.pool.block_size
    request.in_flight, request.transferring = 0, False
    request.num_computed = request.num_planned = computed
    ledger.pool.commit(request)


def recall(ledger: Ledger, request: Request) -> None:
    """Give up the KV transfer of an admitted request. It returns to its old place in the queue, and all is computed here."""
    request.in_flight, request.cut = 0, 0
    ledger.requeue(request)


def _append(ledger: Ledger, request: Request, token: int, now: float) -> Request | None:
    """Add a token that the other engine sampled. The request is returned if this token ends it."""
    reason = request.append((token,), now)
    if reason is None:
        return None
    ledger.end(request, reason)
    ledger.sweep()
    return request
