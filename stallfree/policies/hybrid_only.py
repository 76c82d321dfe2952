"""The paper's ablation without chunking: decodes first, then whole prompts in the same iteration, as many as fit. Differs from
`orca` in that KV is reserved for the prompt alone, so that outputs may have to be preempted.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class HybridOnly:
    reserve: Reserve = "prompt"
    stall_free = True

    def plan(self, draft: Draft) -> None:
        for r in draft.decoding:
            draft.decode(r)
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break
