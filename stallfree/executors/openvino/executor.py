"""Runs plans on the CPU: packs an iteration's work into the graph's inputs, checks it, calls the model once, and samples.

It keeps KV tensors and knows nothing about requests between plans.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import openvino as ov

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.adapter import Adapter, module_shapes
from stallfree.checkpoint.families import FAMILIES
from stallfree.core.plan import Capacity, Plan, StepResult, Work
from stallfree.executors.base import KVNumbers
from stallfree.executors.checks import needed_blocks, sift
from stallfree.executors.host_memory import check_memory, check_model
from stallfree.executors.machine import machine
from stallfree.executors.openvino.adapted import AdaptedGraph, Loaded, pack, packed_bytes, shown
from stallfree.executors.openvino.deltas import UNIT
from stallfree.executors.openvino.few import MOST, USUAL, FewTokens, few_tokens, first, obstacle
from stallfree.executors.openvino.graph import INPUTS
from stallfree.executors.openvino.memory import huge_pages
from stallfree.executors.openvino.recipe import KV_FORMATS, Recipe, compute_type
from stallfree.executors.openvino.weights import FORMATS
from stallfree.executors.sampling import Rows, begin_constraints, ready_rows, sample

Packs = Literal["now", "later", "never"]
"""When the graph packs its weights."""

WARMED = (2, 3, 4, 6, 8, 12, 16)
"""Numbers of units of adapters whose kernels are compiled before any request wants them. Others are compiled when they are first
wanted, which takes up to 0.1 s."""
WARM_TOKENS = 64
"""Tokens of the longer of the first two iterations, which nobody asked for."""


class OpenVINOExecutor:
    """The model of `checkpoint`, one iteration at a time (depth 1). A decode with drafts is a small chunk to the runtime.

    `weights`: the format of stored matrices, int8, bf16 or f32. Products of int8 weights are computed in int8, with a scale for
    each group of activations; all else in bf16 if the CPU has it. `kv`: the format of stored keys and values, u8, u4, bf16 or f32;
    `kv_bytes`: memory for them. `max_model_len`: at most the model's own. `threads`: None lets the runtime choose. `folder`: where
    converted weights are kept for the next start. `progress` is called with the number of matrices converted so far, and of all;
    `compiling` before what a few tokens take is compiled, which takes ten seconds, once on a machine. `packs`: when the graph packs
    its weights. "later": the executor is ready before, and everything is computed without the graph meanwhile, whatever `few` says,
    if it can be. "never": it always is, except iterations with adapters.

    Raises what `check` raises, before anything is loaded.
    """

    verifies = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        weights: str = "int8",
        kv: str = "u8",
        kv_bytes: int,
        max_model_len: int | None = None,
        threads: int | None = None,
        folder: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
        compiling: Callable[[], None] = lambda: None,
        packs: Packs = "now",
    ) -> None:
        compute = check(checkpoint, weights, kv, kv_bytes, max_model_len, threads)
        self._vocab_size = checkpoint.config.vocab_size
        max_model_len = max_model_len or checkpoint.config.max_model_len
        self._recipe = Recipe(checkpoint, weights, kv, compute, max_model_len, threads, folder, progress)
        config = checkpoint.config
        takes_few = not obstacle(checkpoint, weights, kv, copies=1 if packs == "never" else 2)
        if not takes_few:
            packs = "now"
        compiled = self._recipe.first_layer() if packs == "never" else self._recipe.compiled()
        cache = compiled.inputs[len(INPUTS) :] * (config.num_layers if packs == "never" else 1)
        # The runtime chooses the block size and the layout: [blocks, KV heads, tokens, numbers]. Quantised caches have their
        # scales in extra columns.
        tails = [tuple(i.get_partial_shape()[axis].get_length() for axis in (1, 2, 3)) for i in cache]
        types = [i.get_element_type() for i in cache]
        self.block_bytes = block_bytes = sum(_num_bytes(tail, type) for tail, type in zip(tails, types, strict=True))
        self.layout = f"openvino {ov.get_version()}, {kv}: " + ", ".join(
            f"{number} x {kind}" for kind, number in Counter(map(str, zip(types, tails, strict=True))).items()
        )
        self.numbers = KVNumbers(kv, config.num_layers, config.num_kv_heads, config.head_dim, heads_first=True)
        num_blocks = kv_bytes // block_bytes
        self.capacity = Capacity(block_size=min(tail[1] for tail in tails), num_blocks=num_blocks, max_model_len=max_model_len)
        if num_blocks < 1:
            size = self.capacity.block_size
            raise ValueError(
                f"{kv_bytes:,} bytes for KV are less than one block of {size} tokens takes, {block_bytes:,}; give more, --kv-memory"
            )
        check_memory(num_blocks * block_bytes)
        # The runtime does not keep the memory behind a tensor alive; this list does.
        self._cache: list[np.ndarray] = []
        self._tensors: list[ov.Tensor] = []
        for tail, i in zip(tails, cache, strict=True):
            self._cache.append(huge_pages(num_blocks * _num_bytes(tail, i.get_element_type())))
            self._tensors.append(ov.Tensor(self._cache[-1], [num_blocks, *tail], i.get_element_type()))
        self._request = None if packs == "never" else self._connected(compiled)
        """Of the graph; None if everything is computed without it."""
        self._results: list[StepResult] = []
        self._adapters: dict[str, Loaded] = {}
        self._adapted: AdaptedGraph | None = None
        self._loading = threading.Lock()
        self._few: FewTokens | None = None
        self._packing: threading.Thread | None = None
        if packs == "now":
            self._pack_weights()
        if takes_few:
            if first():
                compiling()
            source, count = self._recipe.weights(), threads or machine().threads
            with self._recipe.lean():  # scales in float32 are read once
                self._few = few_tokens(source, config, self._cache, self.capacity, count, range(num_blocks))
        self.few, self.most_few = (0, 0) if self._few is None or packs == "never" else (USUAL, MOST)
        if packs != "now" and self._few is None:
            self._request = self._request or self._connected(self._recipe.compiled())
            self._pack_weights()
        elif packs == "never":
            self._recipe.finish()
        elif packs == "later":
            self._packing = threading.Thread(target=self._warm_up_apart, args=(compiled, tails), name="packing weights")
            self._packing.start()

    def submit(self, plan: Plan) -> None:
        """Run the plan, except work that cannot run. Raises ValueError, and changes nothing, if no work can run."""
        started = time.perf_counter()
        work, refused, feed = sift(plan.work, self._packed)
        begin_constraints(work)
        rows = Rows(work)
        logits = self._forward(work, feed, np.array(rows.rows, np.int32))
        sampling = [w for w in work if w.samples]
        ready, deferred = ready_rows(sampling)
        tokens, details, failed = sample(
            logits[rows.of(ready)] if rows.scored or deferred else logits, [sampling[row] for row in ready]
        )
        scores = rows.scores(logits)
        seconds = time.perf_counter() - started
        self._results.append(
            StepResult(plan.step, tokens, seconds, details=details, failed=refused | failed, scores=scores, deferred=deferred)
        )

    def collect(self) -> StepResult:
        return self._results.pop(0)

    def logits(self, work: Sequence[Work]) -> np.ndarray:
        """Run `work`. Returns the logits of all its tokens, [tokens, vocabulary] float32, to measure quality."""
        return self._forward(work, self._packed(work), np.arange(sum(w.count for w in work), dtype=np.int32)).copy()

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        for cache, piece in self._pieces(blocks, memory):
            np.take(cache, blocks, axis=0, out=piece, mode="clip")  # the default mode would make a copy

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        for cache, piece in self._pieces(blocks, memory):
            cache[list(blocks)] = piece

    def adapter_blocks(self, adapter: Adapter) -> int:
        """KV blocks that the adapter takes. Raises ValueError if it was opened for another model."""
        config = self._recipe.config
        if adapter.shapes != module_shapes(config) or len(adapter.pairs) != config.num_layers:
            raise ValueError(
                f"{adapter.path}: the adapter was opened for another model; open it with the configuration of this one"
            )
        return -(-packed_bytes(adapter, self._recipe.compute) // int(self.block_bytes))

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None:
        """Read an adapter into `blocks`. For the first adapter, and for one that changes another module than those before it, this
        also compiles a graph. Raises ValueError for a key in use or blocks that do not fit, and as `Adapter.read` does."""
        with self._loading:
            if key in self._adapters:
                raise ValueError(f"adapter {key!r} is loaded already; drop it first")
            if len(blocks) != (needed := self.adapter_blocks(adapter)):
                raise ValueError(f"adapter {key!r} needs {needed} KV blocks, not {len(blocks)}")
            if min(blocks) < 0 or max(blocks) >= self.capacity.num_blocks:
                raise ValueError(f"adapter {key!r}: a KV block number is outside the {self.capacity.num_blocks} blocks")
            packed = pack(adapter, self._recipe.compute, needed * self.block_bytes).data
            loaded = Loaded(adapter, tuple(blocks))
            graph, modules = self._adapted, adapter.modules
            if graph is None or not modules <= graph.modules:
                modules |= graph.modules if graph else set()
                graph = AdaptedGraph(self._recipe, modules, self._tensors, self._pack)
                self.write_blocks(blocks, packed)
                with self._recipe.lean():
                    self._warm_up(blocks, graph, loaded)
            self.write_blocks(blocks, packed)
            self._adapted, self._adapters[key] = graph, loaded

    def drop_adapter(self, key: str) -> None:
        """Forget an adapter. No plan that uses it may be under way."""
        del self._adapters[key]

    def settle(self) -> None:
        """Wait until the graph has packed its weights, if it does."""
        if self._packing is not None:
            self._packing.join()
            self._packing = None

    def close(self) -> None:
        self.settle()
        if self._few is not None:
            self._few.close()
        del self._request, self._adapted, self._cache, self._tensors

    def _pieces(self, blocks: Sequence[int], memory: memoryview) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each tensor of the cache, [blocks, bytes], with its part of `memory`."""
        values, at = np.frombuffer(memory, np.uint8), 0
        for cache in self._cache:
            each = len(cache) // self.capacity.num_blocks
            yield cache.reshape(-1, each), values[at : at + len(blocks) * each].reshape(-1, each)
            at += len(blocks) * each

    def _connected(self, graph: ov.CompiledModel) -> ov.InferRequest:
        """A request of the graph, with this executor's KV."""
        request = graph.create_infer_request()
        for i, tensor in zip(graph.inputs[len(INPUTS) :], self._tensors, strict=True):
            request.set_tensor(i, tensor)
        return request

    def _pack_weights(self) -> None:
        with self._recipe.lean():
            self._warm_up(range(self.capacity.num_blocks))

    def _warm_up_apart(self, compiled: ov.CompiledModel, tails: Sequence[tuple[int, ...]]) -> None:
        """Pack the weights while requests are served: with KV of its own. The weights stay mapped, because few tokens read them."""
        request = compiled.create_infer_request()
        number = min(self.capacity.num_blocks, -(-WARM_TOKENS // self.capacity.block_size))
        for tail, i in zip(tails, compiled.inputs[len(INPUTS) :], strict=True):
            request.set_tensor(i, ov.Tensor(i.get_element_type(), [number, *tail]))
        self._warm_up(range(number), request=request)

    def _warm_up(
        self,
        blocks: Sequence[int],
        graph: AdaptedGraph | None = None,
        loaded: Loaded | None = None,
        request: ov.InferRequest | None = None,
    ) -> None:
        """The first runs pack weights and compile kernels, so no request should wait for them. Nobody needs what is in `blocks`: KV
        is written there. `request`: one with other KV."""
        size, longest = self.capacity.block_size, self.capacity.max_model_len
        if graph is not None and loaded is not None:
            each = shown(-(-loaded.adapter.rank // UNIT))
            copies = [loaded, *(Loaded(loaded.adapter, loaded.blocks) for _ in range(WARMED[-1] // each - 1))]
            graph.arranged(copies, [1] * len(copies))  # all are read here, before KV is written over the weights
            for number in reversed([number for number in WARMED if 1 < number <= len(copies)]):
                work = [Work("warm-up", 0, 1, True, False, (0,), (blocks[0],), None, "", (), [])] * number
                feed = self._packed(work) | {"sampled_rows": np.arange(number, dtype=np.int32)}
                _infer(graph.request, feed | graph.arranged(copies[:number], [1] * number))
        for count in sorted({1, min(WARM_TOKENS, longest, size * len(blocks))}):
            table = tuple(blocks[: -(-count // size)])
            work = [Work("warm-up", 0, count, True, False, (0,) * count, table, None, "", (), [])]
            feed = self._packed(work) | {"sampled_rows": np.array([count - 1], np.int32)}
            if graph is None:
                _infer(request or self._request, feed)
            else:
                _infer(graph.request, feed | graph.arranged([loaded], [count]))

    def _forward(self, work: Sequence[Work], feed: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Logits of `rows` of packed work, valid until the next call. Only work with adapters pays for them."""
        feed, graph = feed | {"sampled_rows": rows}, self._adapted
        if graph is None or not any(w.adapter for w in work):
            packing = self._packing is not None and self._packing.is_alive()
            if self._few is not None and (self._request is None or packing or len(feed["input_ids"]) <= self.few):
                return self._few.logits(feed)
            return _infer(self._request, feed)
        adapters = [self._adapters[w.adapter] if w.adapter else None for w in work]
        return _infer(graph.request, feed | graph.arranged(adapters, [w.count for w in work]))

    def _pack(self, loaded: Loaded) -> np.ndarray:
        """The bytes in the blocks of an adapter."""
        memory = np.empty(len(loaded.blocks) * self.block_bytes, np.uint8)
        self.read_blocks(loaded.blocks, memory.data)
        return memory

    def _packed(self, work: Sequence[Work]) -> dict[str, np.ndarray]:
        """The graph's inputs. Checks everything, because the runtime would follow a wrong block number outside of its memory."""
        if not work:
            raise ValueError("a plan without work cannot be run")
        if unknown := next((w for w in work if w.adapter and w.adapter not in self._adapters), None):
            what = f"adapter {unknown.adapter!r} is not loaded"
            raise ValueError(f"request {unknown.id}: {what}; load it, or ask for the base model")
        tables = [w.blocks[: needed_blocks(w, self.capacity)] for w in work]
        tokens, blocks = _flat(w.tokens for w in work), _flat(tables)
        starts, counts = _i32(w.start for w in work), _i32(w.count for w in work)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            bad = next(w for w in work if min(w.tokens) < 0 or max(w.tokens) >= self._vocab_size)
            raise ValueError(f"request {bad.id}: a token id is outside the vocabulary of {self._vocab_size}")
        if blocks.min() < 0 or blocks.max() >= self.capacity.num_blocks:
            bad = next(w for w in work if min(w.blocks) < 0 or max(w.blocks) >= self.capacity.num_blocks)
            raise ValueError(f"request {bad.id}: a KV block number is outside the {self.capacity.num_blocks} blocks")
        begins = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
        return {
            "input_ids": tokens,
            "position_ids": np.arange(len(tokens), dtype=np.int32) + np.repeat(starts - begins[:-1], counts),
            "past_lens": starts,
            "subsequence_begins": begins,
            "block_indices": blocks,
            "block_indices_begins": np.cumsum([0, *map(len, tables)], dtype=np.int32),
            "max_context_len": np.array((starts + counts).max(), np.int32),
        }


def check(checkpoint: Checkpoint, weights: str, kv: str, kv_bytes: int, max_model_len: int | None, threads: int | None) -> ov.Type:
    """The number format in which the graph of such an executor computes. Raises ValueError for a bad option, and MemoryError if
    weights and KV do not fit. Nothing is loaded."""
    if not FAMILIES[checkpoint.config.family].openvino:
        known = ", ".join(name for name, family in FAMILIES.items() if family.openvino)
        raise ValueError(f"executor openvino knows {known}, and not {checkpoint.config.family!r}; take --executor torch")
    if weights not in FORMATS:
        raise ValueError(f"weights {weights!r} is unknown; known are {', '.join(FORMATS)}")
    if kv not in KV_FORMATS:
        raise ValueError(f"kv {kv!r} is unknown; known are {', '.join(KV_FORMATS)}")
    longest = checkpoint.config.max_model_len
    if max_model_len is not None and not 0 < max_model_len <= longest:
        raise ValueError(f"max_model_len {max_model_len} is not between 1 and the model's {longest} tokens")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    compute = compute_type(weights, kv)
    check_model(checkpoint, weights, kv, kv_bytes, FORMATS)
    return compute


def _num_bytes(shape: Sequence[int], type: ov.Type) -> int:
    """Bytes of an array of this shape, whose numbers may be halves of a byte."""
    return math.prod(shape) * int(type.bitwidth) // 8


def _infer(request: ov.InferRequest, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Logits, valid until the next call."""
    for name, values in feed.items():
        request.set_tensor(name, ov.Tensor(values, shared_memory=True))
    request.infer()
    logits: np.ndarray = request.get_output_tensor(0).data
    return logits


def _i32(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int32)


def _flat(values: Iterable[Sequence[int]]) -> np.ndarray:
    return _i32(chain.from_iterable(values))
