"""What could be deployed: co-located replicas and pairs of pools, in every split of the devices that the model fits.

Each is a `unit` of few devices, which is repeated until the devices are used up: what a unit can do, all of them can. It knows no
loads; how good a candidate is, is for the search to find.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stallfree.perf import hardware as devices
from stallfree.perf import links
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Instance, instance

PROMPT_BATCH = 2048
"""Tokens of a batch of prompts in Splitwise (ISCA'24, section 4)."""
SATURATED = 1.05
"""A batch of prompts saturates a device if a token takes at most so many times the least it can."""
MOST_UNITS = 4
"""Most replicas of one pool in a unit: ratios between pools are made of 1 to this."""


class Candidates:
    """What can be deployed on `site`. `shapes`: (TP, PP) that the model fits, each within the devices, and what one replica of it
    is. Raises ValueError for what cannot be, and if nothing fits, with what the largest lacks.
    """

    def __init__(self, site: Site):
        for what, number in (("GPUs", site.gpus), ("nodes", site.nodes)):
            if number < 1:
                raise ValueError(f"{number} {what} cannot be; give at least 1")
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
            # Stages are for models that do not fit a node: within one, TP does the same with less waiting.
            if pp > 1 and (self.shapes or tp < site.per_node):
                continue
            try:
                self.shapes[tp, pp] = instance(self.replica(tp, pp))
            except ValueError as error:
                why.append(str(error))
        if not self.shapes and len(set(why)) == 1:  # it is not for the split
            raise ValueError(why[0])
        if not self.shapes:
            raise ValueError(f"no split of {site.gpus} GPUs holds the model: {why[-1]}")

    def replica(self, tp: int, pp: int, policy: str = "sarathi", budget: int | None = None, **more: object) -> Deployment:
        there = self.site
        told = Deployment(there.model, there.hardware, tp, pp, there.weights, there.kv, there.engine, node=there.per_node)
        told = replace(told, policy=policy, token_budget=budget, max_model_len=there.max_model_len)
        return replace(told, **more)  # type: ignore[arg-type]

    def saturation(self, tp: int, pp: int) -> int:
        """L_m of DistServe (OSDI'24): the fewest tokens of a prefill batch that use a replica well."""
        cost = self.shapes[tp, pp].cost
        per_token = {size: cost.seconds([(0, size)]) / size for size in (128, 256, 512, 1024, 2048, 4096)}
        least = min(per_token.values())
        return min(size for size, seconds in per_token.items() if seconds <= SATURATED * least)

    def prefill(self, shape: tuple[int, int], way: str) -> Deployment:
        """A prefill replica as in `way`, a name of `WAYS`."""
        if way == "hybrid":
            return self.replica(*shape, "sarathi", PROMPT_BATCH)
        batch = PROMPT_BATCH if way == "splitwise" else self.saturation(*shape)
        return self.replica(*shape, "hybrid-only", max_tokens=max(batch, Deployment().max_seqs))

    def decode(self, shape: tuple[int, int], way: str) -> Deployment:
        """A decode replica as in `way`: it serves whole requests too, those that it preempted, or took over; in small chunks if it
        is `hybrid`.
        """
        return self.replica(*shape, "sarathi", 256 if way == "hybrid" else 512)

    def split(
        self, way: str, prefill: tuple[int, int], decode: tuple[int, int], numbers: tuple[int, int], *, whole: bool = False
    ) -> Split:
        """A unit of so many prefill and decode replicas, on as few nodes as hold it, KV staying in its node where it can; or
        `whole`: on all nodes, KV going anywhere.
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
        """The same pools working in another `way`."""
        (a, b), numbers = ((p.tp, p.pp) for p in (pair.prefill, pair.decode)), (pair.prefill.replicas, pair.decode.replicas)
        return self.split(way, a, b, numbers)

    def ratios(self, prefill: tuple[int, int], decode: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Numbers of replicas of a unit, small ones without a common divisor."""
        each = [tp * pp for tp, pp in (prefill, decode)]
        for a in range(1, MOST_UNITS + 1):
            for b in range(1, MOST_UNITS + 1):
                common = any(a % k == 0 == b % k for k in range(2, MOST_UNITS + 1))
                if not common and a * each[0] + b * each[1] <= self.site.gpus:
                    yield a, b


WAYS = ("distserve", "splitwise", "hybrid")
"""How pools may work together: the pairings of `sim.pairings`."""


def size(deployed: Deployment | Split) -> int:
    """Devices that it takes."""
    pools: Sequence[Deployment] = (deployed,) if isinstance(deployed, Deployment) else (deployed.prefill, deployed.decode)
    return sum(pool.replicas * pool.tp * pool.pp for pool in pools)


def name(deployed: Deployment | Split) -> str:
    """In words, as slo TP2, or distserve 2 x TP1 -> 1 x TP2."""
    if isinstance(deployed, Deployment):
        return f"{_policy(deployed)} {_split(deployed)}"
    far = "" if deployed.near else ", KV anywhere"
    pools = (deployed.prefill, deployed.decode)
    return f"{deployed.pairing} {' -> '.join(f'{pool.replicas} x {_split(pool)}' for pool in pools)}{far}"


def _policy(told: Deployment) -> str:
    return told.policy if told.token_budget is None else f"{told.policy}:{told.token_budget}"


def _split(told: Deployment) -> str:
    return f"TP{told.tp}" if told.pp == 1 else f"TP{told.tp}-PP{told.pp}"
