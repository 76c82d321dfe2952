"""What is quicker on this machine: the file's own codes, or int8? The runtime's graph, or what can do without it? Iterations of
some of the model's layers are timed in all of these ways, in turn.

Four bits are half the bytes to read, and more instructions to use them. A graph wants a copy of the weights, packed at each start.
Which counts for more depends on the processor. It knows nothing of the head, which takes as long in any of them, and nothing of
experts.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stallfree.checkpoint import Checkpoint
from stallfree.core.plan import Plan, Work
from stallfree.executors.openvino.executor import OpenVINOExecutor
from stallfree.executors.openvino.few import MOST, obstacle

FORMS = ("file", "int8")
BATCHES = (1, 4, 16, 80, 256)
"""Tokens of the iterations that are timed: streams, and streams with a chunk of a prompt."""
CONTEXT = 1000
"""Tokens before each piece, as far as the model's context goes."""
STREAMS = 16
ENOUGH = 128 << 20
"""Weights in the layers that are timed: more than a processor's caches hold."""
TURNS, FEWEST, TURNS_S = 6, 3, 4.0
"""Times that each iteration is run, and the fewest if these take longer than so many seconds."""
CLOSE = 1.02
"""What takes at most this many times as long as the other is as good, if it is less memory."""
VOCABULARY, KV_BYTES = 64, 64 << 20
"""The layers get an embedding of so many tokens, and so much KV."""


class Graph(NamedTuple):
    """`wanted`: whether the runtime's graph computes anything; `why`, in words. Without one, weights are in memory once, and
    nothing packs them."""

    wanted: bool
    why: str


class Trial(NamedTuple):
    """`weights`: the format to take; `why`, in words; `graphs`: of each format that was tried, whether it wants a graph."""

    weights: str
    why: str
    graphs: Mapping[str, Graph]


Times = dict[int, float]
"""Seconds of iterations, by their tokens."""


def has_codes(checkpoint: Checkpoint) -> bool:
    """Whether a matrix of a layer has codes in the file that products can use."""
    return any(name.startswith("model.layers.") for name in checkpoint.codes)


def choose(checkpoint: Checkpoint, forms: Sequence[str], kv: str, threads: int | None, *, large: bool) -> Trial:
    """Time the formats, each in the quicker of its ways. `large`: all iterations may do without a graph, if that is quicker. Takes
    some seconds, and the memory of `ENOUGH` weights in all formats, or of one layer if that is more."""
    part = _first_layers(checkpoint)
    graph, without = _times(part, forms, kv, threads)
    layers, best, graphs = part.config.num_layers, dict[str, Times](), dict[str, Graph]()
    for form in forms:
        few = not obstacle(checkpoint, form, kv) and without[form]
        mixed = {n: min(seconds, without[form][n]) if few and n <= MOST else seconds for n, seconds in graph[form].items()}
        best[form], graphs[form] = mixed, Graph(True, "")
        if large and without[form] and not obstacle(checkpoint, form, kv, copies=1):
            ratio, each = _compared(without[form], mixed)
            graphs[form] = Graph(ratio > CLOSE, f"without it, iterations of {layers} layers take {ratio:.2f} of the time ({each})")
            best[form] = mixed if ratio > CLOSE else without[form]
    if len(forms) == 1:
        return Trial(forms[0], "asked for", graphs)
    ratio, each = _compared(best["file"], best["int8"])
    why = f"the file's own codes: iterations of {layers} layers take {ratio:.2f} of int8's time ({each})"
    return Trial("file" if ratio <= CLOSE else "int8", why, graphs)


def _compared(times: Times, others: Times) -> tuple[float, str]:
    """The mean ratio of times, and all of them in words."""
    ratios = [times[tokens] / others[tokens] for tokens in times]
    said = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return statistics.geometric_mean(ratios), f"{said} for {', '.join(map(str, times))} tokens"


def _times(part: Checkpoint, forms: Sequence[str], kv: str, threads: int | None) -> tuple[dict[str, Times], dict[str, Times]]:
    """Of each format, the times of iterations by the graph, and without it: empty for one that cannot do without."""
    executors = {form: OpenVINOExecutor(part, weights=form, kv=kv, kv_bytes=KV_BYTES, threads=threads) for form in forms}
    graph, without = ({form: Times() for form in forms} for _ in range(2))
    longest = part.config.max_model_len
    context = min(CONTEXT, max(0, longest - BATCHES[-1]))
    for tokens in (min(tokens, longest) for tokens in BATCHES):
        each = {(form, few): list[float]() for form, made in executors.items() for few in ((0, tokens) if made.most_few else (0,))}
        end = time.perf_counter() + TURNS_S
        for turn in range(TURNS):
            if turn >= FEWEST and time.perf_counter() > end:
                break
            for form, few in reversed(each) if turn % 2 else each:
                executors[form].few = few
                each[form, few].append(_seconds(executors[form], tokens, context))
        for (form, few), seconds in each.items():
            (without if few else graph)[form][tokens] = statistics.median(seconds[1:])
    for executor in executors.values():
        executor.close()
    return graph, without


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
