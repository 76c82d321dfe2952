"""Sequence parallelism on one GPU: is it exact, and what does its attention cost?

Exactness: the groups are threads of one process. They exchange tensors in the device's memory, because NCCL takes only one rank of
each GPU. Random chunks and decodes must have the logits of one rank on the processor in float32.

Cost: one group of four, with the heads of Llama 3 8B, computes all passes of a layer's attention (`ms`). What the others would send
is there already. `operators`: the same without flash attention. `kernel`: as many pairs of queries and keys by the executor's
Triton kernel, in one launch for each pass. `price`: what `stallfree.perf` takes for all passes. `busy`: the part of `ms` in
which the device computes; the rest is waiting for launches. `flash`: the part of this in flash attention alone. The error is of
the worst row against the operators, which compute in float32.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from random import Random
from typing import Any

import torch
from gpu.attention import LIMITS, LLAMA
from gpu.facts import data_sheet, wait
from gpu.made import checkpoint, error, iteration
from gpu.models import FAMILIES, FORMATS, small
from torch.profiler import ProfilerActivity, profile

from stallfree.checkpoint import ModelConfig
from stallfree.core.plan import Capacity, Work
from stallfree.executors.torch import Options, striped
from stallfree.executors.torch.batch import pack
from stallfree.executors.torch.kernels import paged_attention
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import BLOCK, Runner
from stallfree.executors.torch.striped import Groups, pack_stripes
from stallfree.perf.hardware import Hardware
from stallfree.perf.ring import Striped

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windows": FAMILIES["windows"],
    "gpt_oss": FAMILIES["gpt_oss"] | {"active_experts": FAMILIES["gpt_oss"]["experts"]},
}
"""gpt_oss has sinks and windows. Its tokens go to all experts, because rounding to bf16 may change which they go to."""
REQUESTS, LENGTH, ITERATIONS = 4, 480, 10
GROUPS = 4
CHUNKS = (512, 2048, 8192)
BEFORE = (0, 32_000, 128_000)
DECODES = [(7999 + i % GROUPS, 1) for i in range(32)]
"""Their masters are all groups in turn."""
WAIT_S = 60.0

Case = tuple[str, Callable[[], dict[str, Any]]]


def cases(device: str, quick: bool) -> list[Case]:
    return [*_costs(device, quick), *_exactness(device, quick)]


def _exactness(device: str, quick: bool) -> Iterator[Case]:
    for name in MODELS:
        for dtype in ("f32", "bf16") if device == "cuda" else ("f32",):
            for size in (4,) if quick else (2, 4):
                yield f"logits, {name}, {dtype}, {size} groups", partial(_logits, device, name, dtype, size)


def _costs(device: str, quick: bool) -> Iterator[Case]:
    if device == "cpu":
        yield "chunk of 32 after 64", partial(_chunk, device, (4, 2, 32), 64, 32)
        yield "8 decodes", partial(_decodes, device, (4, 2, 32), [(40 + i % GROUPS, 1) for i in range(8)])
        return
    for before in BEFORE:
        for count in CHUNKS[:2] if quick else CHUNKS:
            yield f"chunk of {count:,} after {before:,}", partial(_chunk, device, LLAMA, before, count)
    yield f"{len(DECODES)} decodes with 8,000", partial(_decodes, device, LLAMA, DECODES)


class Threads(Groups):
    """Groups of one process: each is a thread. They compute one at a time, because compilers of kernels do not expect threads:
    each has its `turn` until it waits for the others. `meet`: where all wait; `table`: what they leave there."""

    def __init__(self, number: int, size: int, meet: threading.Barrier, table: dict[int, torch.Tensor], turn: threading.Lock):
        self.number, self.size, self._meet, self._table, self._turn = number, size, meet, table, turn

    def _exchanged(self, values: torch.Tensor) -> dict[int, torch.Tensor]:
        self._table[self.number] = values.clone()
        self._all()
        everything = dict(self._table)
        self._all()
        return everything

    def _all(self) -> None:
        self._turn.release()
        try:
            self._meet.wait(WAIT_S)
        finally:
            self._turn.acquire()

    def gather(self, own: torch.Tensor, each: Sequence[int]) -> torch.Tensor:
        everything = self._exchanged(own)
        return torch.cat([everything[number] for number in range(self.size)])

    def passed(self, values: torch.Tensor, into: torch.Tensor) -> list[Any]:
        into.copy_(self._exchanged(values)[(self.number - 1) % self.size])
        return []


class Ring:
    """A model on `size` groups of one process, or on one rank."""

    def __init__(self, device: str, config: ModelConfig, dtype: str, size: int):
        self.meet, self.turn, table = threading.Barrier(size), threading.Lock(), {}
        self.size, self.vocab = size, config.vocab_size
        options = Options(dtype, dtype, device=device, threads=1)
        self.runners = [
            Runner(
                checkpoint(config), options, Alone(), range(config.num_layers), torch.device(device),
                Threads(number, size, self.meet, table, self.turn) if size > 1 else None,
            )
            for number in range(size)
        ]  # fmt: skip
        for runner in self.runners:
            runner.allocate(REQUESTS * -(-LENGTH // BLOCK))

    def logits(self, pieces: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Of all tokens of the pieces (request, start, count)."""
        each = -(-LENGTH // BLOCK)
        plan = []
        for request, start, count in pieces:
            tokens = tuple((17 * request + 7 * at) % self.vocab for at in range(start, start + count))
            blocks = tuple(range(each * request, each * request - (-(start + count) // (BLOCK * self.size))))
            plan.append(Work(str(request), start, count, True, False, tokens, blocks, None, "", (), ()))
        rows = list(range(sum(work.count for work in plan)))

        def run(runner: Runner) -> torch.Tensor:
            with self.turn:
                try:
                    return runner.run(plan, rows)
                except BaseException:
                    self.meet.abort()  # the others wait for this one
                    raise

        with ThreadPoolExecutor(self.size) as pool:
            first, *_ = pool.map(run, self.runners)
        return first


def iterations() -> list[list[tuple[int, int, int]]]:
    """Random chunks and decodes of several requests, each of which goes on where it was."""
    draw, done, plans = Random(5), [0] * REQUESTS, []
    for _ in range(ITERATIONS):
        plan = []
        for request in draw.sample(range(REQUESTS), draw.randint(1, REQUESTS)):
            room = LENGTH - done[request]
            count = min(room, draw.choice((1, 1, 2, draw.randint(2, 40), draw.randint(41, 200))))
            if count:
                plan.append((request, done[request], count))
                done[request] += count
        plans += [plan] if plan else []
    return plans


@cache
def _exact(device: str, model: str) -> torch.Tensor:
    """The logits of one rank on the processor, of the same model as on `device`."""
    return _results(Ring("cpu", small(device, MODELS[model]), "f32", 1))


def _results(ring: Ring) -> torch.Tensor:
    return torch.cat([ring.logits(plan).cpu() for plan in iterations()])


def _logits(device: str, model: str, dtype: str, size: int) -> dict[str, Any]:
    """The error of the worst row of logits; and in bf16 that of one rank."""
    config = small(device, MODELS[model])
    result, expected = _results(Ring(device, config, dtype, size)), _exact(device, model)
    row = {"rows": len(result), "error": error(result, expected), "limit": FORMATS[dtype, dtype]}
    return row if dtype == "f32" else row | {"one rank's error": error(_results(Ring(device, config, dtype, 1)), expected)}


class Still(Groups):
    """One group of several. What the others send is there already, or is taken to be its own."""

    def __init__(self, number: int, size: int):
        self.number, self.size = number, size

    def gather(self, own: torch.Tensor, each: Sequence[int]) -> torch.Tensor:
        return torch.cat([own[:number] for number in each])

    def passed(self, values: torch.Tensor, into: torch.Tensor) -> list[Any]:
        into.copy_(values)  # a link would write as much
        return []


def _chunk(device: str, heads: tuple[int, int, int], before: int, count: int) -> dict[str, Any]:
    row = _times(device, heads, [(before, count)], GROUPS)
    sheet = data_sheet(device)
    if sheet is None:
        return row
    priced = _priced(sheet, heads)
    price = 1e3 * priced.chunks(priced.sums([(before, count)]))
    return row | {"price, ms": price, "ms / price": row["ms"] / price, "kernel / price": row["kernel, ms"] / price}


def _decodes(device: str, heads: tuple[int, int, int], shape: list[tuple[int, int]]) -> dict[str, Any]:
    row = _times(device, heads, shape, 1)
    sheet = data_sheet(device)
    if sheet is None:
        return row
    price = 1e3 * _priced(sheet, heads).decodes(len(shape), sum(start for start, _ in shape))
    return row | {"price, ms": price, "ms / price": row["ms"] / price, "kernel / price": row["kernel, ms"] / price}


def _priced(sheet: Hardware, heads: tuple[int, int, int]) -> Striped:
    measured = sheet.kernels("2026").attention["fp16"]
    kv = 4 * heads[1] * heads[2]
    link = sheet.link(GROUPS, sheet.node)
    return Striped(GROUPS, link, heads[0], heads[2], device=sheet, measured=measured, kv_heads=heads[1], kv_bytes=kv)


def _times(device: str, heads: tuple[int, int, int], shape: list[tuple[int, int]], passes: int) -> dict[str, Any]:
    """Milliseconds of a layer's attention in one group: as it is, with torch's operators alone, and by `passes` launches of the
    kernel for a group's tokens and KV."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(2)

    def random(*of: int) -> torch.Tensor:
        return torch.randn(of, generator=generator, device=device).to(dtype)

    work, blocks = iteration(shape, block=BLOCK * GROUPS)
    capacity = Capacity(BLOCK, blocks, 1 << 18)
    batch, own = pack_stripes(Still(1, GROUPS), work, [], capacity, torch.device(device))
    keys, values = (random(blocks, BLOCK, heads[1], heads[2]) for _ in range(2))
    query = random(sum(w.count for w in own), heads[0], heads[2])
    stripes = batch.striped
    assert stripes is not None
    # The kernel gets the same number of pairs: a chunk's own part, or all decodes over this group's part of their KV.
    alike = own if passes > 1 else [w._replace(start=(w.start + 1) // GROUPS - 1) for w in work]
    plain = pack(alike, [], capacity, torch.device(device))
    queries = query if passes > 1 else random(len(work), heads[0], heads[2])

    def kernels() -> None:
        for _ in range(passes):
            paged_attention(queries, keys, values, plain, 0)

    attend = partial(stripes.attend, query, keys, values, 0, None)
    with torch.inference_mode():
        row = {"ms": milliseconds(attend, device), "kernel, ms": milliseconds(kernels, device)}
        if device == "cuda":
            busy, flash = _busy(attend)
            row |= {"busy, ms": busy, "flash, ms": flash, "busy / flash": busy / flash}
        result = attend()
        takes, striped.flash_takes = striped.flash_takes, lambda query: False
        try:
            row |= {"operators, ms": milliseconds(attend, device), "error": error(result, attend()), "limit": LIMITS["bf16"]}
        finally:
            striped.flash_takes = takes
    return row | {"ms / kernel": row["ms"] / row["kernel, ms"], "operators / kernel": row["operators, ms"] / row["kernel, ms"]}


def _busy(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of the device's kernels and copies; and of those of flash attention alone."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    times = [(event.key, event.self_device_time_total / 1e3) for event in profiler.key_averages()]
    return sum(time for _, time in times), sum(time for name, time in times if "flash" in name)


def milliseconds(run: Callable[[], object], device: str, times: int = 7, together: int = 4) -> float:
    """The median of several times of `run`, after one that does not count. On a GPU, some run in a row, so that their launches
    overlap with the work before."""
    run()
    wait(device)
    if device != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    taken = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / together)
    return statistics.median(taken)
