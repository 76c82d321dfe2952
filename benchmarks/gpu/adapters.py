"""Do adapters give the logits of merged weights on the device, and what do they cost?

Exactness on the small model, for mixed ranks in mixed batches, launched kernel by kernel and recorded. Times on Llama 3 8B with
random weights: an iteration of 32 decodes without adapters, with one for all requests, and with one for each.
"""

import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.facts import seconds
from gpu.made import TINY, checkpoint, config_of, error, iteration
from gpu.models import HYBRID, KV_BYTES, LATER, small
from gpu.steps import Side

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.checkpoint.adapter import MODULES, module_shapes
from stallfree.core.plan import Work
from stallfree.executors.torch import Options, TorchExecutor
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import BLOCK, Runner
from stallfree.perf.shape import load

ALL, ATTENTION = frozenset(MODULES), frozenset(MODULES[:4])
RANKS = {"a": (1, ALL), "": (0, frozenset[str]()), "b": (64, ALL - {"q_proj"}), "c": (5, frozenset({"q_proj", "down_proj"}))}
"""The adapter of each request of the batch: its rank and the modules that it changes."""
LIMITS = {"f32": 1e-4, "bf16": 0.06}
DECODED = [(end, 1) for end in (200, 1, 33, 64)]

Case = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Drawn:
    """Stands for an `Adapter` of the model of `config`; its random weights are drawn when they are read."""

    config: ModelConfig = field(repr=False)
    rank: int
    modules: frozenset[str]
    path: Path = Path("random")

    def read(self, module: str, layers: range) -> tuple[np.ndarray, np.ndarray]:
        pairs = [_draw(self.config, self.rank, layer, module) for layer in layers]
        return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])


@cache
def _draw(config: ModelConfig, rank: int, layer: int, module: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B: they change an output by about half of what the base model gives."""
    draw, (out, inner) = np.random.default_rng((rank, layer, MODULES.index(module))), module_shapes(config)[module]
    a, b = (draw.standard_normal(shape, np.float32) for shape in ((rank, inner), (out, rank)))
    return a * np.float32(inner**-0.5), b * np.float32(0.5 * rank**-0.5)


class Alike(Drawn):
    """The same weights in each layer: for times, because drawing takes longer than the iterations."""

    def read(self, module: str, layers: range) -> tuple[np.ndarray, np.ndarray]:
        return super().read(module, range(1))


def cases(device: str, quick: bool) -> list[Case]:
    kinds = [("f32", False), ("f32", True), ("bf16", False), ("bf16", True)] if device == "cuda" else [("f32", False)]
    cases: list[Case] = [(f"logits, {form}" + ", graphs" * graphs, partial(_exact, device, form, graphs)) for form, graphs in kinds]
    side = Side(load("llama3-8b") if device == "cuda" else TINY, device=device)
    decodes, chunk = (32, 512) if device == "cuda" else (4, 16)
    sets: dict[str, tuple[int, int, frozenset[str]]] = {"none": (0, 1, ALL), "1 of rank 16": (1, 16, ALL)}
    for rank in (8, 16):
        sets[f"{decodes} of rank {rank}, attention"] = (decodes, rank, ATTENTION)
        sets[f"{decodes} of rank {rank}"] = (decodes, rank, ALL)
    for name, which in sets.items():
        cases.append((f"{side.name}, {decodes} decodes, {name}", partial(_step, side, which, decodes, 0)))
    for name in ("none", f"{decodes} of rank 16"):
        cases.append((f"{side.name}, {decodes} decodes + {chunk}, {name}", partial(_step, side, sets[name], decodes, chunk)))
    return [*cases, (f"{side.name}, {decodes} decodes, none, while another thread loads rank 16", partial(_loading, side, decodes))]


def _exact(device: str, form: str, graphs: bool) -> dict[str, Any]:
    """The logits' error for prompts and for what follows, against models with merged weights on the processor in float32."""
    config = small(device)
    executor = TorchExecutor(
        checkpoint(config), Options(form, form, device=device, threads=1, adapters=graphs), KV_BYTES, overlap=False
    )
    whole, begun, decoded = (iteration(shape, config.vocab_size)[0] for shape in (LATER, HYBRID, DECODED))
    batches = [
        [piece._replace(blocks=later.blocks, adapter=key) for piece, later, key in zip(batch, whole, RANKS, strict=True)]
        for batch in (begun, decoded if graphs else whole)
    ]
    _load(executor, {key: Drawn(config, *of) for key, of in RANKS.items() if key}, max(max(w.blocks) for w in whole) + 1)
    logits = [executor.logits(batch) for batch in batches]
    executor.close()
    expected = [[_merged(device, *RANKS[w.adapter]).logits([w._replace(adapter="")]) for w in batch] for batch in batches]
    apart = [error(torch.from_numpy(a), torch.from_numpy(np.concatenate(b))) for a, b in zip(logits, expected, strict=True)]
    return {"error": max(apart), "limit": LIMITS[form]}


@cache
def _merged(device: str, rank: int, modules: frozenset[str]) -> TorchExecutor:
    """The small model on the processor, with W + B A for an adapter's W."""
    config = small(device)
    model, adapter = checkpoint(config), Drawn(config, rank, modules)

    def read(name: str) -> Any:
        values, parts = model.read(name), name.split(".")
        if not name.endswith("_proj.weight") or parts[-2] not in modules:
            return values
        layer = int(parts[2])
        (a,), (b,) = adapter.read(parts[-2], range(layer, layer + 1))
        return values + torch.from_numpy(b @ a)

    return TorchExecutor(replace(model, read=read), Options("f32", "f32", threads=1), KV_BYTES)


def _load(runner: Any, adapters: dict[str, Any], first: int) -> int:
    """Load them into the blocks from `first` on. Returns the first block after them."""
    for key, adapter in adapters.items():
        end = first + runner.adapter_blocks(adapter)
        runner.load_adapter(key, adapter, range(first, end))
        first = end
    return first


class Held:
    """The model for the times, with the contexts of its decodes. `used` counts their blocks."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self.used = 0
        self.keys: list[str] = []

    def take(self, side: Side, decodes: int, chunk: int) -> Runner:
        if self._runner is None:
            gc.collect()
            config = config_of(side.model, max_model_len=16384)
            cuda = side.device == "cuda"
            model: Checkpoint = checkpoint(config, side.device, torch.bfloat16 if cuda else torch.float32)
            options = Options(device=side.device, adapters=True)
            self._runner = Runner(model, options, Alone(), range(config.num_layers), torch.device(side.device))
            work, self.used = iteration(side.shape(decodes, chunk), side.model.vocab_size, BLOCK, scattered=False)
            largest = Drawn(config, 16, ALL)
            self._runner.allocate(self.used + decodes * self._runner.adapter_blocks(largest))  # type: ignore[arg-type]
            for piece in work[:decodes]:
                tokens = tuple(torch.randint(side.model.vocab_size, (side.context,)).tolist())
                self._runner.run([piece._replace(start=0, count=side.context, tokens=tokens)], [side.context - 1])
            self._runner.record()
        return self._runner


HELD = Held()


def _step(side: Side, which: tuple[int, int, frozenset[str]], decodes: int, chunk: int) -> dict[str, Any]:
    number, rank, modules = which
    runner = HELD.take(side, decodes, 512 if side.device == "cuda" else 16)
    for key in HELD.keys:
        runner.drop_adapter(key)
    adapter = Alike(config_of(side.model, max_model_len=16384), rank, modules)
    HELD.keys = [str(i) for i in range(number)]
    end = _load(runner, dict.fromkeys(HELD.keys, adapter), HELD.used)
    work: list[Work] = [
        w._replace(adapter=HELD.keys[i % number] if number else "")
        for i, w in enumerate(iteration(side.shape(decodes, chunk), side.model.vocab_size, BLOCK, scattered=False)[0])
    ]
    rows = [*range(decodes), *([decodes + chunk - 1] if chunk else [])]
    times = seconds(lambda: runner.run(work, rows).argmax(-1).cpu(), side.device)
    taken = statistics.median(times)
    row: dict[str, Any] = {"ms": 1e3 * taken, "spread, %": 100 * (max(times) - min(times)) / taken}
    return row | {"adapters, MB": (end - HELD.used) * runner.block_bytes / 1e6}


def _loading(side: Side, decodes: int) -> dict[str, Any]:
    """Iterations without adapters while a thread loads some. Their weights are in memory, so no disk is measured."""
    runner = HELD.take(side, decodes, 512 if side.device == "cuda" else 16)
    for key in HELD.keys:
        runner.drop_adapter(key)
    HELD.keys = [str(i) for i in range(min(8, decodes))]
    adapter = Alike(config_of(side.model, max_model_len=16384), 16, ALL)
    loads: list[float] = []

    def load() -> None:
        first = HELD.used
        for key in HELD.keys:
            began = time.perf_counter()
            first = _load(runner, {key: adapter}, first)
            loads.append(time.perf_counter() - began)

    work, _ = iteration(side.shape(decodes, 0), side.model.vocab_size, BLOCK, scattered=False)
    times = []
    runner.run(work, range(decodes)).argmax(-1).cpu()
    thread = threading.Thread(target=load)
    thread.start()
    while thread.is_alive():
        began = time.perf_counter()
        runner.run(work, range(decodes)).argmax(-1).cpu()
        times.append(time.perf_counter() - began)
    thread.join()
    row = {"ms": 1e3 * statistics.median(times), "spread, %": 100 * (max(times) - min(times)) / statistics.median(times)}
    return row | {"longest, ms": 1e3 * max(times), "load, ms": 1e3 * statistics.median(loads)}
