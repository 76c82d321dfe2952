"""A decoder-only transformer as an OpenVINO graph over a paged KV cache: one call computes a whole hybrid batch.

The tokens of all sequences lie end to end, [tokens], and the paged-attention operator is told where each sequence begins and
which blocks hold its past. It knows nothing of requests or plans. Operators are written in the forms that the CPU runtime fuses:
RMSNorm, rotary positions and SwiGLU each become one operator.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from stallfree.checkpoint import ModelConfig
from stallfree.executors.openvino.deltas import Deltas
from stallfree.executors.openvino.experts import mixed
from stallfree.executors.openvino.weights import Weights, constant, parameter

Tables = tuple[ov.Node, ov.Node]

INPUTS = {
    "input_ids": np.int32,
    "position_ids": np.int32,
    "past_lens": np.int32,
    "subsequence_begins": np.int32,
    "block_indices": np.int32,
    "block_indices_begins": np.int32,
    "max_context_len": np.int32,
    "sampled_rows": np.int32,
}
"""The graph's inputs without the KV cache; all are vectors except the scalar `max_context_len`. For N sequences of T tokens in all:
`past_lens` [N]: tokens already in the cache. `subsequence_begins` [N + 1]: the first row of each sequence. `block_indices`: all
block tables end to end. `block_indices_begins` [N + 1]: where each begins. `sampled_rows`: the rows to compute logits of."""

OPENVINO = "2026.4.1"
"""The version for which the inputs of the paged-attention operator are written: it is internal to the runtime, and grows."""


def build(source: Weights, config: ModelConfig, max_model_len: int, deltas: Deltas) -> ov.Model:
    """The graph, whose output is logits [sampled rows, vocabulary] float32. `max_model_len`: the most positions. `deltas`: what
    adapters add to the products of a layer."""
    inputs = {name: parameter(name, [] if name == "max_context_len" else [-1], kind) for name, kind in INPUTS.items()}
    cache: list[ov.op.Parameter] = []
    tables: dict[tuple[tuple[float, ...], float], Tables | None] = {}
    for layer in range(config.num_layers):
        if (turns := config.turns(layer)) not in tables:
            tables[turns] = _rotary_tables(*turns, inputs["position_ids"], max_model_len)

    def product(x: ov.Node, names: list[str], bias: bool) -> ov.Node:
        return linear(source, x, names, bias, deltas)

    hidden = ops.gather(source.matrix("model.embed_tokens.weight"), inputs["input_ids"], constant(0, np.int32))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        kv = [parameter(f"{kind}_cache.{layer}", ov.PartialShape.dynamic(4), ov.Type.dynamic) for kind in ("key", "value")]
        cache += kv

        def normed(x: ov.Node, name: str, prefix: str = prefix) -> ov.Node:
            return _rms_norm(x, source.vector(f"{prefix}{name}.weight"), config.norm_eps) if name else x

        before, after, before_ffn, after_ffn = config.norms
        own = tables[config.turns(layer)]
        x = normed(hidden, before)
        x = _attention(config, source, prefix + "self_attn.", x, own, kv, inputs, config.windows[layer], deltas)
        hidden = ops.add(hidden, normed(x, after))
        x = normed(hidden, before_ffn)
        if (mixture := config.mixture) is None:
            x = feed_forward(config, source, prefix + "mlp.", x, deltas)
        else:
            x = mixed(config, mixture, source, prefix, x, product)
        hidden = ops.add(hidden, normed(x, after_ffn))
    hidden = ops.gather(hidden, inputs["sampled_rows"], constant(0, np.int32))
    hidden = _rms_norm(hidden, source.vector("model.norm.weight"), config.norm_eps)
    head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
    logits = linear(source, hidden, [head], False, deltas)
    return ov.Model([ops.result(logits)], [*inputs.values(), *cache, *deltas.parameters.values()], config.family)


def linear(source: Weights, x: ov.Node, names: list[str], bias: bool, deltas: Deltas) -> ov.Node:
    """Products of `x` [tokens, in] with the modules of these names, side by side: [tokens, out]."""
    y = source.product(x, [f"{name}.weight" for name in names])
    y = ops.add(y, source.vector(*(f"{name}.bias" for name in names))) if bias else y
    return deltas.added(y, x, names)


def _rms_norm(x: ov.Node, weight: ov.Node, eps: float) -> ov.Node:
    mean = ops.reduce_mean(ops.power(x, _f32(2)), constant([-1], np.int32), True)
    return ops.multiply(ops.multiply(x, ops.divide(_f32(1), ops.sqrt(ops.add(mean, _f32(eps))))), weight)


def _rotary_tables(frequencies: tuple[float, ...], scale: float, positions: ov.Node, max_model_len: int) -> Tables | None:
    """cos and sin of every token's rotary angles, [tokens, 1, 1, head_dim], looked up once for all layers; None if nothing
    turns."""
    if not any(frequencies):
        return None
    angles = np.outer(np.arange(max_model_len), np.tile(frequencies, 2))
    zero, middle = constant(0, np.int32), constant([1, 2], np.int32)
    scales = np.where(np.tile(frequencies, 2) > 0, scale, 1)
    tables = (scales * np.cos(angles), scales * np.sin(angles))
    cos, sin = (ops.gather(constant(table.astype(np.float32)), positions, zero) for table in tables)
    return ops.unsqueeze(cos, middle), ops.unsqueeze(sin, middle)


def _rotate(x: ov.Node, tables: Tables | None, half: int) -> ov.Node:
    """Rotary positions on `x` [tokens, heads, 1, head_dim]. The two of a pair are half a head apart."""
    if tables is None:
        return x
    cos, sin = tables
    first, second = ops.variadic_split(x, constant(3, np.int64), constant([half, half], np.int64)).outputs()
    turned = ops.concat([ops.multiply(second, _f32(-1)), first], -1)
    return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))


def _attention(
    config: ModelConfig,
    source: Weights,
    prefix: str,
    x: ov.Node,
    tables: Tables | None,
    kv: list[ov.op.Parameter],
    inputs: dict[str, ov.op.Parameter],
    window: int,
    deltas: Deltas,
) -> ov.Node:
    query, width, dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.head_dim
    x = linear(source, x, [f"{prefix}{name}_proj" for name in "qkv"], config.qkv_bias, deltas)
    q, k, v = ops.variadic_split(x, constant(1, np.int64), constant([query, width, width], np.int64)).outputs()

    def placed(x: ov.Node, heads: int, norm: str) -> ov.Node:
        if config.qk_norm == "whole":
            x = _rms_norm(x, source.vector(f"{prefix}{norm}.weight"), config.norm_eps)
        x = ops.reshape(x, constant([-1, heads, 1, dim], np.int64), False)
        if config.qk_norm == "head":
            x = _rms_norm(x, source.vector(f"{prefix}{norm}.weight"), config.norm_eps)
        return ops.reshape(_rotate(x, tables, dim // 2), constant([-1, heads * dim], np.int64), False)

    def empty(kind: type) -> ov.Node:
        return constant([], kind)

    def zero() -> ov.Node:
        return constant(0, np.int32)

    arguments = [placed(q, config.num_heads, "q_norm"), placed(k, config.num_kv_heads, "k_norm"), v, *kv]
    arguments += [inputs[n] for n in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")]
    arguments += [constant(dim**-0.5, np.float32), constant(window, np.int32), empty(np.float32), inputs["max_context_len"]]
    # What follows is switched off, except the sinks of a model that has them: score aggregation, cache rotation (3), sparse
    # attention (3), sinks, cache eviction (4), token types, tree masks (2).
    arguments += [empty(np.int32), empty(np.int32), empty(np.int32), empty(np.float32)]
    sinks = empty(np.float32)
    if config.sinks:
        sinks = ops.reshape(source.vector(f"{prefix}sinks"), constant([1, -1, 1, 1], np.int64), False)
    arguments += [empty(np.float32), zero(), zero(), sinks]
    arguments += [zero(), empty(np.int32), empty(np.int32), empty(np.int32)]
    arguments += [empty(np.int32), empty(np.uint8), empty(np.int32)]
    try:
        attention = ov.op._PagedAttentionExtension([a if isinstance(a, ov.Output) else a.output(0) for a in arguments])
    except (AttributeError, RuntimeError, TypeError) as error:
        raise RuntimeError(
            f"openvino {ov.__version__} has no paged-attention operator that takes these {len(arguments)} inputs; "
            f"install openvino=={OPENVINO}"
        ) from error
    info = attention.get_rt_info()
    info["num_k_heads"] = info["num_v_heads"] = config.num_kv_heads
    info["k_head_size"] = info["v_head_size"] = dim
    return linear(source, attention.output(0), [prefix + "o_proj"], config.output_bias, deltas)


def feed_forward(config: ModelConfig, source: Weights, prefix: str, x: ov.Node, deltas: Deltas) -> ov.Node:
    """The output of the FFN whose modules' names begin with `prefix`, for `x` [tokens, hidden]."""
    x = linear(source, x, [prefix + "gate_proj", prefix + "up_proj"], config.mlp_bias, deltas)
    gate, up = ops.variadic_split(x, constant(1, np.int64), constant([config.ffn_size, config.ffn_size], np.int64)).outputs()
    gate = ops.gelu(gate, "TANH") if config.gelu else ops.swish(gate)
    return linear(source, ops.multiply(gate, up), [prefix + "down_proj"], config.mlp_bias, deltas)


def _f32(value: float) -> ov.Node:
    return constant(value, np.float32)
