"""What is quicker on this machine: the file's own codes, or int8? The runtime's graph, or what can do without it? Iterations of
some of the model's layers are timed in all of these ways, in turn.

Four bits are half the bytes to read, and more instructions to use them. A graph wants a copy of the weights, packed at each start.
Which counts for more depends on the processor. It knows nothing of the head, which takes as long in any of them, and nothing of
experts.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stallfree.checkpoint import Checkpoint
from stallfree.core.plan import Plan, Work
from stallfree.executors.openvino.executor import OpenVINOExecutor
from stallfree.executors.openvino.few import MOST, obstacle

FORMS = ("file", "int8")
BATCHES = (1, 4, 16, 80)
"""Tokens of the iterations that are timed: streams, and streams with a chunk of a prompt."""
LONG, CONTEXT = 400, 1000
"""Tokens of an iteration with a long chunk, and those before each piece, for the question whether a graph is wanted: without one,
attention is slower."""
STREAMS = 16
ENOUGH = 128 << 20
"""Weights in the layers that are timed: more than a processor's caches hold."""
TURNS = 6
CLOSE = 1.02
"""What takes at most this many times as long as the other is as good, if it is less memory."""
VOCABULARY, KV_BYTES = 64, 64 << 20
"""The layers get an embedding of so many tokens, and so much KV."""


class Trial(NamedTuple):
    """`weights`: the format to take; `why`, in words."""

    weights: str
    why: str


class Ways(NamedTuple):
    """Seconds of an iteration by the graph, and `without` it, None if that is not possible."""

    graph: float
    without: float | None


def has_codes(checkpoint: Checkpoint) -> bool:
    """Whether a matrix of a layer has codes in the file that products can use."""
    return any(name.startswith("model.layers.") for name in checkpoint.codes)


def choose(checkpoint: Checkpoint, kv: str, threads: int | None) -> Trial:
    """Time both formats, each in the quicker of its ways. Takes some seconds, and the memory of `ENOUGH` weights in both, or of one
    layer if that is more."""
    part = _first_layers(checkpoint)
    times = _times(part, FORMS, kv, threads, BATCHES, 0)
    own, int8 = ({tokens: _quicker(checkpoint, form, kv, tokens, ways) for tokens, ways in times[form].items()} for form in FORMS)
    ratio, each = _compared(own, int8)
    why = f"iterations of {part.config.num_layers} layers take {ratio:.2f} of int8's time ({each})"
    return Trial("file" if ratio <= CLOSE else "int8", f"the file's own codes: {why}")


def wants_graph(checkpoint: Checkpoint, weights: str, kv: str, threads: int | None) -> tuple[bool, str]:
    """Whether iterations of all kinds are quicker if there is a graph, and why, in words. Without one, weights are in memory once,
    and nothing packs them. `checkpoint`: a model that can do without. Takes as much as `choose`."""
    part = _first_layers(checkpoint)
    long = min(LONG, checkpoint.config.max_model_len)
    context = min(CONTEXT, checkpoint.config.max_model_len - long)
    times = _times(part, (weights,), kv, threads, (*BATCHES, long), context)[weights]
    graph = {tokens: _quicker(checkpoint, weights, kv, tokens, ways) for tokens, ways in times.items()}
    without = {tokens: ways.without for tokens, ways in times.items() if ways.without is not None}
    if not without:
        return True, "what can do without it cannot be compiled"
    ratio, each = _compared(without, graph)
    return ratio > CLOSE, f"without it, iterations of {part.config.num_layers} layers take {ratio:.2f} of the time ({each})"


def _quicker(checkpoint: Checkpoint, weights: str, kv: str, tokens: int, ways: Ways) -> float:
    """Seconds of an iteration where there is a graph, which not all iterations take."""
    few = ways.without is not None and tokens <= MOST and not obstacle(checkpoint, weights, kv)
    return min(ways.graph, ways.without) if few and ways.without is not None else ways.graph


def _compared(times: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, str]:
    """The mean ratio of times, and all of them in words."""
    ratios = [times[tokens] / others[tokens] for tokens in times]
    said = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return statistics.geometric_mean(ratios), f"{said} for {', '.join(map(str, times))} tokens"


def _times(
    part: Checkpoint, forms: Sequence[str], kv: str, threads: int | None, batches: Sequence[int], context: int
) -> dict[str, dict[int, Ways]]:
    """Of each format, the times of iterations of so many tokens, each piece behind `context` others, in both ways."""
    executors = {form: OpenVINOExecutor(part, weights=form, kv=kv, kv_bytes=KV_BYTES, threads=threads) for form in forms}
    found: dict[str, dict[int, Ways]] = {form: {} for form in forms}
    for tokens in batches:
        each = {(form, few): list[float]() for form, made in executors.items() for few in ((0, tokens) if made.most_few else (0,))}
        for turn in range(TURNS):
            for form, few in reversed(each) if turn % 2 else each:
                executors[form].few = few
                each[form, few].append(_seconds(executors[form], tokens, context))
        medians = {key: statistics.median(seconds[1:]) for key, seconds in each.items()}
        for form in forms:
            found[form][tokens] = Ways(medians[form, 0], medians.get((form, tokens)))
    for executor in executors.values():
        executor.close()
    return found


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


def _seconds(executor: OpenVINOExecutor, tokens: int, context: int) -> float:
    """Of an iteration whose logits nobody wants."""
    size, streams = executor.capacity.block_size, min(tokens, STREAMS)
    pieces: Sequence[int] = [1] * streams + [tokens - streams] * (tokens > streams)
    work = []
    for i, count in enumerate(pieces):
        blocks = tuple(range(i, i + 1 + (context + count) // size))
        prompt = (0,) * (context + count)
        work.append(Work(str(i), context, count, False, False, prompt[context:], blocks, None, "", prompt, ()))
    executor.submit(Plan(0, 0.0, tuple(work)))
    return executor.collect().seconds
