"""What does an iteration of a mixture of experts cost on this processor? One layer of Qwen3-30B-A3B and one of gpt-oss-20b in their
real sizes, with random weights and a small vocabulary; decodes have 512 tokens before them.

Every column is milliseconds an iteration: the median over rounds of the median of three, after one to warm up. Sides take turns in
one process.
- `openvino`: the default (int8 weights, u8 KV).
- `chosen alone`: the same with only as many experts as a token passes. If work is proportional to the chosen experts, one decode
  takes as long with all of them.
- `torch`: the torch executor in bf16, and with int8 weights, which are computed in f32.

    python benchmarks/experts.py

With `--products`, only the first matrices of the experts are multiplied, by tokens that choose at random: `own rows`, as the
executor does it, beside `grouped`, the runtime's operator for all experts (GroupedMatMul). The least of the repetitions counts.

    python benchmarks/experts.py --products
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from harness import machine, parser, show
from openvino import opset13 as ops
from openvino.opset17 import grouped_matmul

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.checkpoint.config import rotary_frequencies
from stallfree.core.plan import Plan, Work
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino.weights import constant
from stallfree.executors.sampling import GREEDY
from stallfree.executors.torch import Options, TorchExecutor
from stallfree.perf import shape as models

MODELS = ("qwen3-30b-a3b", "gpt-oss-20b")
BATCHES = {
    "1 decode": (1, 0), "4 decodes": (4, 0), "16 decodes": (16, 0), "16 decodes + 64": (16, 64), "prefill 256": (0, 256),
}  # fmt: skip
QUICK = ("1 decode", "16 decodes + 64")
TOKENS = (1, 4, 16, 80, 256)
"""Of `products`."""
GROUP = 64
"""Weights that share a scale."""
CONTEXT = 512
KV_BYTES = 256 << 20


def model(name: str, chosen_alone: bool = False) -> Checkpoint:
    """One layer of a built-in model, with only as many experts as a token passes, or all."""
    sizes = replace(models.load(name), num_layers=1, vocab_size=1024, max_model_len=2048)
    if chosen_alone:
        sizes = replace(sizes, experts=sizes.active_experts)
    biased = sizes.family == "gpt_oss"
    config = ModelConfig(
        **asdict(sizes),
        norm_eps=1e-5,
        inv_freq=rotary_frequencies(sizes.head_dim, 10000.0, {}, name),
        windows=(0,),
        qkv_bias=biased,
        output_bias=biased,
    )
    shapes, random = config.tensors(), np.random.default_rng(1).standard_normal(1 << 22, np.float32)

    def read(name: str) -> np.ndarray:
        shape = shapes[name]
        return np.resize(random, shape) * np.float32(shape[-1] ** -0.5)

    return Checkpoint(Path("random"), config, read, None)


def sides(name: str) -> Iterator[tuple[str, Any]]:
    checkpoint = model(name)
    yield "openvino", OpenVINOExecutor(checkpoint, kv_bytes=KV_BYTES)
    yield "chosen alone", OpenVINOExecutor(model(name, chosen_alone=True), kv_bytes=KV_BYTES)
    for weights in ("bf16", "int8"):
        yield f"torch {weights}", TorchExecutor(checkpoint, Options(weights, "bf16"), KV_BYTES)


def plan(decodes: int, chunk: int, block: int) -> Plan:
    random, work, used = np.random.default_rng(2), [], 0
    for start, count in [*[(CONTEXT, 1)] * decodes, *([(0, chunk)] if chunk else [])]:
        blocks = tuple(range(used, used + -(-(start + count) // block)))
        used += len(blocks)
        tokens = tuple(random.integers(3, 1000, count).tolist())
        work.append(Work(str(used), start, count, True, count == 1, tokens, blocks, GREEDY, "", (), []))
    return Plan(0, 0.0, tuple(work))


def seconds(executor: Any, plan: Plan) -> float:
    began = time.perf_counter()
    executor.submit(plan)
    executor.collect()
    return time.perf_counter() - began


def products(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    sizes, random = models.load(name), np.random.default_rng(3)
    count, outs, ins = sizes.experts, 2 * sizes.ffn_size, sizes.hidden_size
    codes = random.integers(-127, 128, (count, outs, ins // GROUP, GROUP), np.int8)
    scales = np.full((count, outs, ins // GROUP, 1), 0.01, np.float32)

    def matrix(codes: np.ndarray, scales: np.ndarray) -> ov.Node:
        restored = ops.multiply(ops.convert(constant(codes), np.float32), constant(scales))
        return ops.reshape(restored, constant([*codes.shape[:-2], ins], np.int64), False)

    requests = {}
    for side in ("own rows", "grouped"):
        rows, numbers = ops.parameter([-1, ins], np.float32), ops.parameter([count], np.int32)
        if side == "grouped":
            y = grouped_matmul(rows, matrix(codes, scales), ops.cumsum(numbers, constant(0, np.int32)))
        else:
            own = ops.variadic_split(rows, constant(0, np.int64), numbers).outputs()
            y = ops.concat([ops.matmul(x, matrix(*of), False, True) for x, *of in zip(own, codes, scales, strict=True)], 0)
        settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP, "ENABLE_CPU_PINNING": False}
        model = ov.Model([ops.result(y)], [rows, numbers], side)
        requests[side] = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    for tokens in TOKENS:
        chosen = np.argsort(random.random((tokens, count)))[:, : sizes.active_experts]
        numbers = np.bincount(chosen.ravel(), minlength=count).astype(np.int32)
        rows = random.standard_normal((chosen.size, ins), np.float32)
        times: dict[str, list[float]] = {side: [] for side in requests}
        for _ in range(rounds + 1):
            for side, request in requests.items():
                began = time.perf_counter()
                request.infer([rows, numbers])
                times[side].append(time.perf_counter() - began)
        least = {side: 1e3 * min(of[1:]) for side, of in times.items()}
        yield {"model": name, "tokens": tokens} | least | {"own rows / grouped": least["own rows"] / least["grouped"]}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", choices=MODELS, action="append", help="one of them; default: each")
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    arguments.add_argument("--products", action="store_true", help="compare two ways to multiply")
    options = arguments.parse_args()
    facts, rows = machine(), []
    if options.products:
        found = [row for name in options.model or MODELS for row in products(name, 3 if options.quick else options.rounds)]
        show("Milliseconds of the first products of a mixture", found, facts, options.json)
        return
    for name in options.model or MODELS:
        executors = dict(sides(name))
        for batch in QUICK if options.quick else BATCHES:
            times: dict[str, list[float]] = {side: [] for side in executors}
            for _ in range(1 if options.quick else options.rounds):
                for side, executor in executors.items():
                    work = plan(*BATCHES[batch], executor.capacity.block_size)
                    times[side].append(statistics.median([seconds(executor, work) for _ in range(4)][1:]))
            medians = {side: 1e3 * statistics.median(of) for side, of in times.items()}
            best = min(medians["torch bf16"], medians["torch int8"])
            rows.append(
                {"model": name, "batch": batch} | medians
                | {"openvino / chosen alone": medians["openvino"] / medians["chosen alone"]}
                | {"openvino / best torch": medians["openvino"] / best}
            )  # fmt: skip
        for executor in executors.values():
            executor.close()
    show("Milliseconds an iteration, one layer", rows, facts, options.json)


if __name__ == "__main__":
    main()
