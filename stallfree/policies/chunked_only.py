"""The paper's ablation without hybrid batches: iterations of prompt chunks and of decodes take turns while both have work. So a
decode waits for one chunk, never for a whole prompt.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class ChunkedOnly:
    """`token_budget`: the most prompt tokens in an iteration of chunks."""

    reserve: Reserve = "prompt"
    stall_free = False
    chunks = True

    def __init__(self, token_budget: int = 64):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        self.token_budget = token_budget
        self._chunk_was_last = False

    def plan(self, draft: Draft) -> None:
        if not (self._chunk_was_last and draft.decoding):
            draft.cap(self.token_budget, "fixed token budget")
            for r in draft.prefilling:
                draft.prefill(r)
            for r in draft.waiting:
                if not draft.admit(r):
                    break
        self._chunk_was_last = not draft.empty
        if draft.empty:
            draft.decode_all()
