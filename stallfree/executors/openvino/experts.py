"""A mixture of experts in the graph: each token passes through the FFNs that a router chooses for it, and only these are computed.

The pairs of an expert and a token that chose it lie in order of experts. So the rows of each expert are side by side, and are split
off for its own products. An expert that nobody chose gets no rows, and the runtime skips its operators. Products of
several rows read an expert's weights once. The runtime's operator for all experts at once (GroupedMatMul) reads them again for each
row, on processors without AMX (`benchmarks/experts.py --products`). This module knows nothing of KV.
"""

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.opset15 import scatter_nd_update, search_sorted

from stallfree.checkpoint import ModelConfig
from stallfree.checkpoint.families import Experts
from stallfree.executors.openvino.weights import Weights, constant

Product = Callable[[ov.Node, list[str], bool], ov.Node]
"""The products of rows with the modules of these names, one below the other, and whether they have biases."""


def mixed(config: ModelConfig, mixture: Experts, source: Weights, prefix: str, x: ov.Node, product: Product) -> ov.Node:
    """The output for `x` [tokens, hidden] of the mixture in the layer whose tensor names begin with `prefix`."""
    experts = [[prefix + name for name in mixture.matrices(number)] for number in range(config.experts)]
    shares = _shares(config, mixture, source, prefix, x)
    pairs = ops.non_zero(shares, "i32")  # by expert, then by token
    expert, token = (ops.gather(pairs, _i32(place), _i32(0)) for place in (0, 1))
    numbers = constant(np.arange(config.experts), np.int32)
    begins, ends = (search_sorted(expert, numbers, right, "i32") for right in (False, True))

    def products(rows: ov.Node, modules: Sequence[list[str]]) -> ov.Node:
        """[pairs, out], from rows [pairs, in]: those of each expert with its own modules."""
        own = ops.variadic_split(rows, constant(0, np.int64), ops.subtract(ends, begins)).outputs()
        return ops.concat([product(x, names, mixture.bias) for x, names in zip(own, modules, strict=True)], 0)

    both = products(ops.gather(x, token, _i32(0)), [[gate, up] for gate, up, _ in experts])
    out = products(_activated(config, mixture, both), [[down] for _, _, down in experts])
    share = ops.gather_nd(shares, ops.transpose(pairs, _i32(1, 0)))
    nothing = ops.broadcast(constant(0, np.float32), ops.shape_of(x))
    return scatter_nd_update(nothing, ops.unsqueeze(token, _i32(1)), ops.multiply(out, ops.unsqueeze(share, _i32(1))), "sum")


def _shares(config: ModelConfig, mixture: Experts, source: Weights, prefix: str, x: ov.Node) -> ov.Node:
    """[experts, tokens]: what the output of each expert is multiplied by for each token; 0 where it was not chosen."""
    router = prefix + mixture.router
    logits = ops.matmul(x, source.vector(f"{router}.weight"), False, True)
    if mixture.bias:
        logits = ops.add(logits, source.vector(f"{router}.bias"))
    values = ops.softmax(logits, -1) if config.shares_of_all else logits
    best, chosen = ops.topk(values, _i32(config.active_experts), -1, "max", "value").outputs()
    best = best if config.shares_of_all else ops.softmax(best, -1)
    nothing = ops.broadcast(constant(0, np.float32), ops.shape_of(logits))
    return ops.transpose(ops.scatter_elements_update(nothing, chosen, best, _i32(1)), _i32(1, 0))


def _activated(config: ModelConfig, mixture: Experts, both: ov.Node) -> ov.Node:
    """What goes into an expert's last matrix, from its gate and up, which are side by side."""
    width = config.ffn_size
    gate, up = ops.variadic_split(both, constant(1, np.int64), constant([width, width], np.int64)).outputs()
    if not mixture.clamped:
        return ops.multiply(ops.swish(gate), up)
    slope, limit = config.clamp
    gate = ops.minimum(gate, constant(limit, np.float32))
    up = ops.add(ops.clamp(up, -limit, limit), constant(1, np.float32))
    return ops.multiply(ops.swish(gate, constant(slope, np.float32)), up)


def _i32(*values: int) -> ov.Node:
    """A number, or a vector of several."""
    return constant(values if len(values) > 1 else values[0], np.int32)
