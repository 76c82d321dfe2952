"""The paper's ablation without chunking: decodes first, then as many whole prompts as fit in the same iteration. Unlike `orca`, it
reserves KV for the prompt alone, so growing outputs can cause preemptions.
"""

from stallfree.core.policy import Reserve
from stallfree.policies.orca import Orca


class HybridOnly(Orca):
    reserve: Reserve = "prompt"
