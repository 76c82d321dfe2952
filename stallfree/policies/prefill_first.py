"""Whole new prompts first, without decodes; decodes run only when no prompt was admitted (vLLM v0's default). Prompts share an
iteration with prompts, never with decodes, so every arrival stalls every stream.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class PrefillFirst:
    reserve: Reserve = "prompt"
    stall_free = False
    steady = True

    def plan(self, draft: Draft) -> None:
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break
        if draft.empty:
            draft.decode_all()
