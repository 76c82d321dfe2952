"""Worker (see worker.py): how fast this machine reads memory, bytes/s, and multiplies int8 numbers, operations/s; no batches."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from worker import job, say

BUFFER_BYTES = 256 << 20
# Rows, inner and outer size of the products. They are large, so that a core is used best.
SHAPES = [(512, 1536, 1536), (1024, 1536, 1536), (1024, 2048, 2048), (1024, 1536, 6144), (2048, 3072, 3072)]
WAYS: list[Callable[[np.ndarray], object]] = [
    lambda b: np.dot(b, b),
    lambda b: b.view(np.uint64).min(),
    lambda b: b.view(np.uint8).max(),
]


def best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


def bandwidth(threads: int) -> float:
    """Bytes/s read by all cores at once, each from a buffer of its own."""
    buffers = [np.ones(BUFFER_BYTES // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return max(threads * BUFFER_BYTES / best_seconds(lambda way=way: list(pool.map(way, buffers))) for way in WAYS)


def int8_rate(rows: int, inner: int, outer: int) -> float:
    """Operations/s of one product, float32 activations quantised on the way."""
    weights = np.random.default_rng(3).integers(-127, 128, (outer, inner), np.int8)
    x = ops.parameter([rows, inner], np.float32)
    scales = ops.constant(np.full((outer, 1), 0.01, np.float16))
    w = ops.convert(ops.multiply(ops.convert(ops.constant(weights), np.float16), scales), np.float32)
    model = ov.Model([ops.result(ops.matmul(x, w, False, True))], [x], "product")
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": ov.Type.f32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 192}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ones((rows, inner), np.float32)))
    return 2 * rows * inner * outer / best_seconds(request.infer)


def main() -> None:
    task = job()
    say(version="")
    say(batch="bandwidth", seconds=[bandwidth(task["threads"])])
    say(batch="int8", seconds=[max(int8_rate(*shape) for shape in SHAPES)])


main()
