"""Runs plans on the CPU: packs an iteration's work into the graph's inputs, checks it, calls the model once, and samples.

It keeps KV tensors and knows nothing about requests between plans.
"""

import mmap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import openvino as ov

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.families import FAMILIES
from stallfree.core.plan import Capacity, Plan, StepResult, Work
from stallfree.executors.checks import needed_blocks, sift
from stallfree.executors.host_memory import check_memory
from stallfree.executors.openvino.graph import INPUTS, build
from stallfree.executors.openvino.weights import FORMATS, Weights, quantisation_group
from stallfree.executors.sampling import Rows, begin_constraints, ready_rows, sample

KV_FORMATS = {"u8": ov.Type.u8, "bf16": ov.Type.bf16, "f32": ov.Type.f32}
CACHED_PRIMITIVES = 500
"""The most compiled operators that the runtime keeps for shapes it has seen. In 1,200 iterations of up to 320 tokens the process
grew to 740 MB with the runtime's default of 5,000, and to 677 MB with 500. Iterations took as long (docs/performance.md)."""


class OpenVINOExecutor:
    """The model of `checkpoint`, one iteration at a time (depth 1).

    `weights`: the format of stored matrices, int8, bf16 or f32. Products of int8 weights are computed in int8, with a scale for
    each group of activations; all else in bf16 if the CPU has it. `kv`: the format of stored keys and values, u8, bf16 or f32;
    `kv_bytes`: memory for them. `max_model_len`: at most the model's own. `threads`: None lets the runtime choose.

    Raises ValueError for a bad option and MemoryError, before anything is allocated, if the KV cache does not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        weights: str = "int8",
        kv: str = "u8",
        kv_bytes: int,
        max_model_len: int | None = None,
        threads: int | None = None,
    ) -> None:
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
        self._vocab_size = checkpoint.config.vocab_size
        max_model_len = max_model_len or longest
        compute = _compute_type(weights, kv)
        group = quantisation_group(checkpoint.config) if weights == "int8" else 0
        model = build(Weights(checkpoint, weights, group), checkpoint.config, max_model_len)
        compiled = ov.Core().compile_model(model, "CPU", _settings(kv, compute, group, threads))
        self._request = compiled.create_infer_request()
        cache = compiled.inputs[len(INPUTS) :]
        # The runtime chooses the block size and the layout: [blocks, KV heads, tokens, numbers]. Quantised caches have their
        # scales in extra columns.
        tails = [tuple(i.get_partial_shape()[axis].get_length() for axis in (1, 2, 3)) for i in cache]
        types = [i.get_element_type() for i in cache]
        self.block_bytes = block_bytes = sum(int(np.prod(tail)) * type.size for tail, type in zip(tails, types, strict=True))
        self.layout = f"openvino {ov.get_version()}, {kv}: " + ", ".join(
            f"{number} x {kind}" for kind, number in Counter(map(str, zip(types, tails, strict=True))).items()
        )
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
        for tail, i in zip(tails, cache, strict=True):
            self._cache.append(_huge_pages(num_blocks * int(np.prod(tail)) * i.get_element_type().size))
            self._request.set_tensor(i, ov.Tensor(self._cache[-1], [num_blocks, *tail], i.get_element_type()))
        self._results: list[StepResult] = []
        self._warm_up()

    def submit(self, plan: Plan) -> None:
        """Run the plan, except work that cannot run. Raises ValueError, and changes nothing, if no work can run."""
        started = time.perf_counter()
        work, refused, feed = sift(plan.work, self._packed)
        begin_constraints(work)
        rows = Rows(work)
        logits = self._forward(feed, np.array(rows.rows, np.int32))
        sampling = [w for w in work if w.samples]
        ready, deferred = ready_rows(sampling)
        wanted = [rows.sampled[row] for row in ready]
        tokens, details, failed = sample(logits[wanted] if rows.scored or deferred else logits, [sampling[row] for row in ready])
        scores = rows.scores(logits)
        seconds = time.perf_counter() - started
        self._results.append(
            StepResult(plan.step, tokens, seconds, details=details, failed=refused | failed, scores=scores, deferred=deferred)
        )

    def collect(self) -> StepResult:
        return self._results.pop(0)

    def logits(self, work: Sequence[Work]) -> np.ndarray:
        """Run `work`. Returns the logits of all its tokens, [tokens, vocabulary] float32, to measure quality."""
        return self._forward(self._packed(work), np.arange(sum(w.count for w in work), dtype=np.int32)).copy()

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        for cache, piece in self._pieces(blocks, memory):
            np.take(cache, blocks, axis=0, out=piece, mode="clip")  # the default mode would make a copy

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        for cache, piece in self._pieces(blocks, memory):
            cache[list(blocks)] = piece

    def close(self) -> None:
        del self._request, self._cache

    def _pieces(self, blocks: Sequence[int], memory: memoryview) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each tensor of the cache, [blocks, bytes], with its part of `memory`."""
        values, at = np.frombuffer(memory, np.uint8), 0
        for cache in self._cache:
            each = len(cache) // self.capacity.num_blocks
            yield cache.reshape(-1, each), values[at : at + len(blocks) * each].reshape(-1, each)
            at += len(blocks) * each

    def _warm_up(self) -> None:
        """The first runs compile kernels, which takes half a second, so no request should wait for them. The KV that they write is
        written over before it is read."""
        size, longest = self.capacity.block_size, self.capacity.max_model_len
        for count in {1, min(64, longest, size * self.capacity.num_blocks)}:
            blocks = tuple(range(-(-count // size)))
            work = Work("warm-up", 0, count, True, False, (0,) * count, blocks, None, "", (), [])
            self._forward(self._packed([work]), np.array([count - 1], np.int32))

    def _forward(self, feed: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Logits of `rows` of packed work, valid until the next call."""
        for name, values in (feed | {"sampled_rows": rows}).items():
            self._request.set_tensor(name, ov.Tensor(values, shared_memory=True))
        self._request.infer()
        logits: np.ndarray = self._request.get_output_tensor(0).data
        return logits

    def _packed(self, work: Sequence[Work]) -> dict[str, np.ndarray]:
        """The graph's inputs. Checks everything, because the runtime would follow a wrong block number outside of its memory."""
        if not work:
            raise ValueError("a plan without work cannot be run")
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


def _i32(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int32)


def _flat(values: Iterable[Sequence[int]]) -> np.ndarray:
    return _i32(chain.from_iterable(values))


def _settings(kv: str, compute: ov.Type, group: int, threads: int | None) -> dict[str, object]:
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        # If another process keeps a core busy, a thread bound to this core waits in each of hundreds of operators, and the other
        # threads wait for it: a decode takes ten times as long. An unbound thread moves to a free core.
        "ENABLE_CPU_PINNING": False,
        "KV_CACHE_PRECISION": KV_FORMATS[kv],
        "INFERENCE_PRECISION_HINT": compute,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        "CPU_RUNTIME_CACHE_CAPACITY": CACHED_PRIMITIVES,
    }
    if kv == "u8":
        # Keys are quantised by token, like values. By channel, a block's scales would change as it fills, and the logits, too.
        settings["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def _compute_type(weights: str, kv: str) -> ov.Type:
    """The number format in which the graph computes: that of keys and values; with u8, bfloat16 if the CPU has it, or float32."""
    if weights == "f32" and kv == "bf16":
        raise ValueError("kv 'bf16' cannot be combined with weights 'f32'; take kv 'f32' or 'u8'")
    if weights == "f32" or kv == "f32":
        return ov.Type.f32
    if has_bf16():
        return ov.Type.bf16
    if weights == "int8" and kv == "u8":
        return ov.Type.f32
    raise ValueError("this CPU has no bfloat16 arithmetic; take weights 'int8' or 'f32', and kv 'u8' or 'f32'")


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _huge_pages(num_bytes: int) -> np.ndarray:
    """Zeroed memory, in pages of 2 MiB if the system has them. A request's blocks are scattered, so small pages would make
    attention a third slower. The system allocates a page when it is first written."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
