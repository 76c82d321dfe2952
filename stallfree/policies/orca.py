"""Iteration-level batching (Orca, OSDI'22): decodes and whole prompts share iterations. An admission reserves KV for the longest
output. No decode misses an iteration, but a long prompt makes its iteration long.
"""

from stallfree.core.draft import Draft
from stallfree.core.policy import Reserve


class Orca:
    reserve: Reserve = "max"
    stall_free = True
    steady = True

    def plan(self, draft: Draft) -> None:
        draft.decode_all()
        for r in draft.waiting:
            if not draft.admit(r, whole=True):
                break
