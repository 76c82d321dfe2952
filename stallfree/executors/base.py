"""What the engine asks of whatever runs the model. It says nothing of devices, files or tensors."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from stallfree.core.plan import Capacity, Plan, StepResult


class Executor(Protocol):
    """Runs plans in the order of submission.

    `submit` takes a plan of which every block number is below `capacity.num_blocks`; `collect` returns the oldest outstanding
    result and blocks until it is there. At most `capacity.depth` plans are outstanding. Either may raise: the engine then fails
    the requests of that plan and goes on. What is wrong with one piece of work (a token id that the model does not have) fails
    its request alone: the piece is left out, and the result's `failed` says why. With `capacity.overlap` a plan may be submitted
    whose decodes' tokens are `UNKNOWN`: the executor puts in what the plan before it samples for the same request. `close` frees
    what the executor holds; it is called once, with nothing outstanding.
    """

    capacity: Capacity

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> StepResult: ...

    def close(self) -> None: ...


@runtime_checkable
class MovesKV(Protocol):
    """What an executor can do beside: hand KV blocks out and take them in, as bytes, behind all plans that were submitted before:
    one of them may still write for whoever had the blocks.

    `layout` says how those bytes are to be read: blocks may move between executors of one model with the same layout and block
    size. `block_bytes` are those of one block, all layers together. The bytes of several blocks are in the order of the layers
    first: they are one piece, not to be taken apart. `memory` is writable and holds `len(blocks) * block_bytes`.
    """

    layout: str
    block_bytes: int

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None: ...

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None: ...


class Lost(RuntimeError):
    """What ran the model is gone, and all KV with it; it was started anew."""
