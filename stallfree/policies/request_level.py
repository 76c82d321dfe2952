"""Request-level batching (FasterTransformer): a batch of whole prompts, one iteration for them, then decodes until the last of
them has finished; only then the next batch.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class RequestLevel:
    reserve: Reserve = "max"
    stall_free = True
    steady = True

    def plan(self, draft: Draft) -> None:
        for r in draft.decoding:
            draft.decode(r)
        if draft.running:
            return
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break
