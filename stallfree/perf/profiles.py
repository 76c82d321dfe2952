"""Measured kernels from a folder of profiles, each with the price that the roofline gives it. It does not know what they are for.

A compute profile (DEVICE_MODEL.csv) has the milliseconds of each operator of a layer by tokens and TP degree, with the model's
dimensions in each row. A network profile (NODE_all_reduce.csv, NODE_send_recv.csv) has those of a message by its bytes and ranks.
An attention profile names device and model in each row. The format is that of microsoft/vidur's profiles, reduced to medians.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stallfree.perf import kernels, shape
from stallfree.perf.hardware import Hardware, profiled
from stallfree.perf.kernels import Attention
from stallfree.perf.shape import Matrix

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
"""The group of each operator of a profile."""


class Point(NamedTuple):
    """One measurement: the name of its file, device, operator, measured `seconds`, and `price`: the seconds by the roofline."""

    file: str
    device: Hardware
    operator: str
    seconds: float
    price: Callable[[Hardware], float]


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors |model / measured - 1| of `points` measurements: their median and 90th percentile, and the median with its
    sign."""

    points: int
    median: float
    p90: float
    bias: float

    @classmethod
    def of(cls, points: Iterable[Point]) -> "Error":
        """The errors of `points`. Raises ValueError if there are none."""
        signed = sorted(point.price(point.device) / point.seconds - 1 for point in points)
        if not signed:
            raise ValueError("errors need at least one measurement; there is none")
        errors, size = sorted(abs(error) for error in signed), len(signed)
        return cls(size, errors[size // 2], errors[min(size - 1, size * 9 // 10)], signed[size // 2])


def read(folder: Path) -> tuple[list[Point], list[Path]]:
    """The measurements in all profiles below `folder`, and the csv files that are no profiles. Raises ValueError that names file,
    line and column, or the nearest known device.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with profiles, as DEVICE_MODEL.csv or NODE_all_reduce.csv")
    points: list[Point] = []
    others: list[Path] = []
    for file in sorted(folder.rglob("*.csv")):
        measured = _file(file)
        if measured is None:
            others.append(file)
        else:
            points += measured
    if not points:
        raise ValueError(f"{folder} holds no profile; one is a csv with the columns {','.join(COMPUTE)} and times in OPERATOR_ms")
    return points, others


def _file(file: Path) -> list[Point] | None:
    """The measurements of one file; None if it has no column of a profile."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines, restval="")
        columns = rows.fieldnames or ()
        for reader, needed, telling in (
            (_attention, ATTENTION, {"chunk_tokens", "cached_tokens"}),
            (_network, NETWORK, {"num_workers", "devices_per_node", "bytes"}),
            (_compute, COMPUTE, {"n_head", "n_embd", "num_tokens", *(f"{name}_ms" for name in LINEAR)}),
        ):
            if telling.isdisjoint(columns):
                continue
            missing = [column for column in needed if column not in columns]
            if missing:
                raise ValueError(f"{file}: the column {missing[0]} is missing; a profile like this has {','.join(needed)}")
            return [point for row in rows for point in reader(file, _Row(row, f"{file}: line {rows.line_num}"))]
    return None


class _Row:
    """A line of a csv. Its methods read a cell as what it has to be, and raise ValueError with `where` otherwise."""

    def __init__(self, cells: Mapping[str, str], where: str):
        self.cells, self.where = cells, where

    def number(self, column: str, least: float = 0.0) -> float:
        text = self.cells[column].strip()
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise ValueError(f"{self.where}: {column} is {text!r}; write a number of at least {least:g}")
        return value

    def whole(self, column: str, least: int = 1) -> int:
        return int(self.number(column, least))

    def measured(self, column: str) -> float | None:
        """Seconds in a column of milliseconds; None for an empty cell or a time of 0."""
        return self.number(column) / 1000 or None if self.cells.get(column, "").strip() else None


def _compute(file: Path, row: _Row) -> Iterator[Point]:
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
    return lambda device: kernels.matmul(device, tokens, matrix).seconds


def _elementwise(tokens: int, name: str, width: int) -> Callable[[Hardware], float]:
    return lambda device: kernels.elementwise(device, name, tokens, width).seconds


def _network(file: Path, row: _Row) -> Iterator[Point]:
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


def _attention(file: Path, row: _Row) -> Iterator[Point]:
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
        kernel = Attention(device, sharded.heads, sharded.kv_heads, model.head_dim, sharded.kv_bytes_per_layer, masked=1.0)
        if kind == "decode":
            return kernel.decodes(batch * cached)
        return kernel.chunks(batch * chunk, batch * cached, batch * kernel.pairs(cached, chunk))

    yield Point(file.name, device, kind, seconds, price)


def by(points: Sequence[Point], key: Callable[[Point], str]) -> dict[str, list[Point]]:
    """The measurements by their `key`, in their order."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups
