"""A closed loop: clients that each send their next request when their last one has ended, as benchmark tools with a fixed
concurrency do. It knows no rates: the machine sets the pace.
"""

from collections.abc import Iterable, Iterator
from math import inf, nextafter

from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.metrics.timeline import Timeline
from stallfree.sim.replica import Replica
from stallfree.sim.simulate import scripted, uncollected
from stallfree.sim.simulator import Simulator
from stallfree.workload.workload import Arrival

LEAP = 512
"""The most iterations in one leap. Few arrivals cut one short: each follows an end by the time of the front end."""


def closed_loop(simulator: Simulator, sizes: Iterable[tuple[int, int]], clients: int) -> list[Timeline]:
    """Serve requests with these prompt and output tokens, `clients` at a time; all clients begin at once. Returns the timelines in
    the order in which the requests ended. Raises ValueError for a request that does not fit.
    """
    instance, deployment, lines = simulator.instance, simulator.deployment, list[Timeline]()
    scheduler = Scheduler(simulator.policy(), instance.capacity, simulator.limits, reuse=deployment.prefix_cache)
    free = [0.0] * clients  # when the clients that have nothing under way got their last token
    now = latest = 0.0

    def sending() -> Iterator[Arrival]:
        for prompt, output in sizes:
            yield Arrival(now, prompt, output)

    def ended(request: Request) -> None:
        line: Timeline = request.sampling.line  # type: ignore[attr-defined]
        lines.append(line)
        free.append(line.tokens[-1])

    def send() -> None:
        nonlocal now, latest
        moments = list(free)
        free.clear()
        for moment in moments:
            now = moment
            request = next(requests, None)
            if request is not None:
                latest = request.arrival
                replica.take(request)

    replica = Replica(scheduler, instance.cost, ended=ended, between_s=instance.between_s, leap=LEAP)
    requests = scripted(sending(), scheduler, deployment.max_output, instance.front_s)
    with uncollected():
        send()
        while replica.num_requests:
            replica.run(nextafter(replica.due if replica.due < inf else latest, inf))
            send()
    return lines
