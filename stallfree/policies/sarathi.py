"""Stall-free batching with chunked prefills (Sarathi-Serve, OSDI'24, algorithm 3): every ready decode goes into every iteration,
and chunks of prompts fill what is left of one token budget, those begun first. It does not know what an iteration costs.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class Sarathi:
    """`token_budget`: tokens per iteration, decodes included."""

    reserve: Reserve = "prompt"
    stall_free = True
    steady = True

    def __init__(self, token_budget: int = 64):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        self.token_budget = token_budget

    def plan(self, draft: Draft) -> None:
        for r in draft.decoding:
            draft.decode(r)
        draft.cap(self.token_budget, "fixed token budget")
        for r in draft.prefilling:
            draft.prefill(r)
        for r in draft.waiting:
            if not draft.admit(r):
                break
