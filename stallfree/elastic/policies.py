"""The policies that plan groups of instances, by name. It does not know what an iteration costs."""

from stallfree.core.slo import Slo
from stallfree.elastic.loongserve import LoongServe
from stallfree.elastic.policy import Policy, Prices
from stallfree.elastic.stall_free import StallFree

UNHURRIED_S = 2.0
"""When first tokens are due without a target, in seconds: the limit for the median of Sarathi-Serve (OSDI'24, section 5)."""
POLICIES = {
    "elastic": "Stall-free groups of instances: they grow for a prompt that would be late, and every decode is in every iteration",
    "loongserve": "Groups of instances that form anew for every iteration, with whole prompts (LoongServe, arXiv 2404.09526)",
}
"""The policies, in words."""


def load(name: str, prices: Prices, number: int, targets: Slo) -> Policy:
    """A new policy `name` of `POLICIES` for so many instances. It keeps these `targets` for all requests. Raises ValueError if a
    target is missing."""
    if name == "loongserve":
        return LoongServe(prices, number)
    if targets.tbt is None:
        raise ValueError("policy elastic fills iterations up to a target for TBT; give one: --slo tbt=100ms")
    due = UNHURRIED_S if targets.ttft is None else targets.ttft.seconds
    return StallFree(prices, number, targets.tbt.seconds, lambda stream: due)
