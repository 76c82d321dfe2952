"""The possible deployments: co-located replicas and pairs of pools, in every split of the devices that the model fits.

Each is a unit of few devices, which is repeated until the devices are used up. It knows no loads; the search finds how good a
candidate is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stallfree.perf import hardware as devices
from stallfree.perf import links
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Instance, instance

PROMPT_BATCH = 2048
"""Most tokens in a batch of prompts, as in Splitwise (ISCA'24, section 4)."""
SATURATED = 1.05
"""A batch of prompts saturates a device if its seconds per token are at most so many times the least possible."""
MOST_UNITS = 4
"""Most replicas of one pool in a unit: ratios between pools are made of the numbers from 1 to this."""


class Candidates:
    """The deployments that `site` allows. `shapes`: a replica's instance for each (TP, PP) that the model and the devices fit.
    Raises ValueError for an invalid site, and if nothing fits, with what the largest split lacks.
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
        self.shapes: dict[tuple[int, int], Instance] = {}
        why: list[str] = []
        for pp, tp in ((pp, tp) for pp in (1, 2, 4, 8) for tp in (1, 2, 4, 8) if tp <= site.per_node and tp * pp <= site.gpus):
            # Pipeline stages are for models that do not fit a node. Within a node, TP does the same with less waiting.
            if pp > 1 and (self.shapes or tp < site.per_node):
                continue
            try:
                self.shapes[tp, pp] = instance(self.replica(tp, pp))
            except ValueError as error:
                why.append(str(error))
        if not self.shapes and len(set(why)) == 1:  # the split is not the reason
            raise ValueError(why[0])
        if not self.shapes:
            raise ValueError(f"no split of {site.gpus} GPUs holds the model: {why[-1]}")

    def replica(self, tp: int, pp: int, policy: str = "sarathi", budget: int | None = None, **more: object) -> Deployment:
        site = self.site
        deployment = Deployment(site.model, site.hardware, tp, pp, site.weights, site.kv, site.engine, node=site.per_node)
        deployment = replace(deployment, policy=policy, token_budget=budget, max_model_len=site.max_model_len)
        return replace(deployment, **more)  # type: ignore[arg-type]

    def saturation(self, tp: int, pp: int) -> int:
        """The fewest tokens of a prefill batch that saturate a replica: L_m of DistServe (OSDI'24)."""
        cost = self.shapes[tp, pp].cost
        per_token = {size: cost.seconds([(0, size)]) / size for size in (128, 256, 512, 1024, 2048, 4096)}
        least = min(per_token.values())
        return min(size for size, seconds in per_token.items() if seconds <= SATURATED * least)

    def prefill(self, shape: tuple[int, int], way: str) -> Deployment:
        """A prefill replica of a pair that works in `way`, a name of `WAYS`."""
        if way == "hybrid":
            return self.replica(*shape, "sarathi", PROMPT_BATCH)
        batch = PROMPT_BATCH if way == "splitwise" else self.saturation(*shape)
        return self.replica(*shape, "hybrid-only", max_tokens=max(batch, Deployment().max_seqs))

    def decode(self, shape: tuple[int, int], way: str) -> Deployment:
        """A decode replica of a pair that works in `way`. It also computes prompts: those that it preempted, or took over; in small
        chunks if `way` is hybrid.
        """
        return self.replica(*shape, "sarathi", 256 if way == "hybrid" else 512)

    def split(
        self, way: str, prefill: tuple[int, int], decode: tuple[int, int], numbers: tuple[int, int], *, whole: bool = False
    ) -> Split:
        """A unit of so many prefill and decode replicas, on as few nodes as hold it; KV stays in its node if it can. `whole`: on
        all nodes, with KV transfers between any two.
        """
        size = sum(number * tp * pp for number, (tp, pp) in zip(numbers, (prefill, decode), strict=True))
        nodes = self.site.nodes if whole else min(self.site.nodes, -(-size // self.site.per_node))
        return Split(
            replace(self.prefill(prefill, way), replicas=numbers[0]),
            replace(self.decode(decode, way), replicas=numbers[1]),
            way,
            self.site.link,
            nodes,
            self.site.per_node,
            near=not whole,
        )

    def like(self, pair: Split, way: str) -> Split:
        """The pools of `pair`, working in another `way`."""
        (a, b), numbers = ((p.tp, p.pp) for p in (pair.prefill, pair.decode)), (pair.prefill.replicas, pair.decode.replicas)
        return self.split(way, a, b, numbers)

    def ratios(self, prefill: tuple[int, int], decode: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Pairs of numbers of prefill and decode replicas in a unit: small, and without a common divisor."""
        each = [tp * pp for tp, pp in (prefill, decode)]
        for a in range(1, MOST_UNITS + 1):
            for b in range(1, MOST_UNITS + 1):
                common = any(a % k == 0 == b % k for k in range(2, MOST_UNITS + 1))
                if not common and a * each[0] + b * each[1] <= self.site.gpus:
                    yield a, b


WAYS = ("distserve", "splitwise", "hybrid")
"""The ways in which two pools may work together: the pairings of `sim.pairings`."""


def size(deployed: Deployment | Split) -> int:
    """How many devices a deployment takes."""
    pools: Sequence[Deployment] = (deployed,) if isinstance(deployed, Deployment) else (deployed.prefill, deployed.decode)
    return sum(pool.replicas * pool.tp * pool.pp for pool in pools)


def name(deployed: Deployment | Split) -> str:
    """A deployment's name, such as slo TP2, or distserve 2 x TP1 -> 1 x TP2."""
    if isinstance(deployed, Deployment):
        return f"{_policy(deployed)} {_split(deployed)}"
    far = "" if deployed.near else ", KV anywhere"
    pools = (deployed.prefill, deployed.decode)
    return f"{deployed.pairing} {' -> '.join(f'{pool.replicas} x {_split(pool)}' for pool in pools)}{far}"


def _policy(pool: Deployment) -> str:
    return pool.policy if pool.token_budget is None else f"{pool.policy}:{pool.token_budget}"


def _split(pool: Deployment) -> str:
    return f"TP{pool.tp}" if pool.pp == 1 else f"TP{pool.tp}-PP{pool.pp}"
