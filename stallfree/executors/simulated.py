"""An executor without a model: it sleeps as long as a cost model says and answers with letters. It serves to try policies, load
clients and faults. It knows no tensors, and its tokens depend only on their position.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from stallfree.core.plan import Capacity, Plan, Shape, StepResult, Work
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

    layout, block_bytes, verifies = "simulated", BLOCK_BYTES, True

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
        tokens = {w.id: w.verified(self._after(w)) for w in plan.work if w.samples}
        return StepResult(plan.step, tokens, seconds)

    def _after(self, work: Work) -> Iterator[int]:
        """The letters that follow each position of a work from which a token is sampled."""
        first = work.start + (1 if work.decode else work.count)
        return (self._letters[at % len(self._letters)] for at in count(first))

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        memory[:] = bytes(len(memory))

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        pass

    def close(self) -> None:
        self._plans.clear()
