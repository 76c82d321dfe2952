"""Which replica a request goes to. A router sees the requests as they arrive and what each replica has to do then; it does not know
what will become of them.
"""

from stallfree.core.nearest import nearest
from stallfree.core.request import Request
from stallfree.sim.cluster import Cluster, Router

PREFIX = 512
"""Tokens that a prefix is told apart by, as in Mooncake's trace (FAST'25)."""
UNEVEN = 1.5
"""So many times the mean number of requests, and two more, a replica may have for the sake of its cache."""


def round_robin() -> Router:
    """One after the other."""
    count = -1

    def choose(request: Request, cluster: Cluster) -> int:
        nonlocal count
        count += 1
        return count % len(cluster)

    return choose


def least_loaded() -> Router:
    """The one with the fewest requests that have not ended."""

    def choose(request: Request, cluster: Cluster) -> int:
        loads = [replica.num_requests for replica in cluster.at(request.arrival)]
        return loads.index(min(loads))

    return choose


def shortest_queue() -> Router:
    """The one with the fewest tokens to be computed until everybody there has the next one."""

    def choose(request: Request, cluster: Cluster) -> int:
        loads = [replica.pending(request.arrival) for replica in cluster.at(request.arrival)]
        return loads.index(min(loads))

    return choose


def prefix_affinity() -> Router:
    """The one to which the longest beginning of the prompt went last, in pieces of `PREFIX` tokens, unless it has many more
    requests than the others; else the least loaded.
    """
    # A piece behind others by its number: that of the pieces before it and its own hash; a collision costs a cache miss.
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    least = least_loaded()

    def choose(request: Request, cluster: Cluster) -> int:
        starts = range(0, len(request.prompt) - PREFIX + 1, PREFIX)
        pieces = [hash(request.tokens(start, start + PREFIX)) for start in starts]
        piece, found = 0, None
        for content in pieces:
            if (piece, content) not in seen:
                break
            piece, found = seen[piece, content]
        replicas = cluster.at(request.arrival)
        allowed = UNEVEN * sum([replica.num_requests for replica in replicas]) / len(replicas) + 2
        number = least(request, cluster) if found is None or replicas[found].num_requests > allowed else found
        piece = 0
        for content in pieces:
            behind = seen[piece, content][0] if (piece, content) in seen else len(seen) + 1
            seen[piece, content] = behind, number
            piece = behind
        return number

    return choose


NAMES = ("round-robin", "least-loaded", "shortest-queue", "prefix-affinity")


def load(name: str) -> Router:
    """A new router by its name. Raises ValueError that names the nearest if there is none of that name."""
    if name not in NAMES:
        raise ValueError(f"unknown router {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    made: Router = globals()[name.replace("-", "_")]()
    return made
