"""Instances that form groups anew for every iteration, in virtual time. It knows prices and clocks, and plans nothing."""

import heapq
from collections.abc import Iterable
from itertools import count

from stallfree.core.plan import Shape
from stallfree.elastic.policy import Policy
from stallfree.elastic.state import Instances, Iteration, Stream
from stallfree.metrics.timeline import Timeline
from stallfree.perf import hardware as devices
from stallfree.perf import shape as models
from stallfree.perf.kernels import send
from stallfree.perf.roofline import Roofline
from stallfree.sim.deployment import Deployment
from stallfree.workload.workload import Arrival


class Rings:
    """What an iteration costs on 1 to `deployment.sp` instances, each of which is a group of `deployment.tp` devices. `rooms`: the
    tokens of KV that fit each. A decode's KV is priced as if it lay evenly on the members. Raises ValueError as
    `sim.simulator.instance` does."""

    def __init__(self, deployment: Deployment):
        device, model = devices.load(deployment.hardware), models.load(deployment.model or "")
        sharded = models.Sharded(model, deployment.tp, 1, deployment.weights, deployment.kv)
        self._costs = [
            Roofline(device, sharded, deployment.engine, node=deployment.node, network=deployment.network, sp=degree)
            for degree in range(1, deployment.sp + 1)
        ]
        self.rooms = [sharded.kv_tokens(device.memory, deployment.gpu_memory_utilization)] * deployment.sp
        used = deployment.node or device.node
        self._link = device.link(deployment.tp * deployment.sp, min(used, deployment.tp * deployment.sp), deployment.network)
        self._kv_bytes = sharded.kv_bytes_per_token
        self.front_s = self._costs[0].front_s

    def moving(self, tokens: int) -> float:
        """Seconds in which the KV of so many tokens moves: each device of an instance sends its part to one of another."""
        return send(self._link, tokens * self._kv_bytes).seconds

    def seconds(self, degree: int, shape: Shape) -> float:
        """Seconds of an iteration with this shape on `degree` instances."""
        return self._costs[degree - 1].seconds(shape)


def serve(arrivals: Iterable[Arrival], rings: Rings, policy: Policy) -> list[Timeline]:
    """Serve `arrivals`, in the order of their times, to their ends. Returns their timelines in the order in which they ended.
    Raises ValueError for a request that does not fit all instances, and if the policy leaves one waiting for ever.
    """
    instances, lines, number = Instances(rings.rooms), [], count()
    outputs: dict[Stream, tuple[int, Timeline]] = {}
    ends: list[tuple[float, int, Iteration]] = []
    coming = iter(arrivals)
    arrival = next(coming, None)
    while arrival is not None or ends:
        now = min(ends[0][0] if ends else float("inf"), arrival.at + rings.front_s if arrival else float("inf"))
        while arrival is not None and arrival.at + rings.front_s <= now:
            stream = Stream(str(next(number)), arrival.at, arrival.prompt_tokens)
            if arrival.prompt_tokens + arrival.output_tokens > sum(rings.rooms):
                raise ValueError(
                    f"a request of {arrival.prompt_tokens + arrival.output_tokens:,} tokens does not fit all instances, which hold "
                    f"{sum(rings.rooms):,}; limit the lengths (--max-total)"
                )
            instances.arrive(stream)
            outputs[stream] = arrival.output_tokens, Timeline(stream.id, arrival.at, arrival.prompt_tokens)
            arrival = next(coming, None)
        while ends and ends[0][0] <= now:
            for stream in instances.end(heapq.heappop(ends)[2]):
                most, line = outputs[stream]
                line.tokens.append(now)
                if stream.output == most:
                    instances.leave(stream)
                    line.finished, line.reason = now, "length"
                    lines.append(line)
                    del outputs[stream]
                    policy.ended(stream, now - line.tokens[0])
        for iteration in policy.plan(instances, now):
            seconds = rings.seconds(len(iteration.members), shape(iteration))
            if iteration.moved:
                seconds += rings.moving(iteration.moved)
            instances.begin(iteration)
            for stream in iteration.chunks:
                line = outputs[stream][1]
                line.scheduled = now if line.scheduled is None else line.scheduled
            heapq.heappush(ends, (now + seconds, next(number), iteration))
    if outputs:
        raise ValueError(f"{type(policy).__name__} plans no work for {len(outputs)} requests; they would wait for ever")
    return lines


def shape(iteration: Iteration) -> Shape:
    """The tokens before each piece of an iteration, and its own."""
    chunks = [(stream.computed, sum(kept.values())) for stream, kept in iteration.chunks.items()]
    return chunks + [(stream.computed, 1) for stream in iteration.decodes]
