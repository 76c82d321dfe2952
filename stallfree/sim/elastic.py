"""Instances that form groups anew for every iteration, in virtual time: their prices, their clocks, and a deployment of them.

It plans nothing; the policies of `stallfree.elastic` do.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import count
from math import inf

from stallfree.core.classes import Classes
from stallfree.core.plan import Shape
from stallfree.core.record import Run
from stallfree.core.slo import Slo
from stallfree.elastic.policies import load
from stallfree.elastic.policy import Policy
from stallfree.elastic.state import Instances, Iteration, Stream
from stallfree.metrics.report import Report
from stallfree.metrics.timeline import Timeline
from stallfree.perf import hardware as devices
from stallfree.perf import shape as models
from stallfree.perf.kernels import send
from stallfree.perf.roofline import Roofline
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulate import Simulates, Simulation
from stallfree.sim.simulator import dollars_per_million, instance
from stallfree.workload.workload import Arrival

TAKEN = ("model", "hardware", "tp", "sp", "weights", "kv", "engine", "node", "network", "policy", "slo", "max_model_len")
"""Fields of a deployment that groups of instances have, beside `replicas` and `router`. The others stay at their defaults."""
ROUTER = "shortest-queue"
"""How requests are shared among replicas: a request goes to the one that has to compute the fewest tokens."""


@dataclass(slots=True)
class Groups:
    """As `simulate.Machine`: so many iterations of all groups. How long each instance was busy is not counted."""

    iterations: int = 0
    active_s: float = 0.0
    busy_s: tuple[float, ...] = ()


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


class ElasticSimulator(Simulates):
    """A deployment whose `policy` is one of `elastic.policies.POLICIES`, ready to run many times. The policy keeps the targets of
    requests that name no class. Raises ValueError for fields that groups of instances do not have, and as `simulator.instance`
    does."""

    def __init__(self, deployment: Deployment):
        usual = Deployment()
        for field in fields(deployment):
            value = getattr(deployment, field.name)
            if field.name not in (*TAKEN, "replicas", "router") and value != getattr(usual, field.name):
                raise ValueError(
                    f"policy {deployment.policy} has no {field.name}, which is {value}; leave it out, or take policy slo"
                )
        if deployment.replicas > 1 and deployment.router != ROUTER:
            raise ValueError(f"replicas of policy {deployment.policy} share requests by {ROUTER} only; give --router {ROUTER}")
        if deployment.sp < 2 or deployment.engine.endswith(".json"):
            raise ValueError(
                f"policy {deployment.policy} forms groups of instances, with the prices of rings; give --sp 2 or more, and an "
                "--engine by name"
            )
        self.deployment, self.instance, self.rings = deployment, instance(deployment), Rings(deployment)
        self.classes = None if deployment.slo is None else Classes.parse(deployment.slo)
        self.policy()

    @property
    def targets(self) -> Slo | None:
        """The targets of requests that name no class."""
        return None if self.classes is None else self.classes.default

    def policy(self) -> Policy:
        """A new policy."""
        return load(self.deployment.policy, self.rings, self.deployment.sp, self.targets or Slo())

    @property
    def header(self) -> Run:
        """Raises ValueError: there are no records."""
        raise ValueError(f"policy {self.deployment.policy} keeps no records; leave out --record and --chrome-trace")

    def run(
        self,
        arrivals: Iterable[Arrival],
        *,
        ended: Callable[[Timeline], None] | None = None,
        records: bool = False,
        spans: bool = False,
    ) -> Simulation:
        """Serve `arrivals`. Raises ValueError as `serve` does, and if records or spans are wanted."""
        if records or spans:
            _ = self.header
        return serve(arrivals, self.rings, [self.policy() for _ in range(self.deployment.replicas)], ended)

    def dollars_per_million(self, report: Report) -> float | None:
        """US dollars for a million output tokens; None if the devices have no price, or if there were no tokens."""
        each = self.instance.dollars
        return dollars_per_million(None if each is None else each * self.deployment.replicas, report)


@dataclass(frozen=True, slots=True)
class Replica:
    """Instances with a policy of their own. `groups`: its iterations so far."""

    instances: Instances
    policy: Policy
    groups: Groups

    @property
    def pending(self) -> int:
        """The tokens to compute until each of its requests has its next one."""
        return sum(stream.length - stream.computed for stream in (*self.instances.waiting, *self.instances.running))


def serve(
    arrivals: Iterable[Arrival], rings: Rings, policies: Sequence[Policy], ended: Callable[[Timeline], None] | None = None
) -> Simulation:
    """Serve `arrivals`, in the order of their times, to their ends, on a replica for each of `policies`. `ended`: called with the
    timeline of each request that ends; then no timelines are kept. Raises ValueError for a request that does not fit all instances
    of a replica, and if a policy leaves one waiting for ever.
    """
    lines: list[Timeline] = []
    end = lines.append if ended is None else ended
    replicas, number = [Replica(Instances(rings.rooms), policy, Groups()) for policy in policies], count()
    outputs: dict[Stream, tuple[int, Timeline]] = {}
    ends: list[tuple[float, int, int, Iteration]] = []
    coming = iter(arrivals)
    arrival = next(coming, None)
    while arrival is not None or ends:
        now = min(ends[0][0] if ends else inf, arrival.at + rings.front_s if arrival else inf)
        changed: set[int] = set()
        while arrival is not None and arrival.at + rings.front_s <= now:
            stream = Stream(str(next(number)), arrival.at, arrival.prompt_tokens)
            if arrival.prompt_tokens + arrival.output_tokens > sum(rings.rooms):
                raise ValueError(
                    f"a request of {arrival.prompt_tokens + arrival.output_tokens:,} tokens does not fit all instances, which hold "
                    f"{sum(rings.rooms):,}; limit the lengths (--max-total)"
                )
            loads = [replica.pending for replica in replicas] if len(replicas) > 1 else [0]
            chosen = loads.index(min(loads))
            replicas[chosen].instances.arrive(stream)
            changed.add(chosen)
            line = Timeline(
                stream.id,
                arrival.at,
                arrival.prompt_tokens,
                tenant=arrival.tenant,
                service_class=arrival.service_class,
                priority=arrival.priority,
            )
            outputs[stream] = arrival.output_tokens, line
            arrival = next(coming, None)
        while ends and ends[0][0] <= now:
            _, _, chosen, iteration = heapq.heappop(ends)
            replica = replicas[chosen]
            changed.add(chosen)
            for stream in replica.instances.end(iteration):
                most, line = outputs[stream]
                line.tokens.append(now)
                if stream.output == most:
                    replica.instances.leave(stream)
                    line.finished, line.reason = now, "length"
                    end(line)
                    del outputs[stream]
                    replica.policy.ended(stream, now - line.tokens[0])
        for chosen in sorted(changed):
            replica = replicas[chosen]
            for iteration in replica.policy.plan(replica.instances, now):
                seconds = rings.seconds(len(iteration.members), shape(iteration))
                if iteration.moved:
                    seconds += rings.moving(iteration.moved)
                replica.instances.begin(iteration)
                for stream in iteration.chunks:
                    line = outputs[stream][1]
                    line.scheduled = now if line.scheduled is None else line.scheduled
                heapq.heappush(ends, (now + seconds, next(number), chosen, iteration))
                replica.groups.iterations += 1
    if outputs:
        raise ValueError(f"{type(policies[0]).__name__} plans no work for {len(outputs)} requests; they would wait for ever")
    return Simulation([replica.groups for replica in replicas], lines, [], [])


def shape(iteration: Iteration) -> Shape:
    """The tokens before each piece of an iteration, and its own."""
    chunks = [(stream.computed, sum(kept.values())) for stream, kept in iteration.chunks.items()]
    return chunks + [(stream.computed, 1) for stream in iteration.decodes]
