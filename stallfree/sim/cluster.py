"""Many replicas, each with its own clock, and the requests that arrive. A replica runs up to a moment only when its state at that
moment is read, because many iterations in one go are faster.

It sends each request to the replica that a router chooses, and knows nothing of what happens there.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from math import inf

from stallfree.core.request import Request
from stallfree.sim.replica import Replica


class Cluster:
    """`replicas` that know nothing about each other."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas = replicas

    def __len__(self) -> int:
        return len(self.replicas)

    def at(self, moment: float) -> Sequence[Replica]:
        """The replicas as they are just before `moment`."""
        for replica in self.replicas:
            replica.run(moment)
        return self.replicas


Router = Callable[[Request, Cluster], int]
"""Gives the number of the replica that a request goes to at its arrival."""


def serve(
    requests: Iterable[Request], replicas: Sequence[Replica], router: Router, leaving: Iterable[tuple[float, str]] = ()
) -> None:
    """Serve `requests` to their ends. They have a `Script` and come in the order of their arrivals. `leaving`: (moment, id) of
    requests whose clients leave early, in the order of the moments. Raises ValueError if the order is wrong, or if the policy
    leaves a request waiting for ever.
    """
    cluster = Cluster(replicas)
    before = -inf
    comes = ((r.arrival, 0, r, "") for r in requests)
    goes = ((moment, 1, None, id) for moment, id in leaving)
    for moment, _, request, id in heapq.merge(comes, goes, key=lambda event: event[:2]):
        if moment < before:
            raise ValueError(f"an event at {moment:g} s comes after one at {before:g} s; sort them by time")
        before = moment
        if request is not None:
            replicas[router(request, cluster)].take(request)
        else:
            for replica in cluster.at(moment):
                replica.drop(id, moment)
    for replica in cluster.at(inf):
        if replica.num_requests:
            name = type(replica.scheduler.policy).__name__
            raise ValueError(f"policy {name} plans no work for {replica.num_requests} requests; they would wait for ever")
