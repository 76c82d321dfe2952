"""The possible deployments: co-located replicas, pairs of pools, and instances between which requests are cut, move or are spread,
in every split of the devices that the model fits.

Each is a unit of few devices, which is repeated until the devices are used up. It knows no loads; the search finds how good a
candidate is.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Literal, NamedTuple, Self

from stallfree.elastic.policies import POLICIES
from stallfree.perf import hardware as devices
from stallfree.perf import links
from stallfree.perf import shape as models
from stallfree.planner.site import Site, counted
from stallfree.sim import systems
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.movers import MOVERS
from stallfree.sim.simulator import Instance, instance
from stallfree.sim.split import place
from stallfree.sim.systems import Chunk


class Shape(NamedTuple):
    """How the devices of a replica share the model: heads (TP) and layers (PP); or, in a ring of `sp` groups, the tokens."""

    tp: int
    pp: int = 1
    sp: int = 1

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        return cls(deployment.tp, deployment.pp, deployment.sp)

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.tp * self.pp * self.sp


Deployed = Deployment | Split
Kinds = tuple[tuple[Shape, int], tuple[Shape, int]]
"""The shape and the number of the instances of both kinds."""
Kind = Literal["co-located", "pools", "moving"]

PARTS, STAGES, GROUPS = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8), (2, 4, 8)
"""TP, PP and SP that are tried. DistServe (OSDI'24) published placements with 3 of each of the first two."""
MOST_UNITS = 4
"""Most replicas of one pool in a unit: ratios between pools are made of the numbers from 1 to this."""


class Candidates:
    """The deployments that `site` allows. `shapes`: a replica's instance for each shape that the model and the devices fit.
    Raises ValueError for an invalid site, and if nothing fits, with what the largest split lacks.

    A replica that fits in a node is in one. A larger one has one pipeline stage in each of several nodes.
    """

    def __init__(self, site: Site):
        for unit, number in (("GPUs", site.gpus), ("nodes", site.nodes)):
            if number < 1:
                raise ValueError(f"{number} {unit} are too few; give at least 1")
        if site.gpus % site.nodes:
            raise ValueError(f"{site.gpus} GPUs are not evenly on {site.nodes} nodes; give a number of nodes that divides them")
        most = devices.load(site.hardware).node
        if site.per_node > most:
            raise ValueError(f"{site.per_node} GPUs in a node are more than the {most} that {site.hardware} has; give more nodes")
        links.load(site.link)
        self.site = site
        self.shapes: dict[Shape, Instance] = {}
        why: list[str] = []
        for shape in self._possible():
            try:
                self.shapes[shape] = instance(self.replica(shape))
            except ValueError as error:
                why.append(str(error))
        if not self.shapes and len(set(why)) == 1:  # the split is not the reason
            raise ValueError(why[0])
        if not self.shapes:
            raise ValueError(f"no split of {counted(site.gpus, 'GPU')} holds the model: {why[-1]}")

    def _possible(self) -> Iterator[Shape]:
        """The shapes that the devices allow, with layers and heads that come out even; always TP 1. A ring is in one node."""
        site = self.site
        if site.model is None:
            yield Shape(1)
            return
        model = models.load(site.model)
        # A file of fitted times has no pipelines.
        stages = (1,) if site.engine.endswith(".json") else tuple(pp for pp in STAGES if model.num_layers % pp == 0)
        for pp in stages:
            for tp in PARTS:
                in_nodes = tp * pp <= site.per_node or (tp <= site.per_node and pp <= site.nodes)
                if in_nodes and tp * pp <= site.gpus and self._divides(tp):
                    yield Shape(tp, pp)

        if site.engine.endswith(".json") or site.rank is not None:  # they have no prices for a ring
            return
        for sp in GROUPS:
            for tp in PARTS:
                if tp * sp <= site.per_node and self._divides(tp):
                    yield Shape(tp, 1, sp)

    def _divides(self, tp: int) -> bool:
        try:
            models.Sharded(models.load(self.site.model or ""), tp)
        except ValueError:
            return False
        return True

    def replica(self, shape: Shape, policy: str = "sarathi", budget: int | None = None, **more: object) -> Deployment:
        site = self.site
        used = site.per_node if shape.size <= site.per_node else shape.tp
        deployment = Deployment(site.model, site.hardware, *shape, site.weights, site.kv, site.engine, used)
        deployment = replace(deployment, policy=policy, token_budget=budget, max_model_len=site.max_model_len)
        deployment = replace(deployment, tenant_weights=site.tenant_weights)
        deployment = replace(deployment, rank=site.rank, adapter_modules=site.adapter_modules)
        return replace(deployment, **more)  # type: ignore[arg-type]

    def prefill(self, shape: Shape, way: str) -> Deployment:
        """A prefill replica of a pair that works in `way`, a name of `WAYS`."""
        return systems.prefill(self.replica(shape), way, self.shapes[shape].cost)

    def decode(self, shape: Shape, way: str) -> Deployment:
        """A decode replica of a pair that works in `way`."""
        return systems.decode(self.replica(shape), way)

    def split(self, way: str, prefill: Shape, decode: Shape, numbers: tuple[int, int], *, whole: bool = False) -> Split:
        """A unit of so many prefill and decode replicas, on as few nodes as hold it; KV stays in its node if it can. `whole`: on
        all nodes, with KV transfers between any two.
        """
        unit = Split(
            replace(self.prefill(prefill, way), replicas=numbers[0]),
            replace(self.decode(decode, way), replicas=numbers[1]),
            way,
            self.site.link,
            self.site.nodes,
            self.site.per_node,
            near=not whole,
        )
        return unit if whole else self._on_few_nodes(unit)

    def moving(self, mover: str, kinds: Kinds, chunks: tuple[Chunk, Chunk], slo: str) -> Split:
        """A unit of two kinds of instances, each with its chunk size, between which `mover`, a name of `MOVERS`, cuts or moves
        requests by the targets `slo`; on as few nodes as hold it."""
        first, second = (
            systems.chunked(self.replica(shape, slo=slo, replicas=number), chunk)
            for (shape, number), chunk in zip(kinds, chunks, strict=True)
        )
        return self._on_few_nodes(Split(first, second, mover, self.site.link, self.site.nodes, self.site.per_node, near=True))

    def like(self, pair: Split, way: str) -> Split:
        """The pools of `pair`, working in another `way`."""
        numbers = pair.prefill.replicas, pair.decode.replicas
        return self.split(way, Shape.of(pair.prefill), Shape.of(pair.decode), numbers)

    def ratios(self, prefill: Shape, decode: Shape) -> Iterator[tuple[int, int]]:
        """Pairs of numbers of prefill and decode replicas in a unit: small, and without a common divisor."""
        for a in range(1, MOST_UNITS + 1):
            for b in range(1, MOST_UNITS + 1):
                common = any(a % k == 0 == b % k for k in range(2, MOST_UNITS + 1))
                if not common and a * prefill.size + b * decode.size <= self.site.gpus:
                    yield a, b

    def most(self, unit: Deployed) -> int:
        """How many of `unit` the nodes hold; 0 if none."""
        if isinstance(unit, Split):
            return next((n for n in range(self.site.gpus // size(unit), 0, -1) if fits(self._pairs(unit, n))), 0)
        if unit.devices <= self.site.per_node:
            return self.site.nodes * (self.site.per_node // unit.devices)
        return (self.site.nodes // unit.pp) * (self.site.per_node // unit.tp)

    def repeated(self, unit: Deployed, number: int) -> Deployed:
        """`number` of `unit` as one cluster."""
        return self._pairs(unit, number) if isinstance(unit, Split) else together(unit, number)

    def kv_rate(self, unit: Split) -> float:
        """Prompt tokens per second whose KV the links between the nodes of `unit` carry; inf if KV stays in its node."""
        sources, targets = place(unit)
        if unit.near and set(sources) <= set(targets):
            return inf
        site = self.site
        kv = models.Sharded(models.load(site.model or ""), 1, 1, site.weights, site.kv).kv_bytes_per_token
        return len({nodes[0] for nodes in sources}) * links.load(site.link).bandwidth / kv

    def _on_few_nodes(self, unit: Split) -> Split:
        """`unit` on as few nodes as hold it."""
        least = min(self.site.nodes, -(-size(unit) // self.site.per_node))
        fewer = (replace(unit, nodes=nodes) for nodes in range(least, self.site.nodes))
        return next((each for each in fewer if fits(each)), unit)

    def _pairs(self, unit: Split, number: int) -> Split:
        prefill, decode = (replace(pool, replicas=pool.replicas * number) for pool in (unit.prefill, unit.decode))
        return replace(unit, prefill=prefill, decode=decode, nodes=self.site.nodes)


WAYS = ("distserve", "splitwise", "hybrid")
"""The ways in which two pools may work together: the pairings of `sim.pairings`."""


def together(deployment: Deployment, number: int) -> Deployment:
    """`number` replicas. One alone needs no router, and then runs faster in simulation."""
    return deployment if number == 1 else replace(deployment, replicas=number, router="shortest-queue")


def kind(deployed: Deployed) -> Kind:
    """Co-located replicas, pools for prompts and for decodes, or instances between which requests are cut, move or are spread."""
    if isinstance(deployed, Deployment):
        return "moving" if deployed.policy in POLICIES else "co-located"
    return "moving" if deployed.pairing in MOVERS else "pools"


def size(deployed: Deployed) -> int:
    """How many devices a deployment takes."""
    pools = (deployed,) if isinstance(deployed, Deployment) else (deployed.prefill, deployed.decode)
    return sum(pool.replicas * pool.devices for pool in pools)


def fits(split: Split) -> bool:
    """Whether the replicas of a split can be placed on its nodes."""
    try:
        return bool(place(split))
    except ValueError:
        return False


def name(deployed: Deployed) -> str:
    """A deployment's name, such as slo TP2; distserve 2 x TP1 -> 1 x TP2; or taichi 1 x TP2 -> 3 x TP2, 2048/256, with its chunk
    sizes."""
    if isinstance(deployed, Deployment):
        return f"{_policy(deployed)} {_split(deployed)}"
    far = "" if deployed.near else ", KV anywhere"
    pools = (deployed.prefill, deployed.decode)
    if kind(deployed) == "moving":
        far = f", {'/'.join(str(pool.token_budget or pool.policy) for pool in pools)}{far}"
    return f"{deployed.pairing} {' -> '.join(f'{pool.replicas} x {_split(pool)}' for pool in pools)}{far}"


def _policy(pool: Deployment) -> str:
    return pool.policy if pool.token_budget is None else f"{pool.policy}:{pool.token_budget}"


def _split(pool: Deployment) -> str:
    more = (f"-{name}{number}" for name, number in (("PP", pool.pp), ("SP", pool.sp)) if number > 1)
    return f"TP{pool.tp}{''.join(more)}"
