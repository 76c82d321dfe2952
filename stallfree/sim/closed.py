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

LEAP = 4096
"""The most iterations in one leap. Nobody arrives in the middle of one, because each arrival follows an end."""


def closed_loop(simulator: Simulator, sizes: Iterable[tuple[int, int]], clients: int) -> list[Timeline]:
    """Serve requests with these prompt and output tokens, `clients` at a time; all clients begin at once. Returns the timelines in
    the order in which the requests ended. Raises ValueError for a request that does not fit.
    """
    instance, deployment, lines = simulator.instance, simulator.deployment, list[Timeline]()
    scheduler = Scheduler(simulator.policy(), instance.capacity, simulator.limits, reuse=deployment.prefix_cache)
    now = latest = 0.0

    def sending() -> Iterator[Arrival]:
        for prompt, output in sizes:
            yield Arrival(now, prompt, output)

    def ended(request: Request) -> None:
        nonlocal now
        line: Timeline = request.sampling.line  # type: ignore[attr-defined]
        lines.append(line)
        now = line.tokens[-1]
        send()

    def send() -> None:
        nonlocal latest
        request = next(requests, None)
        if request is not None:
            latest = request.arrival
            replica.take(request)

    replica = Replica(scheduler, instance.cost, ended=ended, between_s=instance.between_s, leap=LEAP)
    requests = scripted(sending(), scheduler, deployment.max_output, instance.front_s)
    with uncollected():
        for _ in range(clients):
            send()
        while replica.num_requests:
            replica.run(nextafter(replica.due if replica.due < inf else latest, inf))
    return lines
