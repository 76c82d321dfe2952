"""An executor without a model that has adapters: its loads wait at a gate, and each adapter writes letters of its own."""

import threading
from collections.abc import Sequence

from stallfree.checkpoint.adapter import Adapter
from stallfree.core.plan import Plan, StepResult
from stallfree.executors.simulated import SimulatedExecutor


class Adapting(SimulatedExecutor):
    """An adapter of rank r takes r / 4 blocks. `loaded`: the blocks of each key; `loads`: the keys of all loads. While the `gate`
    is shut, no load ends. `fault`: is raised by the next load."""

    fault: Exception | None = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loads: list[str] = []
        self.loaded: dict[str, Sequence[int]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.used: list[set[str]] = []

    def adapter_blocks(self, adapter: Adapter) -> int:
        return -(-adapter.rank // 4)

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None:
        self.gate.wait()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        adapter.check()
        self.loads.append(key)
        self.loaded[key] = tuple(blocks)

    def drop_adapter(self, key: str) -> None:
        del self.loaded[key]

    def submit(self, plan: Plan) -> None:
        self.used.append({work.adapter for work in plan.work})
        super().submit(plan)

    def collect(self) -> StepResult:
        work = self._plans[0].work
        result = super().collect()
        tokens = {
            w.id: (self._letters[ord(w.adapter[0]) % len(self._letters)],) if w.adapter else result.tokens[w.id]
            for w in work
            if w.samples
        }
        failed = {w.id: f"adapter {w.adapter!r} is not loaded" for w in work if w.adapter and w.adapter not in self.loaded}
        return StepResult(result.step, tokens, result.seconds, failed=failed)
