"""A request's KV on its way between two engines: what the engine that lets it go does with the accounts, and what the one does that
takes it in. How the blocks travel it does not know.

Away: `hold` (it gets no more work), then `release`. Here: `expect` (it queues), `admit` (blocks to be filled), then `deliver` (they
are filled, and its first token is there) or `recall` (nobody computes it elsewhere).
"""

from bisect import insort

from stallfree.core.ledger import Ledger
from stallfree.core.request import Request, Status


def hold(ledger: Ledger, id: str) -> None:
    """A running request gets no more work, and keeps its KV, until it is released or aborted. KeyError if unknown."""
    request = ledger.requests[id]
    if request.status is not Status.RUNNING or request.in_flight:
        raise ValueError(f"only a running request that is not in flight can be held, not {request!r}")
    ledger.running.remove(request)
    request.status = Status.HELD
    ledger.num_held += 1


def release(ledger: Ledger, id: str) -> Request:
    """Let a request go that is to be continued elsewhere: it keeps its tokens and leaves its KV. KeyError if unknown."""
    request = ledger.requests[id]
    if request.in_flight:
        raise ValueError(f"{request!r} is in flight; it can be released once its plan is complete")
    ledger.leave(request)
    ledger.drop_kv(request)
    request.status = Status.WAITING
    return request


def expect(ledger: Ledger, request: Request) -> None:
    """Queue a new request whose prompt is computed elsewhere, once `admit` has given it room. Raises `Refused`."""
    ledger.enter(request)
    insort(ledger.expected, request, key=lambda r: r.key)


def admit(ledger: Ledger) -> Request | None:
    """Admit the first of the expected: its blocks are to be filled with the KV of its prompt, but for the `num_cached` tokens found
    here. To policies this looks like a prompt that is all in flight, until `deliver` or `recall`.

    None, and nothing changed, if nobody is expected, if there is no room now, or if somebody before it waits in the queue.
    """
    if not ledger.expected or ledger.full:
        return None
    request, head = ledger.expected[0], ledger.queue.head()
    if head is not None and head[0] < request.key:
        return None
    cached = ledger.pool.match(request)
    upto = request.num_tokens + (request.max_tokens if ledger.reserve == "max" else 0)
    if not ledger.pool.grow(request, upto, ledger.spare):
        ledger.pool.release(request)
        return None
    del ledger.expected[0]
    request.num_cached = request.num_computed = cached
    request.num_planned = request.num_tokens
    request.in_flight, request.reserved = 1, True
    ledger.run(request)
    return request


def deliver(ledger: Ledger, request: Request, token: int, now: float) -> Request | None:
    """The KV of an admitted request is there, and the first token: it is a ready decode from now on, or has ended by this token and
    is returned."""
    request.in_flight, request.reserved = 0, False
    request.num_computed = request.num_planned
    ledger.pool.commit(request)
    reason = request.append((token,), now)
    if reason is None:
        return None
    ledger.end(request, reason)
    ledger.sweep()
    return request


def recall(ledger: Ledger, request: Request) -> None:
    """Nobody elsewhere computes the prompt of an admitted request: it is computed here, from its old place in the queue on."""
    request.in_flight = 0
    ledger.requeue(request)
