"""Stall-free batching with chunked prefills (Sarathi-Serve, OSDI'24, algorithm 3): every ready decode goes into every iteration.
Chunks of prompts fill the rest of a token budget, begun prompts first. It does not know what an iteration costs.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class Sarathi:
    """`token_budget`: the most tokens in an iteration, including decodes."""

    reserve: Reserve = "prompt"
    stall_free = True
    steady = True
    chunks = True

    def __init__(self, token_budget: int = 64):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        self.token_budget = token_budget

    def plan(self, draft: Draft) -> None:
        draft.decode_all()
        draft.cap(self.token_budget, "fixed token budget")
        for r in draft.prefilling:
            draft.prefill(r)
        for r in draft.waiting:
            if not draft.admit(r):
                break
