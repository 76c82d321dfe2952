"""Does attention over the paged cache match float64? For the Triton kernel, and for FlashInfer where it is installed, on mixed
batches of many shapes. The error is that of the worst row (one token and head).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu.made import Absent, error, iteration, need_cuda

from stallfree.core.plan import Capacity
from stallfree.executors.torch.attention import reference
from stallfree.executors.torch.batch import pack
from stallfree.executors.torch.flash import Flash
from stallfree.executors.torch.kernels import paged_attention

SHAPES = {
    "hybrid": [(90, 1), (33, 20), (0, 5), (2000, 1), (0, 130), (15, 1), (700, 257), (16, 1)],
    "decodes": [(5, 1), (100, 1), (0, 1), (16, 1), (1500, 1), (15, 1)],
    "chunks": [(0, 40), (30, 17), (64, 64), (0, 700), (1000, 300)],
    "long": [(16000, 1), (8191, 1)],
    "many": [(37 * i % 500, 1) for i in range(300)],
}
"""(start, count) of each piece of work."""
SMALL_SHAPES = {"hybrid": [(30, 1), (17, 6), (0, 5)], "decodes": [(5, 1), (40, 1)]}
"""For Triton's interpreter. It multiplies the bits of bfloat16 instead of the numbers, so it gets float32 and float16."""
LLAMA = (32, 8, 128)
HEADS = (LLAMA, (32, 32, 128), (28, 4, 128), (9, 3, 64), (14, 2, 64), (8, 1, 64), (4, 2, 96), (71, 1, 64), (4, 2, 32))
"""Heads, KV heads, head size: of Llama 3 and 2, Qwen2.5 7B, SmolLM2, Qwen2.5 0.5B; one KV head; sizes that are no power of two."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32, "fp8": torch.float8_e4m3fn}
LIMITS = {"bf16": 0.02, "fp16": 0.004, "f32": 1e-4}
"""The largest error: a few roundings of the result, and of the weights that multiply the values."""

Case = tuple[str, Callable[[], dict[str, Any]]]


def cases(device: str, quick: bool) -> list[Case]:
    return list(_small(device) if device == "cpu" else _all(device, quick))


def _small(device: str) -> Iterator[Case]:
    for dtype, name, window in (("f32", "hybrid", 0), ("fp16", "decodes", 7)):
        yield _case(device, dtype, dtype, (4, 2, 32), name, window, shape=SMALL_SHAPES[name])
    yield _flash(device, "decodes", 0, shape=SMALL_SHAPES["decodes"])


def _all(device: str, quick: bool) -> Iterator[Case]:
    """The most important cases first, because each takes seconds to compile."""
    for name in SHAPES:
        yield _case(device, "bf16", "bf16", LLAMA, name)
    for window in (1, 100):
        yield _case(device, "bf16", "bf16", LLAMA, "hybrid", window)
    yield _case(device, "bf16", "fp8", LLAMA, "hybrid")
    yield _case(device, "bf16", "fp8", LLAMA, "long")
    for window in (0, 100):
        yield _flash(device, "hybrid", window)
    yield _case(device, "f32", "f32", (8, 2, 64), "hybrid")
    yield _case(device, "fp16", "fp16", LLAMA, "hybrid")
    if quick:
        return
    for heads in HEADS[1:]:
        yield _case(device, "bf16", "bf16", heads, "hybrid")
    for heads in ((9, 3, 64), (71, 1, 64), (32, 32, 128)):
        yield _case(device, "bf16", "bf16", heads, "long")
    yield _case(device, "f32", "f32", LLAMA, "hybrid")
    for block in (8, 32, 64):
        yield _case(device, "bf16", "bf16", LLAMA, "hybrid", block=block)
    yield _case(device, "fp16", "fp8", (9, 3, 64), "hybrid", 100)
    yield _case(device, "bf16", "bf16", LLAMA, "long", 100)


def _case(
    device: str, dtype: str, kv: str, heads: tuple[int, int, int], name: str, window: int = 0, block: int = 16, shape: Any = None
) -> Case:
    words = f"{name}, {dtype}, KV {kv}, heads {heads[0]}/{heads[1]} x {heads[2]}"
    words += f", window {window}" * (window > 0) + f", block {block}" * (block != 16)
    return words, partial(_apart, device, dtype, kv, heads, shape or SHAPES[name], window, block)


def _apart(
    device: str, dtype: str, kv: str, heads: tuple[int, int, int], shape: Any, window: int, block: int, flash: bool = False
) -> dict[str, Any]:
    work, blocks = iteration(shape, block=block)
    batch = pack(work, range(sum(w.count for w in work)), Capacity(block, blocks, 1 << 15), torch.device(device))
    generator = torch.Generator(device).manual_seed(2)

    def random(*of: int) -> torch.Tensor:
        return torch.randn(of, generator=generator, device=device)

    query = random(len(batch.tokens), heads[0], heads[2]).to(TYPES[dtype])
    keys, values = (random(blocks, block, heads[1], heads[2]).to(TYPES[kv]) for _ in range(2))
    expected = reference(query.double(), *(cache.float().double() for cache in (keys, values)), batch, window)
    poison = torch.full_like(query, torch.nan)
    del poison  # the result may get this memory, so elements that are not written show up as NaN
    run = Flash(heads[0], keys, {window}).plan(batch) if flash else partial(_triton, batch)
    return {"error": error(run(query, keys, values, window), expected), "limit": LIMITS[dtype]}


def _triton(batch: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> torch.Tensor:
    return paged_attention(query, keys, values, batch, window)


def _flash(device: str, name: str, window: int, shape: Any = None) -> Case:
    def run() -> dict[str, Any]:
        need_cuda(device)
        try:
            import flashinfer  # noqa: F401
        except ModuleNotFoundError:
            raise Absent("FlashInfer is not installed") from None
        return _apart(device, "bf16", "bf16", LLAMA, shape or SHAPES[name], window, 16, flash=True)

    return f"FlashInfer, {name}" + f", window {window}" * (window > 0), run
