"""An executor without a model: it sleeps what a cost model says and answers with letters. For a server to try policies, load
clients and faults on; it knows no tensors, and its tokens depend on nothing but their position.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stallfree.core.plan import Capacity, Plan, Shape, StepResult
from stallfree.core.policy import CostModel


@dataclass(frozen=True, slots=True)
class Linear:
    """Seconds for an iteration, for each of its tokens, and for each token of context that those before them left."""

    iteration_s: float = 0.008
    token_s: float = 0.0004
    context_s: float = 0.0000005

    def seconds(self, shape: Shape) -> float:
        return self.iteration_s + sum(self.token_s * count + self.context_s * start for start, count in shape)


BLOCK_BYTES = 4096
"""Of a KV block that is handed to another engine: nothing is in them, but they take the time of as many that hold something."""


class SimulatedExecutor:
    """Takes `cost.seconds(plan.shape)` seconds an iteration. `letters` are the token ids that it answers with, in turn. `sleep` may
    be replaced, by what lets another time than the wall's pass.
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
