"""What the engine asks of whatever runs the model. It says nothing of devices, files or tensors."""

from typing import Protocol

from stallfree.core.plan import Capacity, Plan, StepResult


class Executor(Protocol):
    """Runs plans in the order of submission.

    `submit` takes a plan of which every block number is below `capacity.num_blocks`; `collect` returns the oldest outstanding
    result and blocks until it is there. At most `capacity.depth` plans are outstanding. Either may raise: the engine then fails
    the requests of that plan and goes on. With `capacity.overlap` a plan may be submitted whose decodes' tokens are `UNKNOWN`: the
    executor puts in what the plan before it samples for the same request. `close` frees what the executor holds; it
    is called once, with nothing outstanding.
    """

    capacity: Capacity

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> StepResult: ...

    def close(self) -> None: ...


class Lost(RuntimeError):
    """What ran the model is gone, and all KV with it; it was started anew."""
