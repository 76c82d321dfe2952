"""What vLLM's v1 scheduler does by default: one token budget, handed out to running requests in the order of their admission, then
to waiting ones. Decodes come first in this order, and prompts fill the rest, so an iteration is as long as its budget makes it.

Held against the real scheduler, iteration by iteration (tests/vllm). It knows neither costs nor targets. Source:
vllm/v1/core/sched/scheduler.py of vLLM 0.32.
"""

from stallfree.core.draft import RUNNING, Draft
from stallfree.core.policy import Reserve


class VllmV1:
    """`token_budget`: `--max-num-batched-tokens`; by default that of vLLM's server on a GPU with much memory.
    `long_prefill_token_threshold`: the most tokens of one request in an iteration, unless it is alone; 0 for no limit.
    """

    reserve: Reserve = "fit"
    stall_free = True
    chunks = True

    def __init__(self, token_budget: int = 8192, long_prefill_token_threshold: int = 0):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        if long_prefill_token_threshold < 0:
            raise ValueError(f"long_prefill_token_threshold is {long_prefill_token_threshold}; it must be at least 0 tokens")
        self.token_budget = token_budget
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.steady = not long_prefill_token_threshold

    def plan(self, draft: Draft) -> None:
        draft.cap(self.token_budget, "fixed token budget")
        running = list(draft.running)
        ready = set(draft.decoding)
        most = self.long_prefill_token_threshold or None
        if len(running) + draft.num_waiting < 2:
            most = None
        for r in running:
            if draft.left <= 0:
                break
            if r.status is not RUNNING or not (r in ready or r.remaining > 0):
                continue
            if not (draft.decode(r) if r in ready else draft.prefill(r, most)):
                if not r.in_flight:
                    draft.preempt(r)  # the last in the order, and KV is short: it gives up its own
                break
        if all(r.status is RUNNING for r in running):
            for r in draft.waiting:
                if not draft.admit(r, most):
                    break
