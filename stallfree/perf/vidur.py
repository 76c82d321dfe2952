"""Kernels of 2023 and 2024 in the format of microsoft/vidur's profiles, reduced to medians, priced with the libraries of 2024.

A compute profile (DEVICE_MODEL.csv) has the milliseconds of each operator of a layer by tokens and TP degree, with the model's
dimensions in each row. A network profile (NODE_all_reduce.csv, NODE_send_recv.csv) has those of a message by its bytes and ranks.
An attention profile names device and model in each row. This module does not know other formats.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from stallfree.perf import kernels, shape
from stallfree.perf.hardware import Hardware, profiled
from stallfree.perf.kernels import Attention
from stallfree.perf.point import Point, Row
from stallfree.perf.shape import Matrix

YEAR = "2024"
COMPUTE = ("tp", "num_tokens", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp")
NETWORK = ("num_workers", "devices_per_node", "bytes", "median_ms")
ATTENTION = ("device", "model", "tp", "kind", "batch_size", "chunk_tokens", "cached_tokens", "median_ms")
COLLECTIVES = ("all_reduce", "send_recv")

LINEAR = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
ELEMENTWISE = ("emb", "input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add")
KINDS = {
    **dict.fromkeys(LINEAR, "linear operators"),
    **dict.fromkeys(ELEMENTWISE, "elementwise operators"),
    "all_reduce": "all-reduce",
    "send_recv": "send-receive",
    "decode": "attention",
    "prefill": "attention",
}
"""The group of each operator."""


def compute(file: Path, row: Row) -> Iterator[Point]:
    device = profiled(file.stem.partition("_")[0])
    tp, tokens = row.whole("tp"), row.whole("num_tokens")
    heads, hidden, ffn = row.whole("n_head"), row.whole("n_embd"), row.whole("n_expanded_embd")
    each, kv_heads = hidden // heads, max(row.whole("n_kv_head"), tp)
    gated = bool(row.number("use_gated_mlp"))
    matrices = {
        "attn_pre_proj": Matrix("qkv", (heads + 2 * kv_heads) * each // tp, hidden),
        "attn_post_proj": Matrix("output", hidden, heads * each // tp),
        "mlp_up_proj": Matrix("up", (2 if gated else 1) * ffn // tp, hidden),
        "mlp_down_proj": Matrix("down", hidden, ffn // tp),
    }
    rows = {
        "emb": ("embedding", hidden),
        "input_layernorm": ("norm", hidden),
        "attn_rope": ("rope", (heads + kv_heads) * each // tp),
        "post_attention_layernorm": ("norm", hidden),
        "mlp_act": ("gated activation" if gated else "activation", ffn // tp),
        "add": ("add", hidden),
    }
    for name in (*LINEAR, *ELEMENTWISE):
        seconds = row.measured(f"{name}_ms")
        if seconds is not None:
            price = _matmul(tokens, matrices[name]) if name in matrices else _elementwise(tokens, *rows[name])
            yield Point(file.name, device, name, seconds, price)


def _matmul(tokens: int, matrix: Matrix) -> Callable[[Hardware], float]:
    return lambda device: kernels.matmul(device, device.kernels(YEAR), tokens, matrix).seconds


def _elementwise(tokens: int, name: str, width: int) -> Callable[[Hardware], float]:
    return lambda device: kernels.elementwise(device, device.kernels(YEAR), name, tokens, width).seconds


def network(file: Path, row: Row) -> Iterator[Point]:
    collective = next((name for name in COLLECTIVES if file.stem.endswith(f"_{name}")), None)
    if collective is None:
        raise ValueError(f"{file}: its name ends in neither of {', '.join(f'_{name}.csv' for name in COLLECTIVES)}")
    device = profiled(file.stem.removesuffix(f"_{collective}"))
    ranks, per_node, size = row.whole("num_workers", 2), row.whole("devices_per_node"), row.number("bytes", 1)
    seconds = row.measured("median_ms")
    if seconds is None:
        return

    def price(device: Hardware) -> float:
        link = device.link(ranks, per_node)
        if collective == "send_recv":
            return kernels.send(link, size).seconds
        return kernels.all_reduce(link, ranks, per_node, size, in_step=False).seconds

    yield Point(file.name, device, collective, seconds, price)


def attention(file: Path, row: Row) -> Iterator[Point]:
    device, model = profiled(row.cells["device"]), shape.load(row.cells["model"])
    sharded = shape.Sharded(model, tp=row.whole("tp"))
    kind, batch, chunk, cached = (
        row.cells["kind"],
        row.whole("batch_size"),
        row.whole("chunk_tokens"),
        row.whole("cached_tokens", 0),
    )
    if kind not in ("decode", "prefill"):
        raise ValueError(f"{row.where}: kind is {kind!r}; write decode or prefill")
    seconds = row.measured("median_ms")
    if seconds is None:
        return

    def price(device: Hardware) -> float:
        # These profiles, and their kernels, are of early 2024.
        rates = device.kernels(YEAR).attention["fp16"]
        kernel = Attention(device, rates, sharded.heads, sharded.kv_heads, model.head_dim, sharded.kv_bytes_per_layer, masked=1.0)
        if kind == "decode":
            return kernel.decodes(batch, batch * cached)
        return kernel.chunks(kernel.alike(batch, chunk, cached))

    yield Point(file.name, device, kind, seconds, price)
