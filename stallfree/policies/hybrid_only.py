"""The paper's ablation without chunking: decodes first, then whole prompts in the same iteration, as many as fit. Differs from
`orca` in that KV is reserved for the prompt alone, so that outputs may have to be preempted.
"""

from stallfree.core.policy import Reserve
from stallfree.policies.orca import Orca


class HybridOnly(Orca):
    reserve: Reserve = "prompt"
