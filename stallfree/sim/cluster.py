"""Many replicas, each with a clock of its own, and what arrives. A replica is brought up to the moment when somebody looks at it,
and no sooner than it likes: what happens in it until then is nobody else's business, and done in one go it is done faster.

It sends each request to the replica that a router chooses, and knows nothing of what happens there.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from math import inf

from stallfree.core.request import Request
from stallfree.sim.replica import Replica


class Cluster:
    """`replicas` that know nothing of each other."""

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
"""Which of the replicas a request goes to at its arrival, by its number."""


def serve(
    requests: Iterable[Request], replicas: Sequence[Replica], router: Router, leaving: Iterable[tuple[float, str]] = ()
) -> None:
    """Serve `requests`, which have a `Script` and come in the order of their arrivals, to their ends; `leaving`: (moment, id) of
    those whose clients leave before, in order of the moments. Raises ValueError for one that comes before the one in front of it,
    or that the policy leaves waiting for ever.
    """
    cluster = Cluster(replicas)
    before = -inf
    comes = ((r.arrival, 0, r, "") for r in requests)
    goes = ((moment, 1, None, id) for moment, id in leaving)
    for moment, _, request, id in heapq.merge(comes, goes, key=lambda event: event[:2]):
        if moment < before:
            raise ValueError(f"something happens at {moment:g} s, after what happened at {before:g} s; sort by time")
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
