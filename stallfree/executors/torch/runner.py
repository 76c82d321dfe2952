"""One rank: its part of the model and of the KV cache on one device, and the iterations that run on them. It does not know the
other ranks' processes, or who sends the plans.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise

import torch

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.checkpoint.adapter import Adapter
from stallfree.checkpoint.families import FAMILIES
from stallfree.core.plan import Capacity, Work
from stallfree.executors.base import KVNumbers
from stallfree.executors.host_memory import check_memory
from stallfree.executors.machine import machine
from stallfree.executors.torch.adapters import BLOCK, Adapters, Packing
from stallfree.executors.torch.attention import Cache, raw, write
from stallfree.executors.torch.batch import Batch, pack, upload
from stallfree.executors.torch.flash import Flash, choose
from stallfree.executors.torch.graphs import SIZES, Graphs
from stallfree.executors.torch.line import Line
from stallfree.executors.torch.model import Model
from stallfree.executors.torch.parallel import Ranks
from stallfree.executors.torch.placed import Members, Piece, pack_placed, tokens
from stallfree.executors.torch.reader import Reader, copy, parts
from stallfree.executors.torch.striped import Groups, pack_stripes
from stallfree.executors.torch.weights import FORMATS, GROUP, QUANTISED, Weights

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
"""Number formats of keys and values; and of weights, where these are not quantised."""

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Options:
    """`weights`: the format of stored matrices, one of `FORMATS`; if it is quantised, all else is bf16 on a GPU, f32 elsewhere.
    `kv`: the format of keys and values, one of `TYPES`. `max_model_len`: at most the model's own, the default. `threads`: of all
    ranks together (None: the cores of a socket). `memory`: the share of a GPU's memory for weights, KV and an iteration of
    `max_tokens`. `adapters`: record decode iterations with adapters as CUDA graphs, too; without it, they are launched kernel by
    kernel.
    """

    weights: str = "bf16"
    kv: str = "bf16"
    max_model_len: int | None = None
    device: str = "cpu"
    threads: int | None = None
    memory: float = 0.9
    max_tokens: int = 8192
    adapters: bool = False

    def length(self, config: ModelConfig) -> int:
        """The most tokens of a request."""
        return self.max_model_len or config.max_model_len

    @property
    def activations(self) -> torch.dtype:
        """The type of activations, and of all weights that are not quantised."""
        if self.weights in QUANTISED:
            return torch.bfloat16 if self.device == "cuda" else torch.float32
        return TYPES[self.weights]

    def check(self, config: ModelConfig, ranks: int = 1) -> None:
        """Raises ValueError for wrong options, and for options that do not allow `ranks` ranks on this machine."""
        for name, value, known in (("weights", self.weights, FORMATS), ("kv", self.kv, TYPES), ("device", self.device, DEVICES)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; known are {', '.join(known)}")
        longest = config.max_model_len
        if self.max_model_len is not None and not 0 < self.max_model_len <= longest:
            raise ValueError(f"max_model_len {self.max_model_len} is not between 1 and the model's {longest} tokens")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        if not 0 < self.memory <= 1:
            raise ValueError(f"a share of {self.memory:g} of the GPU's memory is impossible; give one above 0 and at most 1")
        if self.device == "cuda":
            self._check_gpus(ranks)

    def _check_gpus(self, ranks: int) -> None:
        gpus = torch.cuda.device_count()
        if not gpus:
            raise ValueError("device 'cuda' is missing: torch finds no GPU; take --device cpu")
        if gpus < ranks:
            raise ValueError(
                f"{ranks} ranks need {ranks} GPUs, and torch finds {gpus}; take a smaller TP, SP or PP, or --device cpu"
            )
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < (8, 0) and "bf16" in (self.weights, self.kv):
            raise ValueError(f"{torch.cuda.get_device_name()} has no bfloat16; take --weights fp16 --kv fp16")
        if (major, minor) < (8, 9) and "fp8" in (self.weights, self.kv):
            raise ValueError(
                f"{torch.cuda.get_device_name()} has no fp8 (its compute capability is {major}.{minor}, and 8.9 is needed); "
                "take --weights int8 and --kv bf16"
            )


class Runner:
    """This rank's part of the `layers` of `checkpoint`, on `device`. `groups`: those over which tokens are spread; None: they are
    not. Raises ValueError if the ranks cannot share the layers, MemoryError if the weights do not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        ranks: Ranks,
        layers: range,
        device: torch.device,
        groups: Groups | None = None,
    ):
        config = checkpoint.config
        check_split(config, ranks.size, options.weights)
        self._length = options.length(config)
        self._options, self._device, self._groups = options, device, groups
        self._kv = TYPES[options.kv]
        parts = Weights(checkpoint, options.weights, options.activations, device, ranks.rank, ranks.size)
        try:
            self._model = _model(config.family)(config, parts, ranks, layers, self._length)
        except torch.OutOfMemoryError:
            raise MemoryError("the weights do not fit the GPU's memory; take fewer bits (--weights), or more GPUs (--tp)") from None
        self._first = layers.start == 0
        self.hidden_size, self.dtype = config.hidden_size, parts.dtype
        self._packing = Packing(config, self.dtype, self._kv.itemsize, ranks.rank, ranks.size)
        self._shape = (BLOCK, self._model.num_kv_heads, config.head_dim)
        self.block_bytes = 2 * len(layers) * BLOCK * self._model.num_kv_heads * config.head_dim * self._kv.itemsize
        self._cache: list[Cache] = []
        self._graphs: Graphs | None = None
        self._flash: Flash | None = None
        self._reader: Reader | None = None
        self.adapters = Adapters(self._packing, layers, device)
        self.capacity = Capacity(BLOCK, 0, self._length)

    def room(self) -> int:
        """Bytes of the GPU's memory that are left for KV. A trial shows what weights and the largest iteration need."""
        torch.cuda.reset_peak_memory_stats(self._device)
        tokens = min(self._options.max_tokens, self._length)
        blocks = -(-tokens // BLOCK)
        self.allocate(blocks)
        work = Work("trial", 0, tokens, True, False, (0,) * tokens, tuple(range(blocks)), None, "", (), ())
        before = None if self._first else torch.zeros(tokens, self.hidden_size, dtype=self.dtype, device=self._device)
        try:
            self.run([work], [tokens - 1], before)
        except torch.OutOfMemoryError:
            raise MemoryError(f"an iteration of {tokens:,} tokens does not fit beside the weights; lower --max-tokens") from None
        needed = torch.cuda.max_memory_allocated(self._device) - blocks * self.block_bytes
        self.close()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)
        return int(total * self._options.memory) - others - needed

    def allocate(self, num_blocks: int, depth: int = 1) -> None:
        """Allocate this many KV blocks. Raises MemoryError if they do not fit."""
        size = num_blocks * self.block_bytes
        if self._device.type == "cpu":
            check_memory(size)
        try:
            self._cache = [(self._blocks(num_blocks), self._blocks(num_blocks)) for _ in self._model.layers]
        except torch.OutOfMemoryError:
            raise MemoryError(f"{size:,} bytes of KV do not fit beside the model; lower --kv-memory") from None
        self.capacity = Capacity(BLOCK, num_blocks, self._length, depth)

    def record(self) -> None:
        """On a GPU: choose the attention, and record decode iterations as CUDA graphs if the model allows it. Attention over
        several groups is neither chosen nor recorded."""
        if self._device.type != "cuda" or self._groups is not None:
            return
        with torch.inference_mode():
            windows = {self._model.config.windows[number] for number in self._model.layers}
            if not self._model.config.sinks:  # FlashInfer's attention has none
                self._flash = choose(self._model.num_heads, self.dtype, self._cache[0][0], windows, self._length)
            if self._model.recordable:
                before = None if self._first else torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self._device)
                adapted = self.adapters.decodes(SIZES[-1]) if self._options.adapters else None
                self._graphs = Graphs(self._call, self.capacity, self.capacity.num_blocks, before, self._device, adapted)

    def run(
        self,
        work: Sequence[Work],
        rows: Sequence[int],
        hidden: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
        computed: Callable[[int], None] = lambda layers: None,
    ) -> torch.Tensor:
        """Run `work`, which the caller has checked (`batch.check`). Returns the logits of `rows`, [rows, vocabulary] float32, or
        the input of the next stage, [tokens, hidden]. `hidden`: the input of this stage; `ahead`: values of the unknown tokens.
        `computed`: see `Model`; a recorded iteration does not call it.
        """
        with torch.inference_mode():
            if self._groups is None:
                batch = pack(work, rows, self.capacity, self._device, ahead)
            else:
                batch, work = pack_stripes(self._groups, work, rows, self.capacity, self._device)
            if (adapted := self.adapters.of(work)) is not None:
                batch = replace(batch, adapted=adapted)
            if self._graphs is not None and self._graphs.takes(batch):
                return self._graphs(batch, hidden)
            if self._flash is not None:
                batch = replace(batch, planned=self._flash.plan(batch))
            return self._call(batch, hidden, computed)

    def run_placed(self, members: Members, pieces: Sequence[Piece], rows: Sequence[int]) -> torch.Tensor:
        """As `run`, for tokens whose KV is in slots of the `members`. The logits are on the first member."""
        with torch.inference_mode():
            return self._call(pack_placed(members, pieces, rows, self._cache, self._device), None)

    def read_slots(self, slots: Sequence[int]) -> torch.Tensor:
        """The KV in `slots`, [keys and values of all layers, slots, KV heads, head size]; fp8 as bytes."""
        at = upload(slots, self._device)
        return torch.stack([raw(tokens(each, at)) for cache in self._cache for each in cache])

    def write_slots(self, slots: Sequence[int], kv: torch.Tensor) -> None:
        """Write what `read_slots` has read."""
        at = upload(slots, self._device)
        for each, part in zip((each for cache in self._cache for each in cache), kv, strict=True):
            write(each, part.view(each.dtype), at)

    def num_tokens(self, work: Sequence[Work]) -> int:
        """How many of the tokens are this rank's own."""
        return sum(w.count if self._groups is None else self._groups.count(w) for w in work)

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        copy(self._tensors(), blocks, memory)

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        self._write(self._tensors(), blocks, memory)

    def read_layers(self, blocks: Sequence[int], layers: range, memory: memoryview) -> Future[None]:
        """See `MovesLayers`."""
        tensors = self._tensors(layers)
        if self._device.type == "cuda":
            self._reader = self._reader or Reader(self._device)
            return self._reader.read(tensors, blocks, memory)
        copy(tensors, blocks, memory)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def write_layers(self, blocks: Sequence[int], layers: range, memory: memoryview) -> None:
        self._write(self._tensors(layers), blocks, memory)

    def open_line(self, path: str, end: int, broken: Callable[[], object]) -> Line:
        """See `LinksKV`."""
        return Line(path, end, self._device, self._tensors, broken)

    def adapter_blocks(self, adapter: Adapter) -> int:
        return self._packing.blocks(adapter)

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None:
        self.adapters.load(key, adapter, blocks, self._cache)

    def drop_adapter(self, key: str) -> None:
        self.adapters.drop(key)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._graphs, self._flash, self._reader, self._cache = None, None, None, []

    def _tensors(self, layers: range | None = None) -> list[torch.Tensor]:
        """The keys and values of `layers` (None: of all), each [blocks, bytes]."""
        caches = self._cache if layers is None else self._cache[layers.start : layers.stop]
        return [tensor.view(torch.uint8).flatten(1) for cache in caches for tensor in cache]

    def _write(self, tensors: Sequence[torch.Tensor], blocks: Sequence[int], memory: memoryview) -> None:
        for cache, piece in parts(tensors, blocks, memory):
            cache[list(blocks)] = piece.to(self._device)

    def _call(
        self, batch: Batch, hidden: torch.Tensor | None, computed: Callable[[int], None] = lambda layers: None
    ) -> torch.Tensor:
        return self._model(batch, hidden, self._cache, computed)

    def _blocks(self, number: int) -> torch.Tensor:
        """Memory for `number` blocks, and a spare one that no request gets: padding of recorded iterations is written there."""
        return torch.zeros(number + 1, *self._shape, dtype=self._kv, device=self._device)


def layout(config: ModelConfig, kv: str, sp: int = 1) -> str:
    """The layout of the whole model's blocks (see `MovesKV`) on `sp` groups. It is the same for all devices, TP and PP."""
    return f"torch {kv}: {2 * config.num_layers} x ({sp * BLOCK}, {config.num_kv_heads}, {config.head_dim})"


def kv_numbers(config: ModelConfig, kv: str) -> KVNumbers:
    """How the whole model's blocks hold numbers."""
    return KVNumbers(kv, config.num_layers, config.num_kv_heads, config.head_dim, heads_first=False)


def use_threads(options: Options, ranks: int = 1) -> None:
    """Set the threads of this process, one of `ranks` that share the processor."""
    if options.device == "cpu":
        torch.set_num_threads(max(1, (options.threads or machine().threads) // ranks))


def check_split(config: ModelConfig, tp: int, weights: str) -> None:
    """Raises ValueError if `tp` ranks cannot share each layer."""
    heads, kv_heads, ffn = config.num_heads, config.num_kv_heads, config.ffn_size
    fits = [n for n in range(1, heads + 1) if not (heads % n or ffn % n or (kv_heads % n and n % kv_heads))]
    if tp not in fits:
        raise ValueError(
            f"TP {tp} does not divide {heads} heads, {kv_heads} KV heads and {ffn} FFN channels; "
            f"it could be {', '.join(map(str, fits))}"
        )
    if tp > 1 and config.qk_norm == "whole":
        raise ValueError(f"TP {tp}: {config.family} normalises all heads of a token together, which ranks do not; take TP 1")
    if weights == "int4" and (config.hidden_size % GROUP or ffn // tp % GROUP or heads * config.head_dim // tp % GROUP):
        raise ValueError(f"int4 needs widths that {GROUP} divides; this model's are not at TP {tp}; take int8")


def stages(layers: int, pp: int) -> list[range]:
    """The layers of each pipeline stage. If they do not divide, the first stages get one more. Raises ValueError for a wrong
    `pp`."""
    if not 1 <= pp <= layers:
        raise ValueError(f"PP {pp} cannot share the model's {layers} layers; take 1 to {layers}")
    each, more = divmod(layers, pp)
    begins = [stage * each + min(stage, more) for stage in range(pp + 1)]
    return [range(a, b) for a, b in pairwise(begins)]


def _model(family: str) -> type[Model]:
    """The class that runs models of `family`."""
    module, _, name = FAMILIES[family].torch.partition(":")
    cls: type[Model] = getattr(import_module(f"stallfree.executors.torch.{module}"), name)
    return cls
