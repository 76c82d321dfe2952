"""Which format of weights is quicker on this machine: the file's own codes, or int8? Iterations of some of the model's layers are
timed in both, in turn.

Four bits are half the bytes to read, and more instructions to use them. Which counts for more depends on the processor. It knows
nothing of the head, which takes as long with either, and nothing of experts.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stallfree.checkpoint import Checkpoint
from stallfree.core.plan import Plan, Work
from stallfree.executors.openvino.executor import OpenVINOExecutor
from stallfree.executors.openvino.few import obstacle

FORMS = ("file", "int8")
BATCHES = (1, 4, 16, 80)
"""Tokens of the iterations that are timed: streams, and streams with a chunk of a prompt."""
STREAMS = 16
ENOUGH = 128 << 20
"""Weights in the layers that are timed: more than a processor's caches hold."""
TURNS = 6
CLOSE = 1.02
"""If the file's own codes take at most this many times as long as int8, they are taken: they are less memory, and the file's own
numbers."""
VOCABULARY, KV_BYTES = 64, 64 << 20
"""The layers get an embedding of so many tokens, and so much KV."""


class Trial(NamedTuple):
    """`weights`: the format to take; `why`, in words."""

    weights: str
    why: str


def has_codes(checkpoint: Checkpoint) -> bool:
    """Whether a matrix of a layer has codes in the file that products can use."""
    return any(name.startswith("model.layers.") for name in checkpoint.codes)


def choose(checkpoint: Checkpoint, kv: str, threads: int | None) -> Trial:
    """Time both formats, each in the quicker of its ways. Takes some seconds, and the memory of `ENOUGH` weights in both, or of one
    layer if that is more."""
    part = _first_layers(checkpoint)
    executors = [OpenVINOExecutor(part, weights=form, kv=kv, kv_bytes=KV_BYTES, threads=threads) for form in FORMS]
    most = [0 if obstacle(checkpoint, form, kv) else executor.most_few for form, executor in zip(FORMS, executors, strict=True)]
    ratios = []
    for tokens in BATCHES:
        ways = [[0, tokens] if tokens <= few else [0] for few in most]
        times = [{few: list[float]() for few in each} for each in ways]
        for turn in range(TURNS):
            for side in (0, 1) if turn % 2 else (1, 0):
                for few in ways[side]:
                    executors[side].few = few
                    times[side][few].append(_seconds(executors[side], tokens))
        own, int8 = (min(statistics.median(each[1:]) for each in side.values()) for side in times)
        ratios.append(own / int8)
    for executor in executors:
        executor.close()
    ratio = statistics.geometric_mean(ratios)
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    layers = part.config.num_layers
    why = f"iterations of {layers} layers take {ratio:.2f} of int8's time ({each} for {', '.join(map(str, BATCHES))} tokens)"
    return Trial("file" if ratio <= CLOSE else "int8", f"the file's own codes: {why}")


def _first_layers(checkpoint: Checkpoint) -> Checkpoint:
    """A model of the first layers, with an embedding, and a head, of `VOCABULARY` tokens."""
    config = checkpoint.config
    layer = sum(int(np.prod(shape)) for name, shape in config.tensors().items() if name.startswith("model.layers.0."))
    layers = min(config.num_layers, -(-ENOUGH // layer))
    short = replace(config, num_layers=layers, windows=config.windows[:layers], vocab_size=VOCABULARY)
    shapes = short.tensors()

    def read(name: str) -> np.ndarray:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return np.random.default_rng(0).standard_normal(shapes[name], np.float32)
        return checkpoint.read(name)

    codes = {name: form for name, form in checkpoint.codes.items() if name.startswith("model.layers.")}
    return replace(checkpoint, config=short, read=read, codes=codes)


def _seconds(executor: OpenVINOExecutor, tokens: int) -> float:
    """Of an iteration whose logits nobody wants."""
    size, streams = executor.capacity.block_size, min(tokens, STREAMS)
    pieces: Sequence[int] = [1] * streams + [tokens - streams] * (tokens > streams)
    work = []
    for i, count in enumerate(pieces):
        blocks = tuple(range(i, i + 1 + count // size))
        work.append(Work(str(i), 0, count, False, False, (0,) * count, blocks, None, "", (0,) * count, ()))
    executor.submit(Plan(0, 0.0, tuple(work)))
    return executor.collect().seconds
