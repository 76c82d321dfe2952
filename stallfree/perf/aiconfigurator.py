"""Kernels of 2025 and 2026 as aiconfigurator (NVIDIA, Apache-2.0) measured them, priced with the libraries of 2026.

DEVICE_matmul.csv, DEVICE_prefill_attention.csv, DEVICE_decode_attention.csv and DEVICE_all_reduce.csv have the shape of one kernel
in each row, and its milliseconds. What belongs to the measuring and not to the kernel is added here. This module does not know
other formats.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

from stallfree.perf import kernels
from stallfree.perf.hardware import Hardware, profiled
from stallfree.perf.kernels import Attention
from stallfree.perf.point import Point, Row
from stallfree.perf.shape import KV_BYTES, Matrix

YEAR = "2026"
PRODUCT = ("dtype", "m", "n", "k", "ms")
PREFILL = ("kv_cache_dtype", "num_heads", "num_key_value_heads", "batch_size", "prompt_tokens", "ms")
DECODE = ("kv_cache_dtype", "num_heads", "num_key_value_heads", "batch_size", "context", "ms")
REDUCE = ("how", "num_gpus", "bytes", "ms")

DTYPES = {
    "bfloat16": "fp16",
    "float16": "fp16",
    "fp16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8-block",
    "int8_wo": "int8",
    "int4_wo": "int4",
}
"""The precision of weights or KV by its name in these files."""
LARGE = 60e6
"""Bytes of weights from which they come from memory. A benchmark that repeats a product finds smaller ones in the device's
cache."""
LONG = 2048
"""Tokens of a prompt from which its attention is held up by arithmetic."""
CLASSES = {"below 1 MB": 1e6, "below 10 MB": 1e7, "below 50 MB": 5e7, "below 200 MB": 2e8, "from 200 MB": inf}
"""Classes of decodes by the bytes of their KV."""
KV = ("fp16", "fp8")
HOW = ("vllm_graph", "vllm_eager", "nccl")
"""How an all-reduce ran: as an engine in a CUDA graph does it, the same outside of one, and NCCL's by itself."""
OPERATORS = (
    *(f"{dtype}, {size} 60 MB" for dtype in DTYPES for size in ("below", "from")),
    *(f"prefill, {precision} KV, {size} {LONG:,} tokens" for precision in KV for size in ("below", "from")),
    *(f"decode, {precision} KV, {size}" for precision in KV for size in CLASSES),
    *(f"all-reduce, {how}" for how in HOW),
)
"""The names under which errors are taken together."""

HEAD_DIM = 128
"""Of all attention in these files."""
LAUNCHED_S = {"fp8_block": (62e-6, 92e-6)}
"""Products that were launched from Python, not from a graph: the least time of up to 16 tokens, and of more."""
ODD = 2.4
"""Activations of an odd number of tokens are quantised that much slower. Engines pad batches, so it is no part of a price."""


def product(file: Path, row: Row) -> Iterator[Point]:
    """A product of [m, k] and [k, n]. Rows of an unknown dtype are left out."""
    device, dtype = profiled(file.stem.partition("_")[0]), row.cells["dtype"]
    tokens, matrix = row.whole("m"), Matrix(dtype, row.whole("n"), row.whole("k"), DTYPES.get(dtype, ""))
    seconds = row.measured("ms")
    if seconds is None or dtype not in DTYPES:
        return

    def price(device: Hardware) -> float:
        measured = device.kernels(YEAR)
        took = kernels.matmul(device, measured, tokens, matrix).seconds
        if tokens % 2:
            took += (ODD - 1) * kernels.quantise(device, measured, tokens, matrix)
        few, many = LAUNCHED_S.get(dtype, (0.0, 0.0))
        return max(took, few if tokens <= 16 else many)

    yield Point(file.name, device, f"{dtype}, {'from' if matrix.bytes >= LARGE else 'below'} 60 MB", seconds, price)


def left_out(folder: Path) -> dict[tuple[str, str], int]:
    """How many rows of products have no price, by file and dtype."""
    number: Counter[tuple[str, str]] = Counter()
    for file in sorted(folder.rglob("*_matmul.csv")):
        with file.open(newline="", encoding="utf-8-sig") as lines:
            number.update((file.name, row["dtype"]) for row in csv.DictReader(lines) if row.get("dtype") not in (None, *DTYPES))
    return dict(number)


def prefill(file: Path, row: Row) -> Iterator[Point]:
    device, make, batch, precision = _attention(file, row)
    tokens, seconds = row.whole("prompt_tokens"), row.measured("ms")
    if seconds is None:
        return

    def price(device: Hardware) -> float:
        kernel = make(device)
        return kernel.chunks(kernel.alike(batch, tokens))

    size = f"{'from' if tokens >= LONG else 'below'} {LONG:,} tokens"
    yield Point(file.name, device, f"prefill, {precision} KV, {size}", seconds, price)


def decode(file: Path, row: Row) -> Iterator[Point]:
    device, make, batch, precision = _attention(file, row)
    context, seconds = row.whole("context"), row.measured("ms")
    if seconds is None:
        return
    size = batch * context * 2 * row.whole("num_key_value_heads") * HEAD_DIM * KV_BYTES[precision]
    words = next(words for words, most in CLASSES.items() if size < most)
    yield Point(
        file.name, device, f"decode, {precision} KV, {words}", seconds, lambda device: make(device).decodes(batch, batch * context)
    )


def _attention(file: Path, row: Row) -> tuple[Hardware, Callable[[Hardware], Attention], int, str]:
    """The device, the attention on a device, the sequences and the precision of their KV."""
    precision = DTYPES.get(row.cells["kv_cache_dtype"])
    if precision not in KV:
        raise ValueError(f"{row.where}: kv_cache_dtype is {row.cells['kv_cache_dtype']!r}; write bfloat16 or fp8")
    heads, kv_heads = row.whole("num_heads"), row.whole("num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"{row.where}: {heads} heads cannot share {kv_heads} KV heads evenly")
    size = 2 * kv_heads * HEAD_DIM * KV_BYTES[precision]

    def make(device: Hardware) -> Attention:
        known = device.kernels(YEAR).attention
        return Attention(device, known.get(precision, known["fp16"]), heads, kv_heads, HEAD_DIM, size, warm=True)

    return profiled(file.stem.partition("_")[0]), make, row.whole("batch_size"), precision


def reduce(file: Path, row: Row) -> Iterator[Point]:
    """An all-reduce in one node."""
    device, how = profiled(file.stem.partition("_")[0]), row.cells["how"]
    ranks, size, seconds = row.whole("num_gpus", 2), row.number("bytes", 1), row.measured("ms")
    if how not in HOW:
        raise ValueError(f"{row.where}: how is {how!r}; write {', '.join(HOW)}")
    if seconds is None:
        return

    def price(device: Hardware) -> float:
        link = device.link(ranks, device.node)
        if how == "nccl" and link.graph is not None:
            return kernels.nccl(link.graph, ranks, ranks == link.span, size).seconds
        within = kernels.all_reduce(link, ranks, device.node, size, in_step=True).seconds
        outside = link.collective_s if link.graph is None else link.graph.eager_s
        return max(within, outside) if how == "vllm_eager" else within

    yield Point(file.name, device, f"all-reduce, {how}", seconds, price)
