"""An executor without a model: it sleeps as long as a cost model says and answers with letters. It serves to try policies, load
clients and faults. It knows no tensors, and its tokens depend only on their position.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stallfree.core.plan import Capacity, Plan, Shape, StepResult
from stallfree.core.policy import CostModel


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear cost model: seconds for an iteration, for each of its tokens, and for each token of context before these."""

    iteration_s: float = 0.008
    token_s: float = 0.0004
    context_s: float = 0.0000005

    def seconds(self, shape: Shape) -> float:
        return self.iteration_s + sum(self.token_s * count + self.context_s * start for start, count in shape)


BLOCK_BYTES = 4096
"""Bytes of a KV block in a KV transfer. They are empty, but their transfer takes the time of as many real bytes."""


class SimulatedExecutor:
    """An iteration takes `cost.seconds(plan.shape)` seconds. `letters`: the token ids that it answers with, in turn. `sleep` may be
    replaced by a function that passes another time than real time.
    """

    layout, block_bytes = "simulated", BLOCK_BYTES

    def __init__(self, capacity: Capacity, letters: Sequence[int], cost: CostModel | None = None):
        self.capacity = capacity
        self._letters = letters
        self._cost = cost or Linear()
        self.sleep: Callable[[float], None] = time.sleep
        self._plans: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        plan = self._plans.pop(0)
        seconds = self._cost.seconds(plan.shape)
        self.sleep(seconds)
        tokens = {w.id: (self._letters[(w.start + w.count) % len(self._letters)],) for w in plan.work if w.samples}
        return StepResult(plan.step, tokens, seconds)

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        memory[:] = bytes(len(memory))

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        pass

    def close(self) -> None:
        self._plans.clear()
