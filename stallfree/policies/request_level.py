"""Request-level batching (FasterTransformer): one iteration computes a batch of whole prompts, then decodes run until the last of
these requests has finished. Only then does the next batch begin.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class RequestLevel:
    reserve: Reserve = "max"
    stall_free = True
    steady = True

    def plan(self, draft: Draft) -> None:
        draft.decode_all()
        if draft.running:
            return
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break
