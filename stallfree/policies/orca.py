"""Iteration-level batching (Orca, OSDI'22): decodes and whole prompts share every iteration, unchunked, and KV is reserved for the
longest output at admission. No decode misses an iteration, but a long prompt makes that iteration long.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class Orca:
    reserve: Reserve = "max"
    stall_free = True
    steady = True

    def plan(self, draft: Draft) -> None:
        for r in draft.decoding:
            draft.decode(r)
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break
