"""KV of fewer bits: what does u4 KV save and cost beside u8, and what KV in transfer with fewer bits?

`Iterations`: the default executor with KV in u8 and in u4, in turn in one process, the embedded model; medians. `u4 / u8` is
the median of the ratios of two runs right after each other, because this machine changes its speed from minute to minute.
Limits: 1.5 times the tokens in the same memory, and 1.03 times the time of one decode. Perplexity is in quality.py.

`Hand-off`: windows of 1,024 tokens of *Alice's Adventures in Wonderland* (benchmarks/data, public domain). The first 500 tokens are
a prompt whose KV is sent in a form and written into other blocks, as a decode engine does. The perplexity is that of the 524 tokens
after it, which are computed from these blocks. `ms`: packing and unpacking one prompt's KV on one core. int8 weights.

    python benchmarks/fewer_bits.py
"""

import json
import statistics
import time
from collections import defaultdict
from typing import Any

import numpy as np
from harness import machine, parser, show
from quality import TEXT, WINDOW

from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.plan import Work
from stallfree.engine.text import Text
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.transfer.forms import Form

PROMPT, CONTEXT, STREAMS, MEMORY = 500, 2048, 16, 1 << 29
ITERATIONS = {  # (stream, tokens before, tokens)
    "1 decode, context 512": [(0, 512, 1)],
    "1 decode, context 2,048": [(0, CONTEXT, 1)],
    "16 decodes, context 512": [(i, 512, 1) for i in range(STREAMS)],
    "16 decodes, context 2,048": [(i, CONTEXT, 1) for i in range(STREAMS)],
    "prefill 512": [(0, 0, 512)],
    "15 decodes, context 512, + 64": [*((i, 512, 1) for i in range(1, STREAMS)), (0, 448, 64)],
}
FORMS = [("u8", "same"), ("u8", "u4"), ("f32", "same"), ("f32", "u8"), ("f32", "u4")]


def work(tokens: list[int], start: int, first_block: int, blocks: int) -> Work:
    table = tuple(range(first_block, first_block + blocks))
    return Work(str(first_block), start, len(tokens), True, False, tuple(tokens), table, None, "", (), [])


class Side:
    """An executor whose streams have `CONTEXT` tokens of KV."""

    def __init__(self, checkpoint: Checkpoint, kv: str) -> None:
        self._executor = OpenVINOExecutor(checkpoint, kv=kv, kv_bytes=MEMORY, max_model_len=CONTEXT + 512)
        size = self._executor.capacity.block_size
        self._each, filled = -(-(CONTEXT + 1) // size), CONTEXT // size
        self._draw = np.random.default_rng(0)
        self.tokens = self._executor.capacity.num_blocks * size
        for start in range(0, CONTEXT, 512):
            self.run([(0, start, 512)])
        memory = memoryview(bytearray(filled * self._executor.block_bytes))
        self._executor.read_blocks(range(filled), memory)
        for stream in range(1, STREAMS):
            self._executor.write_blocks(range(stream * self._each, stream * self._each + filled), memory)

    def run(self, iteration: list[tuple[int, int, int]]) -> float:
        """Seconds of an iteration, whose last tokens have logits."""
        batch = [
            work(self._draw.integers(1000, 30_000, count).tolist(), start, stream * self._each, self._each)
            for stream, start, count in iteration
        ]
        rows = np.cumsum([w.count for w in batch], dtype=np.int32) - 1
        began = time.perf_counter()
        self._executor._forward(batch, self._executor._packed(batch), rows.astype(np.int32))
        return time.perf_counter() - began


def iterations(checkpoint: Checkpoint, pairs: int) -> list[dict[str, Any]]:
    sides = {kv: Side(checkpoint, kv) for kv in ("u8", "u4")}
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, iteration in ITERATIONS.items():
        for side in sides.values():
            side.run(iteration)
        for turn in range(pairs):
            for kv in sides if turn % 2 == 0 else reversed(sides):
                measured[name][kv].append(1e3 * sides[kv].run(iteration))
    tokens = sides["u4"].tokens / sides["u8"].tokens
    rows = [_row(f"tokens in {MEMORY >> 20} MiB", sides["u8"].tokens, sides["u4"].tokens, tokens, "at least 1.5", tokens >= 1.5)]
    for name, times in measured.items():
        ratio = statistics.median(b / a for a, b in zip(times["u8"], times["u4"], strict=True))
        limit = "at most 1.03" if name.startswith("1 decode") else ""
        rows.append(_row(f"{name}, ms", *(statistics.median(times[kv]) for kv in sides), ratio, limit, ratio <= 1.03))
    return rows


def _row(what: str, u8: float, u4: float, ratio: float, limit: str, kept: bool) -> dict[str, Any]:
    return {
        "what": what,
        "u8": u8,
        "u4": u4,
        "u4 / u8": f"{ratio:.3f}",
        "limit": limit,
        "kept": ("yes" if kept else "no") * bool(limit),
    }


def hand_off(checkpoint: Checkpoint, windows: list[list[int]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    same: dict[str, float] = {}
    executors = {kv: OpenVINOExecutor(checkpoint, kv=kv, kv_bytes=MEMORY, max_model_len=WINDOW) for kv, _ in FORMS}
    for kv, name in FORMS:
        executor, loss, count, seconds = executors[kv], 0.0, 0, []
        form, size = Form.of(name, executor), executor.capacity.block_size
        blocks, table = -(-PROMPT // size), WINDOW // size
        memory = memoryview(bytearray(blocks * executor.block_bytes))
        for window in windows:
            executor.logits([work(window[:PROMPT], 0, 0, table)])
            executor.read_blocks(range(blocks), memory)
            began = time.perf_counter()
            sent = memory if form is None else form.pack(memory, blocks, PROMPT - (blocks - 1) * size)
            arrived = sent if form is None else form.unpack(memoryview(sent), blocks)
            seconds.append(time.perf_counter() - began)
            executor.write_blocks(range(table, table + blocks), memoryview(arrived))
            logits = executor.logits([work(window[PROMPT:], PROMPT, table, table)])[:-1].astype(np.float64)
            targets, peak = window[PROMPT + 1 :], logits.max(axis=1, keepdims=True)
            total = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
            loss += float((total - logits[np.arange(len(targets)), targets]).sum())
            count += len(targets)
        perplexity = float(np.exp(loss / count))
        before = same.setdefault(kv, perplexity)
        rows.append(
            {
                "KV": kv,
                "in transfer": name,
                "bytes a token": len(sent) // (blocks * size),
                "perplexity after it": f"{perplexity:.4f}",
                "against same, %": f"{100 * (perplexity / before - 1):+.2f}",
                "ms": "" if form is None else 1e3 * statistics.median(seconds),
            }
        )
    return rows


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    checkpoint = open_checkpoint(locate(say=lambda _: None))
    ids = Text.from_gguf(checkpoint.metadata or {}).encode(TEXT.read_text("utf-8"))
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)][: 3 if args.quick else None]
    times = iterations(checkpoint, 6 if args.quick else 50)
    show("Iterations, u8 and u4 KV", times, facts, None)
    facts["tokens after a hand-off"] = len(windows) * (WINDOW - PROMPT - 1)
    sent = hand_off(checkpoint, windows)
    show("KV in transfer, prompts of 500 tokens", sent, facts, None)
    if args.json is not None:
        whole = {"title": "KV of fewer bits", "machine": facts, "rows": [*times, *sent]}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
