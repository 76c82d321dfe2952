"""What do compressed weights and KV cost in quality? Perplexity over one fixed text, and greedy agreement, against f32.

The text is *Alice's Adventures in Wonderland* (benchmarks/data, public domain), cut into windows of 1,024 tokens. Each window is
teacher-forced through the executor, the same tokens for every configuration; perplexity is exp of the mean negative
log-likelihood of each token but a window's first. `agree` is the share of positions at which the most probable token is that of
f32 weights and f32 KV. A window runs in chunks of 512 tokens. The last rows run the default, and the default with u4 KV, in
iterations of 16 decodes, each of a different window, because decodes use other kernels, and the default in iterations of 4, which
do not take the graph. `tokens in 1 GiB`: tokens whose KV fits.

With `--model`, only the formats of weights are compared, for these GGUF files and folders: the file's own numbers in f32, its own
bits (`--weights file`), and int8; u8 KV. With `--few N`, chunks have N tokens, and those of int8 and of the file's own bits are
computed without the graph, as a calibration may choose for up to N.

    python benchmarks/quality.py [--model FILE ...] [--few N]
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import machine, parser, show

from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.plan import Work
from stallfree.engine.text import Text
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino.few import MOST

TEXT = Path(__file__).parent / "data" / "alice29.txt"
WINDOW, CHUNK, MANY, FEW, LIMIT = 1024, 512, 16, 4, 1.0
MEMORY = 1 << 30
CONFIGURATIONS = [("f32", "f32"), ("int8", "u8"), ("file", "u8"), ("int8", "u4"), ("int8", "f32"), ("f32", "u8"), ("bf16", "bf16")]


def pieces(windows: list[list[int]], decodes: int, chunk: int, block_size: int) -> Iterator[list[tuple[int, int, Work]]]:
    """Iterations as lists of (window, start, work). `decodes`: of each iteration; 0 for chunks of `chunk` tokens."""
    blocks = -(-WINDOW // block_size)

    def work(index: int, slot: int, start: int, count: int) -> Work:
        tokens = tuple(windows[index][start : start + count])
        table = tuple(range(slot * blocks, (slot + 1) * blocks))
        return Work(str(index), start, count, False, count == 1, tokens, table, None, "", windows[index], [])

    if not decodes:
        for index in range(len(windows)):
            for start in range(0, WINDOW, chunk):
                yield [(index, start, work(index, 0, start, min(chunk, WINDOW - start)))]
        return
    for first in range(0, len(windows), decodes):
        group = range(first, min(first + decodes, len(windows)))
        for start in range(WINDOW):
            yield [(index, start, work(index, index - first, start, 1)) for index in group]


def evaluate(executor: OpenVINOExecutor, windows: list[list[int]], decodes: int, chunk: int) -> tuple[float, np.ndarray]:
    """Perplexity, and the most probable token at each position [windows, WINDOW]."""
    loss, count = 0.0, 0
    best = np.zeros((len(windows), WINDOW), np.int64)
    for iteration in pieces(windows, decodes, chunk, executor.capacity.block_size):
        logits = executor.logits([work for _, _, work in iteration])
        row = 0
        for index, start, work in iteration:
            mine = logits[row : row + work.count].astype(np.float64)
            row += work.count
            best[index, start : start + work.count] = mine.argmax(axis=1)
            targets = windows[index][start + 1 : start + 1 + work.count]
            peak = mine.max(axis=1, keepdims=True)
            total = peak[:, 0] + np.log(np.exp(mine - peak).sum(axis=1))
            loss += float((total[: len(targets)] - mine[np.arange(len(targets)), targets]).sum())
            count += len(targets)
    return float(np.exp(loss / count)), best


def _within(change: float) -> str:
    return "yes" if change <= LIMIT else "no"


def rows_of(
    checkpoint: Checkpoint, runs: Sequence[tuple[str, str, int]], most: int | None, few: int | None
) -> tuple[list[dict[str, str]], int]:
    """A row for each run (weights, KV, decodes of an iteration), of which the first is the reference; and the tokens."""
    chunk = few or CHUNK
    path, metadata = checkpoint.path, checkpoint.metadata
    ids = (Text.from_folder(path) if metadata is None else Text.from_gguf(metadata)).encode(TEXT.read_text("utf-8"))
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)][:most]
    rows: list[dict[str, str]] = []
    default: dict[int, float] = {}
    reference: tuple[float, np.ndarray] | None = None
    for weights, kv, decodes in runs:
        executor = OpenVINOExecutor(checkpoint, weights=weights, kv=kv, kv_bytes=MEMORY, max_model_len=WINDOW)
        if few is not None and executor.most_few:
            executor.few = few
        perplexity, best = evaluate(executor, windows, decodes, chunk)
        executor.close()
        reference = reference or (perplexity, best)
        if (weights, kv) == ("int8", "u8"):
            default[decodes] = perplexity
        change = 100 * (perplexity / reference[0] - 1)
        more = 100 * (perplexity / default[decodes] - 1) if kv == "u4" else 0.0
        rows.append(
            {
                "file": path.name,
                "weights": weights,
                "KV": kv,
                "run as": f"{decodes} decodes" if decodes else f"chunks of {chunk}",
                "tokens in 1 GiB": f"{executor.capacity.num_blocks * executor.capacity.block_size:,}",
                "perplexity": f"{perplexity:.4f}",
                "against f32, %": f"{change:+.2f}",
                "agree, %": f"{100 * float((best == reference[1]).mean()):.1f}",
                "within 1 %": _within(change) if kv == "u8" and weights != "f32" else "",
                "u4 against u8, %": f"{more:+.2f}" if kv == "u4" else "",
                "u4 within 1 %": _within(more) if kv == "u4" else "",
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows, len(windows) * WINDOW


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", nargs="+", metavar="FILE", help="GGUF files and folders whose weights are compared")
    arguments.add_argument("--few", type=int, choices=range(1, MOST + 1), metavar="N", help=f"chunks of N tokens, at most {MOST}")
    args: argparse.Namespace = arguments.parse_args()
    facts, rows = machine(), []
    runs = [(weights, kv, 0) for weights, kv in CONFIGURATIONS]
    runs += [("int8", "u8", MANY), ("int8", "u4", MANY), ("int8", "u8", FEW)]
    if args.model:
        runs = [("f32", "f32", 0), ("file", "u8", 0), ("file", "u8", MANY), ("file", "u8", FEW), ("int8", "u8", 0)]
    for model in args.model or [None]:
        checkpoint = open_checkpoint(locate(model, say=lambda line: print(line, file=sys.stderr)))
        more, facts["tokens"] = rows_of(checkpoint, runs, 3 if args.quick else None, args.few)
        rows += more
    show(f"Perplexity over {facts['tokens']} tokens", rows, facts, args.json)


if __name__ == "__main__":
    main()
