"""Many replicas on one clock, which jumps from event to event: the next arrival, or the replica that wants to be woken first.

It sends each request to the replica that a router chooses, and knows nothing of what happens there.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from math import inf

from stallfree.core.request import Request
from stallfree.sim.replica import Replica

Router = Callable[[Request, Sequence[Replica]], int]
"""Which of the replicas a request goes to at its arrival, by its number."""


def serve(
    requests: Iterable[Request], replicas: Sequence[Replica], router: Router, leaving: Iterable[tuple[float, str]] = ()
) -> None:
    """Serve `requests`, which have a `Script` and come in the order of their arrivals, to their ends; `leaving`: (moment, id) of
    those whose clients leave before, in order of the moments. Raises ValueError for a request that can never be served, or one
    that comes before the one in front of it, or that the policy leaves waiting for ever.
    """
    heap: list[tuple[float, int]] = []
    comes = ((r.arrival, 0, r, "") for r in requests)
    goes = ((moment, 1, None, id) for moment, id in leaving)
    before = -inf

    def until(moment: float) -> None:
        """Wake whoever wants to be before `moment`."""
        while heap and heap[0][0] < moment:
            due, number = heapq.heappop(heap)
            replica = replicas[number]
            if replica.due == due:  # else the entry is an old one
                replica.wake()
                note(number)

    def note(number: int) -> None:
        if replicas[number].due < inf:
            heapq.heappush(heap, (replicas[number].due, number))

    for moment, _, request, id in heapq.merge(comes, goes, key=lambda event: event[:2]):
        if moment < before:
            raise ValueError(f"something happens at {moment:g} s, after what happened at {before:g} s; sort by time")
        before = moment
        until(moment)
        if request is not None:
            number = router(request, replicas)
            replicas[number].take(request)
            note(number)
        else:
            for number, replica in enumerate(replicas):
                replica.drop(id, moment)
                note(number)
    until(inf)
    for replica in replicas:
        if replica.num_requests:
            name = type(replica.scheduler.policy).__name__
            raise ValueError(f"policy {name} plans no work for {replica.num_requests} requests; they would wait for ever")
