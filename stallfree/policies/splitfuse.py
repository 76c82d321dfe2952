"""Dynamic SplitFuse (DeepSpeed-FastGen, arXiv 2401.08671): decodes first, then prompts in order, cut so that an iteration has a
fixed total of tokens. A prompt gets a chunk only while there is KV for all of it, and nobody is preempted for it.

It differs from `sarathi` when KV runs short: requests without room wait, and only when none has room does the last one lose its KV,
to be recomputed. It does not know what an iteration costs. Source: mii/batching/ragged_batching.py of DeepSpeed-MII 0.1 and 0.2.
"""

from stallfree.core.draft import RUNNING, Draft
from stallfree.core.policy import Reserve


class Splitfuse:
    """`token_budget`: the fixed total of tokens in an iteration, decodes included; by default that of DeepSpeed-MII."""

    reserve: Reserve = "fit"
    stall_free = True
    steady = True
    chunks = True

    def __init__(self, token_budget: int = 768):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        self.token_budget = token_budget

    def plan(self, draft: Draft) -> None:
        draft.cap(self.token_budget, "fixed token budget")
        self._fill(draft)
        while draft.empty and draft.running and not any(r.in_flight for r in draft.running):
            draft.preempt(draft.running[-1])
            self._fill(draft)

    @staticmethod
    def _fill(draft: Draft) -> None:
        for r in draft.decoding:
            if draft.fits(r):
                draft.decode(r)
        for r in draft.prefilling:
            if r.status is RUNNING:
                if not draft.fits(r):
                    return
                draft.prefill(r)
        for r in draft.waiting:
            if not draft.admit(r):
                return
