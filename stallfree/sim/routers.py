"""Which replica a request goes to. A router sees each request at its arrival, and the load of each replica then. It does not know
what happens later.
"""

from stallfree.core.nearest import nearest
from stallfree.core.request import Request
from stallfree.sim.cluster import Cluster, Router

PREFIX = 512
"""Tokens of the pieces by which prefixes are compared, as in Mooncake's trace (FAST'25)."""
UNEVEN = 1.5
"""For the sake of its cache, a replica may have this many times the mean number of requests, and two more."""


def round_robin() -> Router:
    """Each replica in turn."""
    count = -1

    def choose(request: Request, cluster: Cluster) -> int:
        nonlocal count
        count += 1
        return count % len(cluster)

    return choose


def least_loaded() -> Router:
    """The replica with the fewest unfinished requests."""

    def choose(request: Request, cluster: Cluster) -> int:
        loads = [replica.num_requests for replica in cluster.at(request.arrival)]
        return loads.index(min(loads))

    return choose


def shortest_queue() -> Router:
    """The replica that has to compute the fewest tokens until each of its requests has its next one."""

    def choose(request: Request, cluster: Cluster) -> int:
        loads = [replica.pending(request.arrival) for replica in cluster.at(request.arrival)]
        return loads.index(min(loads))

    return choose


def prefix_affinity() -> Router:
    """The replica that last got the longest prefix of the prompt, in pieces of `PREFIX` tokens; the least loaded replica if there
    is none, or if that one has many more requests than the others (see `UNEVEN`).
    """
    # From (number of the prefix before a piece, hash of the piece) to (number with the piece, replica). A collision costs a miss.
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    least = least_loaded()

    def choose(request: Request, cluster: Cluster) -> int:
        starts = range(0, len(request.prompt) - PREFIX + 1, PREFIX)
        pieces = [hash(request.tokens(start, start + PREFIX)) for start in starts]
        prefix, latest = 0, None
        for piece in pieces:
            if (prefix, piece) not in seen:
                break
            prefix, latest = seen[prefix, piece]
        replicas = cluster.at(request.arrival)
        allowed = UNEVEN * sum([replica.num_requests for replica in replicas]) / len(replicas) + 2
        number = least(request, cluster) if latest is None or replicas[latest].num_requests > allowed else latest
        prefix = 0
        for piece in pieces:
            longer = seen[prefix, piece][0] if (prefix, piece) in seen else len(seen) + 1
            seen[prefix, piece] = longer, number
            prefix = longer
        return number

    return choose


def least_ttft() -> Router:
    """The replica with the earliest first token by its own forecast, which knows what of the prompt is in its prefix cache; among
    equal ones, and if the policy forecasts nothing, the one with the fewest unfinished requests.
    """

    def choose(request: Request, cluster: Cluster) -> int:
        replicas = cluster.at(request.arrival)
        times = [(replica.forecast(request) or 0.0, replica.num_requests) for replica in replicas]
        return times.index(min(times))

    return choose


NAMES = ("round-robin", "least-loaded", "shortest-queue", "prefix-affinity", "least-ttft")


def load(name: str) -> Router:
    """A new router of this name. Raises ValueError that names the nearest router if there is none."""
    if name not in NAMES:
        raise ValueError(f"unknown router {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    router: Router = globals()[name.replace("-", "_")]()
    return router
