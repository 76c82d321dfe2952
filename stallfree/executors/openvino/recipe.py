"""How a checkpoint becomes a compiled graph: number formats, and what the runtime is told. It knows no plans."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import openvino as ov

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.identity import identity
from stallfree.executors.openvino.deltas import Deltas, Group
from stallfree.executors.openvino.graph import build
from stallfree.executors.openvino.kept import Kept
from stallfree.executors.openvino.weights import OWN_GROUP, Weights, quantisation_group

KV_FORMATS = {
    "u8": (ov.Type.u8, ov.Type.u8),
    "u4": (ov.Type.u8, ov.Type.u4),
    "bf16": (ov.Type.bf16, ov.Type.bf16),
    "f32": (ov.Type.f32, ov.Type.f32),
}
"""Number formats of stored keys and of stored values. With u4, keys keep 8 bits: in 4 bits by token they cost 16 % of perplexity,
and in 4 bits by channel 1.7 %, and decodes take longer (docs/log.md)."""
CONVERSION = 1
"""The version of what converted weights are. Another one makes kept copies void."""
CACHED_PRIMITIVES = 500
"""The most compiled operators that the runtime keeps for shapes it has seen. In 1,200 iterations of up to 320 tokens the process
grew to 740 MB with the runtime's default of 5,000, and to 677 MB with 500. Iterations took as long (docs/performance.md)."""


class Recipe:
    """What a graph is made from. `weights` and `kv`: number formats; `compute`: that of the graph's arithmetic. `max_model_len`:
    the most positions. `threads`: None lets the runtime choose. `folder`: where converted weights are kept for the next start; None
    keeps them in memory only. `progress` is called with the number of matrices converted, and of all.

    Graphs from one recipe share their constants: with int8, a second graph of a model with 135 million weights takes 156 MB less
    and half the time. The runtime keeps constants in int8 and f32, so keeping them here takes no memory. It frees those in bf16
    after packing them (217 MB), so these are made anew for each graph.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: str,
        kv: str,
        compute: ov.Type,
        max_model_len: int,
        threads: int | None,
        folder: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self.config, self.compute = checkpoint.config, compute
        self._kv, self._max_model_len, self._threads = kv, max_model_len, threads
        group = quantisation_group(checkpoint.config)
        self._group = {"int8": group, "file": OWN_GROUP}.get(weights, 0)
        self._kept: Kept | None = None
        if folder is not None and weights in ("int8", "file"):
            self._kept = Kept(folder / f"{identity(checkpoint)}-{weights}.kept", f"{CONVERSION} {weights} {group}")
        self._fresh = partial(Weights, checkpoint, weights, group, self._kept, progress)
        self._shared = None if weights == "bf16" else self._fresh()

    def lean(self) -> AbstractContextManager[None]:
        """To compile a graph in, and run it once, which packs its weights; or to arrange them for what does without it: what they
        are made from takes little memory meanwhile, and afterwards only where it is read again."""
        return nullcontext() if self._kept is None else self._kept.lean()

    def compiled(self, groups: Sequence[Group] = ()) -> ov.CompiledModel:
        """The graph, with what adapters add to the products of `groups`."""
        model = build(self.weights(), self.config, self._max_model_len, Deltas(groups, self.compute))
        self.finish()
        return self.compile(model)

    def first_layer(self) -> ov.CompiledModel:
        """The graph of a model of one layer, which shows how the runtime keeps KV."""
        config = replace(self.config, num_layers=1, windows=self.config.windows[:1])
        return self.compile(build(self.weights(), config, self._max_model_len, Deltas((), self.compute)))

    def finish(self) -> None:
        """All weights are made: the next start may read them from the file that keeps them."""
        if self._kept is not None:
            self._kept.finish()

    def weights(self) -> Weights:
        """The constants of a graph."""
        return self._shared or self._fresh()

    def compile(self, model: ov.Model) -> ov.CompiledModel:
        with self.lean():
            return core().compile_model(model, "CPU", self._settings())

    def _settings(self) -> dict[str, object]:
        keys, values = KV_FORMATS[self._kv]
        settings: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            # If another process keeps a core busy, a thread bound to this core waits in each of hundreds of operators, and the
            # other threads wait for it: a decode takes ten times as long. An unbound thread moves to a free core.
            "ENABLE_CPU_PINNING": False,
            "KEY_CACHE_PRECISION": keys,
            "VALUE_CACHE_PRECISION": values,
            "INFERENCE_PRECISION_HINT": self.compute,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self._group,
            "CPU_RUNTIME_CACHE_CAPACITY": CACHED_PRIMITIVES,
        }
        if keys == ov.Type.u8:
            # Keys are quantised by token, like values. By channel, a block's scales would change as it fills, and the logits, too.
            settings["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        return settings


@cache
def core() -> ov.Core:
    """The runtime, one for all graphs. Each gives the thread that uses it first a stack for signals, and takes it away when its
    last graph is gone. Of several that went in the order in which they came, a stack stayed that was no memory any more, and the
    next signal's handler wrote over whatever was there."""
    return ov.Core()


def compute_type(weights: str, kv: str) -> ov.Type:
    """The number format in which the graph computes: that of keys and values; with u8 and u4, bfloat16 if the CPU has it, else
    float32."""
    if weights == "f32" and kv == "bf16":
        raise ValueError("kv 'bf16' cannot be combined with weights 'f32'; take kv 'f32', 'u8' or 'u4'")
    if weights == "f32" or kv == "f32":
        return ov.Type.f32
    if has_bf16():
        return ov.Type.bf16
    if weights in ("file", "int8") and kv in ("u8", "u4"):
        return ov.Type.f32
    raise ValueError("this CPU has no bfloat16 arithmetic; take weights 'file', 'int8' or 'f32', and kv 'u8', 'u4' or 'f32'")


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
