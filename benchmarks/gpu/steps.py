"""How long does one iteration take? Decodes, prefills and both together, with CUDA graphs and without, in several formats, next to
the least possible time and the prediction of `stallfree.perf`.

Random weights of Llama 3 8B and Llama 2 7B on one GPU; decodes have 2,048 tokens of context, which was computed before. `least` is
the larger of bytes (weights once, the KV of every decode, what chunks write) over the rate of a copy on this device, and operations
over the rate of a large product. For a hybrid iteration it is the sum of its decodes' and its chunk's.

Targets: decodes of 32 and more within 1.35 times the least; prefills at 65 % of the product's rate; 32 decodes and a chunk of 512
within 1.15 times the sum.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu.facts import data_sheet, rates, seconds
from gpu.made import TINY, Absent, checkpoint, config_of, iteration

from stallfree.checkpoint.dimensions import Dimensions
from stallfree.executors.torch import Options
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import BLOCK, Runner
from stallfree.perf.hardware import Hardware
from stallfree.perf.roofline import Roofline
from stallfree.perf.shape import Sharded, load

SHAPES = {
    "1 decode": (1, 0), "32 decodes": (32, 0), "128 decodes": (128, 0), "prefill 512": (0, 512), "prefill 2,048": (0, 2048),
    "prefill 8,192": (0, 8192), "32 decodes + 512": (32, 512),
}  # fmt: skip
"""Decodes, and tokens of a chunk."""
TINY_SHAPES = {"1 decode": (1, 0), "4 decodes": (4, 0), "prefill 64": (0, 64), "4 decodes + 16": (4, 16)}
FEW = ("1 decode", "32 decodes", "prefill 2,048", "32 decodes + 512")
RESERVE = 8 << 30
"""Bytes of the device's memory that are kept free of KV, for activations and graphs."""
PREDICTED = {"bf16": "fp16", "fp8": "fp8", "int8": "int8", "int4": "int4"}
"""Names of the formats in `stallfree.perf`."""

Case = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Side:
    """A model and its formats. `context` is the tokens before each decode."""

    model: Dimensions
    weights: str = "bf16"
    kv: str = "bf16"
    device: str = "cuda"

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.weights}" + f", KV {self.kv}" * (self.kv != "bf16")

    @property
    def context(self) -> int:
        return 2048 if self.device == "cuda" else 40

    @property
    def sharded(self) -> Sharded:
        return Sharded(self.model, weights=PREDICTED[self.weights], kv=PREDICTED[self.kv])

    def shape(self, decodes: int, chunk: int) -> list[tuple[int, int]]:
        return [(self.context, 1)] * decodes + [(0, chunk)] * (chunk > 0)


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        sides = [Side(TINY, device=device), Side(TINY, "int8", device=device)]
        return [*_steps(sides[0], TINY_SHAPES, eager=True), *_steps(sides[1], TINY_SHAPES)]
    few = {name: SHAPES[name] for name in FEW}
    llama3, llama2 = (load(name) for name in ("llama3-8b", "llama2-7b"))
    cases = _steps(Side(llama3), few if quick else SHAPES, eager=True)
    cases += [case for form in ("fp8", "int8", "int4") for case in _steps(Side(llama3, form), few)]
    return cases if quick else [*cases, *_steps(Side(llama3, kv="fp8"), few), *_steps(Side(llama2), SHAPES)]


def _steps(side: Side, shapes: dict[str, tuple[int, int]], eager: bool = False) -> list[Case]:
    """If `eager`, decodes run kernel by kernel first, and as graphs after that, because recorded graphs cannot be dropped."""
    graphs = side.device == "cuda"
    plain = [
        (f"{side.name}, {name}, eager", partial(_step, side, decodes, chunk, False))
        for name, (decodes, chunk) in shapes.items()
        if eager and not chunk
    ]
    return plain + [(f"{side.name}, {name}", partial(_step, side, *what, graphs)) for name, what in shapes.items()]


class Held:
    """The model on the device, one at a time. `filled` counts the decodes whose context was computed."""

    def __init__(self) -> None:
        self._side: Side | None = None
        self._runner: Runner | None = None
        self.recorded, self.filled = False, 0

    def take(self, side: Side) -> Runner:
        """The runner of `side`. If another one is on the device, it is closed first."""
        if self._runner is None or side != self._side:
            if self._runner is not None:
                self._runner.close()
            self._runner, self.recorded, self.filled = None, False, 0
            gc.collect()
            torch.cuda.empty_cache()
            self._runner, self._side = _runner(side), side
        return self._runner


HELD = Held()


def _runner(side: Side) -> Runner:
    config = config_of(side.model, max_model_len=16384)
    device = torch.device(side.device)
    dtype = torch.bfloat16 if side.device == "cuda" else torch.float32
    options = Options(side.weights, side.kv, device=side.device)
    runner = Runner(checkpoint(config, side.device, dtype), options, Alone(), range(config.num_layers), device)
    wanted = iteration(side.shape(128, 8192) if side.device == "cuda" else side.shape(4, 64))[1]
    if side.device == "cuda":
        torch.cuda.empty_cache()
        wanted = min(wanted, (torch.cuda.mem_get_info()[0] - RESERVE) // runner.block_bytes)
    runner.allocate(max(1, wanted))
    return runner


def _step(side: Side, decodes: int, chunk: int, graphs: bool) -> dict[str, Any]:
    shape = side.shape(decodes, chunk)
    work, blocks = iteration(shape, side.model.vocab_size, BLOCK, scattered=False)
    runner = HELD.take(side)
    if blocks > runner.capacity.num_blocks:
        needed, room = (number * runner.block_bytes / 1e9 for number in (blocks, runner.capacity.num_blocks))
        raise Absent(f"needs {needed:.1f} GB of KV, and there is room for {room:.1f} GB")
    for piece in work[HELD.filled : decodes]:  # a decode's context is computed like any prompt
        tokens = tuple(torch.randint(side.model.vocab_size, (side.context,)).tolist())
        runner.run([piece._replace(start=0, count=side.context, tokens=tokens)], [side.context - 1])
    HELD.filled = max(HELD.filled, decodes)
    if graphs and not HELD.recorded:
        runner.record()
        HELD.recorded = True
    rows = [*range(decodes), *([decodes + chunk - 1] if chunk else [])]
    times = seconds(lambda: runner.run(work, rows).argmax(-1).cpu(), side.device)
    taken, floor = statistics.median(times), least(side, decodes, chunk, *rates(side.device))
    row = {"ms": 1e3 * taken, "spread, %": 100 * (max(times) - min(times)) / taken, "times": len(times)}
    row |= {"least, ms": 1e3 * floor, "ms / least": taken / floor}
    sheet = data_sheet(side.device)
    expected = None if sheet is None else predicted(side, shape, sheet)
    return row | {"predicted, ms": expected and 1e3 * expected, "ms / predicted": expected and taken / expected}


def least(side: Side, decodes: int, chunk: int, copy: float, product: float) -> float:
    """Least seconds, from `copy` (bytes per second) and `product` (operations per second)."""
    model, sharded = side.model, side.sharded
    kv, head = sharded.kv_bytes_per_token, 2 * model.vocab_size * model.hidden_size
    weights = model.num_layers * sum(matrix.bytes for matrix in sharded.layer()) + sharded.head().bytes
    linear = model.flops_per_token - head
    total = 0.0
    if decodes:
        attention = decodes * side.context * model.flops_per_pair
        moved = weights + decodes * side.context * kv
        total += max(moved / copy, (decodes * (linear + head) + attention) / product)
    if chunk:
        moved = chunk * kv + (0 if decodes else weights)
        total += max(moved / copy, (chunk * linear + head + model.flops_per_pair * chunk * chunk / 2) / product)
    return total


def predicted(side: Side, shape: list[tuple[int, int]], sheet: Hardware, host: bool = False) -> float:
    """Predicted seconds of the iteration's kernels on the device of this data sheet; with `host`, also the host's part."""
    operators = Roofline(sheet, side.sharded).operators(shape)
    return sum(each.count * each.cost.seconds for each in operators if host or each.name != "host")
