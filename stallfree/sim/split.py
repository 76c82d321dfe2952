"""A disaggregated deployment ready to simulate: its pools priced, placed on nodes and joined. It knows no pairing's rules."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from stallfree.core.classes import Classes
from stallfree.core.plan import Shape
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.metrics.report import Report
from stallfree.metrics.timeline import Timeline
from stallfree.perf import hardware as devices
from stallfree.perf import links
from stallfree.perf import shape as models
from stallfree.sim import pairings
from stallfree.sim.deployment import Split
from stallfree.sim.fabric import Port
from stallfree.sim.movers import MOVERS, Machine
from stallfree.sim.moving import Moving
from stallfree.sim.replica import LEAP, Replica
from stallfree.sim.simulate import Simulates, holding, scripted, uncollected
from stallfree.sim.simulator import Instance, Simulator, calibrated, dollars_per_million
from stallfree.sim.transfer import Pools, Totals
from stallfree.workload.workload import Arrival


@dataclass(frozen=True, slots=True)
class PoolsResult:
    """A simulation of two pools. `lines`: the requests' timelines in the order in which they ended; empty if `ended` took them.
    `transfers`: totals of the KV transfers. `prefill_idle`, `decode_idle`: the share of time, from the first arrival to the last
    token, in which the pool's devices had nothing to run.
    """

    lines: list[Timeline] = field(default_factory=list)
    transfers: Totals = field(default_factory=Totals)
    prefill_idle: float = 0.0
    decode_idle: float = 0.0


class SplitSimulator(Simulates):
    """The deployment `split`, ready to run many times. Its pools are on the instances `prefill` and `decode`, or else on those of
    the roofline. Raises ValueError for pools that do not fit the nodes, or that do not serve the same model with the same KV, and
    as `Simulator` does.
    """

    def __init__(self, split: Split, prefill: Instance | None = None, decode: Instance | None = None):
        self.split = split
        for name in ("model", "hardware", "kv"):
            source, target = getattr(split.prefill, name), getattr(split.decode, name)
            if source != target:
                raise ValueError(f"the pools transfer KV, but prefill has {name} {source} and decode {target}; give both the same")
        for name in ("rank", "adapter_modules"):
            source, target = getattr(split.prefill, name), getattr(split.decode, name)
            if source != target:
                raise ValueError(
                    f"each adapter is in both pools, but prefill has {name} {source} and decode {target}; give the same"
                )
        if split.prefill.draft_acceptance is not None or split.decode.draft_acceptance is not None:
            raise ValueError("two pools guess no tokens; leave out --draft-acceptance")
        if "refuse" in (split.prefill.on_late, split.decode.on_late):
            raise ValueError("two pools forecast no first tokens, so none can be refused; leave out --on-late refuse")
        moves = split.pairing in MOVERS
        if moves and any(pool.prefix_cache or pool.rank is not None for pool in (split.prefill, split.decode)):
            raise ValueError(f"{split.pairing} knows no prefix cache and no adapters; leave out --prefix-cache and --rank")
        self.prefill, self.decode = Simulator(split.prefill, prefill), Simulator(split.decode, decode)
        self._where = place(split)
        self._network = links.load(split.link)
        device, model = devices.load(split.prefill.hardware), models.load(split.prefill.model or "")
        whole = models.Sharded(model, 1, 1, split.prefill.weights, split.prefill.kv)
        self.kv_bytes, self._layers = whole.kv_bytes_per_token, model.num_layers
        # Between replicas of one node, each device sends its own part.
        self._within = min(split.prefill.devices, split.decode.devices) * device.link(2, device.node).bandwidth
        if moves:  # KV goes from any replica to any other
            self._where = ((*self._where[0], *self._where[1]),) * 2
            self._prices = [calibrated(pool.instance) for pool in (self.prefill, self.decode)]
        sources, targets = self._where
        others = [[to for to in range(len(targets)) if not (moves and to == number)] for number in range(len(sources))]
        # Replicas on the same nodes have their stages beside each other, if they have the same number of stages.
        near = [[to for to in numbers if split.near and targets[to] == a] for a, numbers in zip(sources, others, strict=True)]
        self._near = [close or numbers for close, numbers in zip(near, others, strict=True)]
        if not moves:
            pairings.load(split.pairing, self._near)

    @property
    def classes(self) -> Classes | None:
        """The targets of each class that requests can name."""
        return self.prefill.classes

    @property
    def max_model_len(self) -> int:
        """The most tokens of a request."""
        return min(pool.instance.capacity.max_model_len for pool in (self.prefill, self.decode))

    @property
    def dollars(self) -> float | None:
        """US dollars per hour for all devices; None if one has no price."""
        pools = (self.prefill, self.decode)
        prices = [(pool.instance.dollars, pool.deployment.replicas) for pool in pools]
        return None if any(price is None for price, _ in prices) else sum((price or 0.0) * number for price, number in prices)

    def dollars_per_million(self, report: Report) -> float | None:
        """US dollars for a million output tokens; None if the devices have no price, or if there were no tokens."""
        return dollars_per_million(self.dollars, report)

    def run(self, arrivals: Iterable[Arrival], *, ended: Callable[[Timeline], None] | None = None) -> PoolsResult:
        """Serve `arrivals`. `ended`: called with the timeline of each request that ends; then no timelines are kept."""
        result = PoolsResult()
        end = result.lines.append if ended is None else ended
        begin, last = inf, 0.0

        def note_end(request: Request) -> None:
            nonlocal begin, last
            line: Timeline = request.sampling.line  # type: ignore[attr-defined]
            begin, last = min(begin, line.arrival), max(last, line.tokens[-1])
            end(line)

        pools = self._pools(note_end)
        with uncollected():
            pools.serve(
                scripted(
                    arrivals,
                    pools.prefill[0].scheduler,
                    self.split.decode.max_output,
                    self.prefill.instance.front_s,
                    self.prefill.named,
                    self.prefill.weights,
                    [pool.instance.shelf for pool in (self.prefill, self.decode) if pool.instance.shelf is not None],
                )
            )
        idle = [1 - sum(_busy(r) for r in pool) / len(pool) / max(last - begin, 1e-9) for pool in (pools.prefill, pools.decode)]
        return PoolsResult(result.lines, pools.transfers, *idle)

    def _pools(self, ended: Callable[[Request], None]) -> Pools | Moving:
        path, latency_s = self._paths()
        replicas = self._replicas(self.prefill), self._replicas(self.decode)
        more: Any = {"kv_bytes": self.kv_bytes, "layers": self._layers, "latency_s": latency_s, "ended": ended}
        if self.split.pairing not in MOVERS:
            return Pools(*replicas, pairings.load(self.split.pairing, self._near), path, **more)
        pools = zip(self._prices, (self.split.prefill, self.split.decode), strict=True)
        kinds = [(cost, pool.token_budget) for cost, pool in pools for _ in range(pool.replicas)]
        machines = [Machine(*kind, near) for kind, near in zip(kinds, self._near, strict=True)]
        targets = self.prefill.targets or Slo()
        mover = MOVERS[self.split.pairing](machines, self.split.prefill.replicas, targets)
        return Moving(*replicas, mover, path, targets=targets, **more)

    def _replicas(self, simulator: Simulator) -> list[Callable[..., Replica]]:
        deployment, instance = simulator.deployment, simulator.instance

        def make(**hooks: Any) -> Replica:
            scheduler = Scheduler(simulator.policy(), instance.capacity, simulator.limits, reuse=deployment.prefix_cache)
            load_s = None if instance.shelf is None else instance.shelf.load_s
            holding(scheduler, instance.shelf)
            # Which cached blocks are evicted depends on the order of all that takes blocks, and others take some during a leap.
            hooks = {"leap": 1 if deployment.prefix_cache else LEAP} | hooks
            return Replica(scheduler, instance.cost, between_s=instance.between_s, load_s=load_s, **hooks)

        return [make] * deployment.replicas

    def _paths(self) -> tuple[Callable[[int, int], tuple[Port, ...]], float]:
        """The ports between two replicas (within a node, their own links; else the nodes' ports), and the latency in seconds."""
        sources, targets = self._where
        out, into = ({nodes[0]: Port(self._network.bandwidth) for nodes in pool} for pool in (sources, targets))
        leaving, coming = ([Port(self._within) for _ in pool] for pool in (sources, targets))

        def path(source: int, target: int) -> tuple[Port, ...]:
            a, b = sources[source], targets[target]
            return (leaving[source], coming[target]) if a == b else (out[a[0]], into[b[0]])

        return path, self._network.latency_s


class _Free:
    """A cost model with iterations that take almost no time."""

    def seconds(self, shape: Shape) -> float:
        return 1e-9


def unlimited(like: Instance) -> Instance:
    """A machine like `like`, but so fast and with so much KV that only the other pool limits the rate."""
    held = like.capacity
    return like._replace(cost=_Free(), capacity=replace(held, num_blocks=20 * held.num_blocks))  # type: ignore[arg-type]


def place(split: Split) -> tuple[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]]:
    """The numbers of the nodes of each prefill and each decode replica. A replica is in one node if it fits, else it has one of its
    pipeline stages in each of several nodes. Both kinds are placed in turn, each where the fewest of its kind are. Raises
    ValueError if they do not fit.

    So replicas of both kinds with as many stages share nodes, if a stage of each fits, and KV stays in its node (DistServe,
    OSDI'24, algorithm 2).
    """
    free = [split.per_node] * split.nodes
    pools = (split.prefill, split.decode)
    placed: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    for _ in range(pools[0].replicas + pools[1].replicas):
        # The pool of which the smaller share is placed comes next.
        kind = min((0, 1), key=lambda k: (len(placed[k]) + 1) / pools[k].replicas if len(placed[k]) < pools[k].replicas else inf)
        size = pools[kind].devices
        number = 1 if size <= split.per_node else max(pools[kind].pp, -(-size // split.per_node))
        each = -(-size // number)
        nodes = _nodes(free, number, each, placed[kind])
        if nodes is None:
            need = sum(pool.devices * pool.replicas for pool in pools)
            raise ValueError(
                f"{pools[0].replicas} prefill replicas of {pools[0].devices} devices and {pools[1].replicas} decode replicas of "
                f"{pools[1].devices} take {need} devices, which do not fit {split.nodes} node{'s' if split.nodes > 1 else ''} of "
                f"{split.per_node}; take fewer"
            )
        for node in nodes:
            free[node] -= each
        placed[kind].append(nodes)
    return placed


def _nodes(free: Sequence[int], number: int, each: int, placed: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """`number` nodes, each with `each` of its devices `free`, where the fewest of `placed` are; None if there are none. They follow
    each other, as other replicas' nodes do, if they can.
    """
    groups = (tuple(range(begin, begin + number)) for begin in range(0, len(free) - number + 1, number))
    fitting = [group for group in groups if all(free[node] >= each for node in group)]
    if fitting:
        return min(fitting, key=placed.count)
    single = [node for node, room in enumerate(free) if room >= each]
    return tuple(single[:number]) if len(single) >= number else None


def _busy(replica: Replica) -> float:
    return sum(replica.busy_s) / len(replica.busy_s)
