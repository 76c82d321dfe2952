"""Stall-free batching that keeps the number of adapters in an iteration small: a request with another adapter waits while there are
enough of them, and later ones whose adapter is in the batch go before it (adapter clustering; S-LoRA, arXiv 2311.03285, section 4).

Fewer adapters are less to read in each iteration. It does not know what an adapter costs, and it is unfair to rare ones.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class AdapterClusters:
    """`token_budget`: the most tokens in an iteration, including decodes. `clusters`: the most adapters among running requests."""

    reserve: Reserve = "prompt"
    stall_free = True
    chunks = True

    def __init__(self, token_budget: int = 512, clusters: int = 32):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        if clusters < 1:
            raise ValueError(f"clusters is {clusters}; it must be at least 1 adapter")
        self.token_budget, self.clusters = token_budget, clusters

    def plan(self, draft: Draft) -> None:
        draft.decode_all()
        draft.cap(self.token_budget, "fixed token budget")
        for r in draft.prefilling:
            draft.prefill(r)
        adapters = {r.adapter for r in draft.running if r.adapter}
        for r in draft.waiting:
            if r.adapter and r.adapter not in adapters and len(adapters) >= self.clusters:
                continue
            if not draft.admit(r):
                break
            if r.adapter:
                adapters.add(r.adapter)
