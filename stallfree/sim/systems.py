"""Published systems with two kinds of replicas: with which policies and limits each kind works.

It divides the replicas of a deployment among the kinds. How requests get from one to the other, `pairings` and `movers` know.
"""

from dataclasses import replace

from stallfree.core.policy import CostModel
from stallfree.perf import hardware as devices
from stallfree.sim.deployment import Deployment, Split

SYSTEMS = {
    "distserve": "Whole prompts on the first replicas, decodes on the others (DistServe, OSDI'24)",
    "splitwise": "As distserve; KV leaves while it is computed, and busy pools help each other (Splitwise, ISCA'24)",
    "hybrid": "Two pools with chunked prefills in both; the second takes whole requests while the first is busy",
    "taichi": "Large chunks on the first replicas, small ones on the others; streams move between them (TaiChi, arXiv 2508.01989)",
    "dynaserve": "Equal replicas; a request is cut where it balances two of them (DynaServe, arXiv 2504.09285)",
}
"""The systems, in words. A deployment's `policy` may be one of them in `stallfree compare` and `stallfree capacity`."""
PROMPT_BATCH = 2048
"""Most tokens in a batch of prompts, as in Splitwise (ISCA'24, section 4)."""
SATURATED = 1.05
"""A batch of prompts saturates a device if its seconds per token are at most so many times the least possible."""
Chunk = int | None
"""Tokens of an iteration; None: policy `slo` finds them."""
CHUNKS: dict[str, tuple[Chunk, Chunk]] = {"taichi": (1024, 256), "dynaserve": (None, None)}
"""The chunk sizes of the first and of the second kind, of the systems that cut or move requests, if they are not searched."""


def chunked(replica: Deployment, chunk: Chunk) -> Deployment:
    """`replica` with iterations of so many tokens."""
    return replace(replica, policy="slo" if chunk is None else "sarathi", token_budget=chunk)


def saturation(cost: CostModel) -> int:
    """The fewest tokens of a prefill batch that saturate a replica: L_m of DistServe (OSDI'24)."""
    per_token = {size: cost.seconds([(0, size)]) / size for size in (128, 256, 512, 1024, 2048, 4096)}
    least = min(per_token.values())
    return min(size for size, seconds in per_token.items() if seconds <= SATURATED * least)


def prefill(replica: Deployment, system: str, cost: CostModel) -> Deployment:
    """`replica`, whose iterations cost `cost`, as one of the first kind."""
    if system in CHUNKS:
        return chunked(replica, CHUNKS[system][0])
    if system == "hybrid":
        return chunked(replica, PROMPT_BATCH)
    batch = PROMPT_BATCH if system == "splitwise" else saturation(cost)
    return replace(replica, policy="hybrid-only", token_budget=None, max_tokens=max(batch, replica.max_seqs))


def decode(replica: Deployment, system: str) -> Deployment:
    """`replica` as one of the second kind. It also computes prompts: those that it preempted, or took over; in small chunks if the
    system is hybrid."""
    if system in CHUNKS:
        return chunked(replica, CHUNKS[system][1])
    return chunked(replica, 256 if system == "hybrid" else 512)


def split(deployment: Deployment, cost: CostModel) -> Split:
    """The replicas of `deployment`, whose `policy` is one of `SYSTEMS` and whose iterations cost `cost`, as two kinds on as few
    nodes as hold them. Raises ValueError for less than two replicas, and for fields that two kinds do not have.
    """
    system, first, usual = deployment.policy, deployment.prefill_replicas, Deployment()
    for field in ("token_budget", "policy_option", "router"):
        if (value := getattr(deployment, field)) != getattr(usual, field):
            raise ValueError(f"{system} is a system of two kinds of replicas, and has no {field}, which is {value}; leave it out")
    if deployment.replicas < 2:
        raise ValueError(f"{system} is a system of two kinds of replicas; give --replicas 2 or more")
    number = deployment.replicas
    first = number // 2 if first is None else first
    if not 0 < first < number:
        raise ValueError(f"{first} of {number} replicas cannot be of the first kind; give 1 to {number - 1}")
    plain = replace(deployment, policy=usual.policy, prefill_replicas=None)
    pools = replace(prefill(plain, system, cost), replicas=first), replace(decode(plain, system), replicas=number - first)
    node = deployment.node or devices.load(deployment.hardware).node
    nodes = -(-number * deployment.devices // node)
    return Split(*pools, system, nodes=nodes, per_node=node, near=True)
