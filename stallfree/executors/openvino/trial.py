"""Which format of weights is quicker on this machine: the file's own codes, or int8? Products of some of the model's layers are
timed in both, in turn.

Four bits are half the bytes to read, and more instructions to use them. Which counts for more depends on the processor. It knows
nothing of attention, and of the rest of an iteration, which take as long with either; and nothing of experts.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.executors.openvino.deltas import Deltas
from stallfree.executors.openvino.graph import feed_forward, linear
from stallfree.executors.openvino.recipe import Recipe
from stallfree.executors.openvino.weights import constant

BATCHES = (1, 4, 16, 80)
"""Tokens of the iterations that are timed: streams, and streams with a chunk of a prompt."""
ENOUGH = 128 << 20
"""Weights in the layers that are timed: more than a processor's caches hold."""
TURNS = 6
CLOSE = 1.02
"""If the file's own codes take at most this many times as long as int8, they are taken: they are less memory, and the file's own
numbers."""


class Trial(NamedTuple):
    """`weights`: the format to take; `why`, in words."""

    weights: str
    why: str


def has_codes(checkpoint: Checkpoint) -> bool:
    """Whether a matrix of a layer has codes in the file that products can use."""
    return any(name.startswith("model.layers.") for name in checkpoint.codes)


def choose(checkpoint: Checkpoint, kv: str, compute: ov.Type, threads: int | None) -> Trial:
    """Time both formats. Takes some seconds, and the memory of `ENOUGH` weights in both, or of one layer if that is more."""
    config = checkpoint.config
    layer = sum(int(np.prod(shape)) for name, shape in config.tensors().items() if name.startswith("model.layers.0."))
    layers = min(config.num_layers, -(-ENOUGH // layer))
    recipes = [Recipe(checkpoint, form, kv, compute, 1, threads) for form in ("file", "int8")]  # they own the weights
    requests = [_products(recipe, layers, config).create_infer_request() for recipe in recipes]
    ratios = []
    for tokens in BATCHES:
        x = np.random.default_rng(0).standard_normal((tokens, config.hidden_size)).astype(np.float32)
        times: list[list[float]] = [[], []]
        for turn in range(TURNS):
            for side in (0, 1) if turn % 2 else (1, 0):
                times[side].append(_seconds(requests[side], x))
        ratios.append(statistics.median(times[0][1:]) / statistics.median(times[1][1:]))
    ratio = statistics.geometric_mean(ratios)
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    why = f"products of {layers} layers take {ratio:.2f} of int8's time ({each} for {', '.join(map(str, BATCHES))} tokens)"
    return Trial("file" if ratio <= CLOSE else "int8", f"the file's own codes: {why}")


def _products(recipe: Recipe, layers: int, config: ModelConfig) -> ov.CompiledModel:
    """A graph of the products of the first `layers` layers, one after another."""
    x, deltas, source = ops.parameter([-1, config.hidden_size], np.float32), Deltas((), recipe.compute), recipe.weights()
    width, rest = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    hidden: ov.Node = x
    for layer in range(layers):
        at = f"model.layers.{layer}."
        qkv = linear(source, hidden, [f"{at}self_attn.{name}_proj" for name in "qkv"], False, deltas)
        q, _ = ops.variadic_split(qkv, constant(1, np.int64), constant([width, rest], np.int64)).outputs()
        hidden = linear(source, q, [f"{at}self_attn.o_proj"], False, deltas)
        hidden = feed_forward(config, source, f"{at}mlp.", hidden, deltas)
    return recipe.compile(ov.Model([ops.result(hidden)], [x], "products"))


def _seconds(request: ov.InferRequest, x: np.ndarray) -> float:
    started = time.perf_counter()
    request.infer([x])
    return time.perf_counter() - started
