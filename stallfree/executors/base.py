"""The interface between the engine and what runs the model. It says nothing about devices, files or tensors."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from stallfree.checkpoint.adapter import Adapter
from stallfree.core.plan import Capacity, Plan, StepResult, Work


class Executor(Protocol):
    """Runs plans in the order of submission.

    `submit` takes a plan; every block number in it is below `capacity.num_blocks`. `collect` waits for the oldest outstanding
    result and returns it. At most `capacity.depth` plans are outstanding. If either raises, the engine fails the requests of that
    plan and goes on. An error in one piece of work (such as a token id that the model does not have) fails its request alone: the
    executor leaves the piece out, and the result's `failed` says why. With `capacity.overlap`, a decode's token may be `UNKNOWN`:
    the executor inserts the token that the previous plan samples for the same request. `close` frees everything; it is called once,
    with nothing outstanding.
    """

    capacity: Capacity

    def submit(self, plan: Plan) -> None: ...

    def collect(self) -> StepResult: ...

    def close(self) -> None: ...


@runtime_checkable
class MovesKV(Protocol):
    """Optional abilities of an executor: read and write KV blocks as bytes. Both act after all plans submitted before, because such
    a plan may still write for the earlier owner of the blocks.

    `layout` describes the bytes: blocks may move between executors of one model with the same layout and block size. `block_bytes`:
    bytes of one block, over all layers. The bytes of several blocks are in the order of the layers, so they are one piece that
    cannot be split by block. `memory` is writable and holds `len(blocks) * block_bytes` bytes.
    """

    layout: str
    block_bytes: int

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None: ...

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None: ...


class KVNumbers(NamedTuple):
    """How the bytes of `MovesKV` hold numbers. Each of `layers` layers has its keys, then its values: [blocks, `heads`, tokens,
    `size`] with `heads_first`, else [blocks, tokens, `heads`, `size`]. `form`: their format, such as f32, bf16 or fp16. In u8, the
    `size` bytes q of a head and token follow two float32, its scale s and its zero point z: a number is (q - z) * s.
    """

    form: str
    layers: int
    heads: int
    size: int
    heads_first: bool


@runtime_checkable
class NumbersKV(MovesKV, Protocol):
    """Optional ability of an executor that moves KV: it tells how its blocks hold `numbers`. They can be sent with fewer bits."""

    numbers: KVNumbers


@runtime_checkable
class MovesLayers(MovesKV, Protocol):
    """Optional ability of an executor that moves KV: it computes an iteration layer by layer, and moves the KV of some layers.

    `num_layers`: the layers of the model. They share a block's bytes equally.

    `follow`: from now on, `submit` calls `computed(work, layers)` after each layer, for each piece of work of request `id`. Then
    the KV of this work in the first `layers` layers is there, or comes before anything that is submitted later (on a GPU). An
    iteration may also run without these calls. `computed` must not raise; None ends the calls. Any thread may call `follow`.

    `read_layers`: reads these `layers` of `blocks` into `memory`, which holds as many bytes. `computed` may call it, for the layers
    that it was told. The future is done once the bytes are there: on a processor when the call returns, on a GPU later, in
    another thread and in the order of the calls. The blocks must keep their KV until then.

    `write_layers`: the inverse, which acts as `write_blocks` does.
    """

    num_layers: int

    def follow(self, id: str, computed: Callable[[Work, int], None] | None) -> None: ...

    def read_layers(self, blocks: Sequence[int], layers: range, memory: memoryview) -> Future[None]: ...

    def write_layers(self, blocks: Sequence[int], layers: range, memory: memoryview) -> None: ...


class KVLine(Protocol):
    """One end of a line that carries KV from the memory of one executor to that of another, in the order in which it is sent.

    `send`: sends these `layers` of `blocks` once they are computed, as `MovesLayers.read_layers` reads them. The future is done
    when others may write to the blocks. None, and nothing is sent, while too much is under way. One thread calls it.

    `receive`: the next that is sent, `number` blocks. Returns what writes them, as `MovesLayers.write_layers` does, into as many
    blocks. Raises RuntimeError if nothing comes.

    `close`: ends the line. For any thread, and more than once.
    """

    def send(self, blocks: Sequence[int], layers: range) -> Future[None] | None: ...

    def receive(self, number: int, layers: range) -> Callable[[Sequence[int]], None]: ...

    def close(self) -> None: ...


@runtime_checkable
class LinksKV(MovesLayers, Protocol):
    """Optional ability of an executor that moves KV by layers: lines to executors in other processes of this machine.

    `place`: what carries KV, and where its own is, such as "nccl GPU-5a1f"; "" if nothing does. A line is possible between
    different places with the same carrier. `open_line`: the `end` (0 or 1) of a line whose ends meet at the file `path`. Raises
    RuntimeError if the other end does not come. `broken` is called, in any thread, once nothing can be sent any more.
    """

    place: str

    def open_line(self, path: str, end: int, broken: Callable[[], object]) -> KVLine: ...


@runtime_checkable
class Adapts(Protocol):
    """Optional ability of an executor: it runs LoRA adapters, whose weights are in KV blocks. Work names its adapter by a key. Work
    whose key is not loaded fails its request alone, as other bad work does.

    `adapter_blocks`: KV blocks that the adapter takes. Any thread may call it. Raises ValueError if the executor cannot run it.

    `load_adapter`: reads the adapter and writes it into `blocks`, `adapter_blocks` of them. Work may have this `key` afterwards.
    The engine calls it in a thread of its own while plans run, one adapter at a time; the blocks belong to no request and no other
    adapter. Raises OSError or CheckpointError if the adapter cannot be read; then nothing has changed.

    `drop_adapter`: `key` is unknown afterwards, and its blocks belong to others. The engine calls it in its own thread, while no
    plan in flight uses the key.
    """

    def adapter_blocks(self, adapter: Adapter) -> int: ...

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None: ...

    def drop_adapter(self, key: str) -> None: ...


@runtime_checkable
class Verifies(Protocol):
    """Optional ability of an executor: it checks drafts. A decode of more than one token holds guesses after its first token. The
    executor samples at each position in turn, as if it had been given the tokens one by one, until a token is not the guess
    (`Work.verified`). The KV of wrong guesses is written over later.
    """

    verifies: Literal[True]


@runtime_checkable
class TakesFew(Executor, Protocol):
    """Optional ability of an executor: iterations without adapters of at most `few` tokens go another way than the others. It is
    quicker up to some number of tokens, at most `most_few`: `few` may be set to any number up to it, between plans. 0: none do.
    """

    few: int
    most_few: int

    def settle(self) -> None:
        """Wait until iterations take as long as they will from then on."""


@runtime_checkable
class RunsGroups(Executor, Protocol):
    """Optional ability of an executor: instances, any of which may have the KV of any token. Its plans are `GroupPlan`s. Those on
    different instances run at the same time, and `collect` gives the result of the one that ends first. `capacity` has blocks of
    one token.

    `rooms`: the tokens of KV that fit each instance. `move`: all KV of a request that is in no plan goes to one instance. `drop`:
    such a request gives its KV back. `ring`: the first so many instances as an executor by themselves, to time iterations while
    nothing else runs. `wait`: waits until a result is there, or until another thread calls `wake`; returns whether one is there.
    All raise as `collect` does.
    """

    rooms: Sequence[int]

    def move(self, id: str, target: int) -> None: ...

    def drop(self, id: str) -> None: ...

    def ring(self, degree: int) -> Executor: ...

    def wait(self) -> bool: ...

    def wake(self) -> None: ...


class Lost(RuntimeError):
    """The process that ran the model is gone, and all KV with it. The executor has started it again."""
