"""Devices, one TOML file each; this folder is their registry. It does not know what runs on them.

A file has the data sheet's figures, the links to other devices, the price of an hour, and the source of each. Under
`[measured.YEAR]` it has the coefficients by which the kernels of a generation of libraries fall short of the data sheet. A new
device is a new file, here or anywhere, named by its path.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from stallfree.core.nearest import nearest

USUAL = "a100-80g"
"""The device to suggest first for a name that fits several."""
SIZES = ("fp16", "fp8")
"""Precisions for which a device may have a peak rate. Each device has fp16, which also stands for bf16."""
YEARS = ("2024", "2026")
"""Generations of kernel libraries. 2024: cuBLAS, FlashInfer and NCCL as profiled for the first engines with chunked prefills. 2026:
those of vLLM 0.24, mostly in CUDA graphs."""

OPTIONAL = {"profiles", "cache_mib", "host"}
KEYS = OPTIONAL | {
    *("about", "processors", "clock_ghz", "memory_mib", "bandwidth_gb_s", "price_usd_hour", "node"),
    *("peak_tflops", "links", "measured", "sources"),
}
"""The keys of a device's file."""


@dataclass(frozen=True, slots=True)
class Switched:
    """All-reduce inside a CUDA graph, in a node. Of small messages (`kernels.SMALL`) each device reads what the others have, by
    vLLM's own kernel: in one step all of it, or in two steps a part and then the sums. Larger messages take NCCL's ring.

    Seconds: `step_s` of a step; `start_s` and, for each rank, `rank_s` of a ring; `eager_s`, the least time of the same outside a
    graph. Bytes per second: `read` from the others together; `ring` of large messages. `half`: bytes that set how slowly a ring
    comes up to speed. `whole`: how much faster a ring of a whole node is, because its switch adds (NVLink SHARP).
    """

    step_s: float
    read: float
    start_s: float
    rank_s: float
    eager_s: float
    ring: float
    half: float
    whole: float


@dataclass(frozen=True, slots=True)
class Link:
    """A link between devices. `span`: the most devices of a node that it joins; 0 for a link between nodes.

    Bytes per second: `bandwidth` from one device to another; `ring` that each device of a ring sends and receives (NCCL's bus
    bandwidth); `node_ring` the same for rings through nodes of at least 4 devices, which may share several network cards. Seconds:
    `latency_s` of a message; `collective_s` of an all-reduce whose ranks start one by one; `step_s` of one whose ranks start
    together. `graph`: the same inside a CUDA graph, where it was measured.
    """

    span: int
    bandwidth: float
    ring: float
    node_ring: float
    latency_s: float
    collective_s: float
    step_s: float
    graph: Switched | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """How matrix products of one precision fall short of the data sheet. Shares: `compute` and `bandwidth` of the peak rates that a
    large product sustains before tiles, waves and imperfect overlap are taken off; `quantise` of the bandwidth for quantising the
    activations (0: they stay as they are). Seconds: `kernel_s`, a kernel's latency; `wave_s`, to fill and drain the pipeline once
    per wave of tiles.
    """

    compute: float
    bandwidth: float
    kernel_s: float
    wave_s: float
    quantise: float = 0.0


@dataclass(frozen=True, slots=True)
class Attending:
    """How attention over KV of one precision falls short of the data sheet.

    Shares: `compute` of the peak fp16 rate for prompts; `stream` of the bandwidth for reading KV; `rows` of the bandwidth for the
    queries, keys, values and outputs of a chunk; `warm`, how much faster KV is read that is in the device's cache. `alone`: pairs
    of a sequence and a KV head reach n / (n + alone) of the bandwidth. Seconds: `launch_s`; `split_s`, to split KV among processors
    and to merge their results; `tile_s`, the fixed work of a tile; `regroup_s`, to bring the query heads of a KV head together,
    where another kernel does that; `pace_s`, for each token of KV where a tile is not split, because no heads share KV.
    """

    compute: float
    stream: float
    rows: float
    warm: float
    alone: float
    launch_s: float
    split_s: float
    tile_s: float
    regroup_s: float
    pace_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """How the kernels of one generation of libraries fall short of the data sheet. `products` by precision (`fp16`, `fp8`,
    `fp8-block`, and `widened` for weights of fewer bits that are multiplied in 16); `attention` by precision of the KV; `stream`:
    the share of the bandwidth for reading rows in order. `source` says what they were fitted to, and how well.
    """

    products: Mapping[str, Product]
    attention: Mapping[str, Attending]
    stream: float
    source: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `peak`: operations per second by precision (`SIZES`); `bandwidth`: bytes per second; `memory` and `cache`: bytes
    of memory and of the last cache; `processors`: streaming multiprocessors, at `clock` Hz; `price`: US dollars per hour; `node`:
    devices per node; `host`: how fast its usual host launches kernels, over that of a DGX A100; `profiles`: its names, or its
    node's, in folders of measured profiles; `links` by name; `measured` by generation of libraries (`YEARS`); `sources` of the
    figures, in words.
    """

    name: str
    about: str
    profiles: tuple[str, ...]
    processors: int
    clock: float
    memory: float
    cache: float
    bandwidth: float
    price: float
    node: int
    host: float
    peak: Mapping[str, float]
    links: Mapping[str, Link]
    measured: Mapping[str, Measured]
    sources: Mapping[str, str]

    def kernels(self, year: str) -> Measured:
        """The kernels of that generation of libraries, or of the other one if only that was measured."""
        return self.measured[year] if year in self.measured else next(iter(self.measured.values()))

    def link(self, devices: int, per_node: int, network: str | None = None) -> Link:
        """The link that joins `devices`, `per_node` of them in each node. Within a node it has the smallest sufficient span.
        Between nodes it is `network`, or the device's first. Raises ValueError if there is none.
        """
        if devices <= per_node:
            within = [link for link in self.links.values() if link.span >= devices]
            if within:
                return min(within, key=lambda link: link.span)
            raise ValueError(f"no link of {self.name} joins {devices} devices in a node; take fewer, or spread them over nodes")
        between = {name: link for name, link in self.links.items() if not link.span}
        if network is None and between:
            return next(iter(between.values()))
        if network not in between:
            raise ValueError(f"{self.name} has no network {network!r}; it has {', '.join(between) or 'none'}")
        return between[network]


def names() -> list[str]:
    """The devices in this folder."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.toml"))


def load(name: str) -> Hardware:
    """The device `name`, or the one in the TOML file with that path. Raises ValueError that names the nearest device, or the
    mistake in the file."""
    file = Path(name) if name.endswith(".toml") else Path(__file__).parent / f"{name}.toml"
    if not name.endswith(".toml") and name not in names():
        near = nearest(name, [USUAL, *names()])
        raise ValueError(f"unknown hardware {name!r}{near}; known: {', '.join(names())}, or the path of a .toml")
    try:
        return _read(tomllib.loads(file.read_text()), file.stem)
    except OSError as error:
        raise ValueError(f"the hardware {file} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the hardware {file} is no TOML: {error}") from None
    except KeyError as error:
        raise ValueError(f"the hardware {file} has no {error.args[0]}; hardware/a100-80g.toml is an example") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the hardware {file}: {error}; hardware/a100-80g.toml is an example") from None


@cache
def profiled(name: str) -> Hardware:
    """The device in this folder that profiles call `name`. Raises ValueError if there is none."""
    known = {alias: device for device in names() for alias in (device, *load(device).profiles)}
    if name not in known:
        raise ValueError(f"no hardware is called {name!r} in profiles{nearest(name, known)}; known: {', '.join(sorted(known))}")
    return load(known[name])


def _read(values: Mapping[str, Any], name: str) -> Hardware:
    for key in values.keys() - KEYS:
        raise ValueError(f"{key!r} is not known{nearest(key, KEYS)}")
    peak = {size: _number(values["peak_tflops"], size, " in peak_tflops", 1e12) for size in values["peak_tflops"]}
    if "fp16" not in peak or not peak.keys() <= set(SIZES):
        raise ValueError(f"peak_tflops has {', '.join(peak)}; expected fp16, and any of {', '.join(SIZES)}")
    years = values["measured"]
    if not years or not years.keys() <= set(YEARS):
        raise ValueError(f"measured has {', '.join(years) or 'nothing'}; expected any of {', '.join(YEARS)}")
    return Hardware(
        name,
        str(values["about"]),
        tuple(values.get("profiles", ())),
        int(_number(values, "processors", "")),
        _number(values, "clock_ghz", "", 1e9),
        _number(values, "memory_mib", "", 2**20),
        _number(values, "cache_mib", "", 2**20) if "cache_mib" in values else 0.0,
        _number(values, "bandwidth_gb_s", "", 1e9),
        _number(values, "price_usd_hour", ""),
        int(_number(values, "node", "")),
        _number(values, "host", "") if "host" in values else 1.0,
        peak,
        {key: _link(table, f" in links.{key}") for key, table in values["links"].items()},
        {year: _measured(table, f" in measured.{year}") for year, table in years.items()},
        {key: str(value) for key, value in values["sources"].items()},
    )


def _number(table: Mapping[str, Any], key: str, where: str, scale: float = 1.0, zero: bool = False) -> float:
    value = table[key]
    least = zero and value == 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not (least or 0 < value < float("inf")):
        raise ValueError(f"{key}{where} is {value!r}, expected a number {'of at least' if zero else 'above'} 0")
    return float(value * scale)


def _link(table: Mapping[str, Any], where: str) -> Link:
    ring = _number(table, "ring_gb_s", where, 1e9)
    return Link(
        int(table["span"]),
        _number(table, "bandwidth_gb_s", where, 1e9),
        ring,
        _number(table, "node_ring_gb_s", where, 1e9) if "node_ring_gb_s" in table else ring,
        _number(table, "latency_us", where, 1e-6),
        _number(table, "collective_us", where, 1e-6),
        _number(table, "step_us", where, 1e-6),
        _switched(table["graph"], f"{where}.graph") if "graph" in table else None,
    )


def _switched(table: Mapping[str, Any], where: str) -> Switched:
    return Switched(
        _number(table, "step_us", where, 1e-6),
        _number(table, "read_gb_s", where, 1e9),
        _number(table, "start_us", where, 1e-6),
        _number(table, "rank_us", where, 1e-6),
        _number(table, "eager_us", where, 1e-6),
        _number(table, "ring_gb_s", where, 1e9),
        _number(table, "half_mb", where, 1e6),
        _number(table, "whole", where),
    )


def _measured(table: Mapping[str, Any], where: str) -> Measured:
    def rates(kind: type[Product] | type[Attending], values: Mapping[str, Any], where: str) -> dict[str, float]:
        """The fields of `kind`. A name that ends in _s is in microseconds in the file, as NAME_us."""
        names = {f"{f.name[:-2]}_us" if f.name.endswith("_s") else f.name: f.name for f in fields(kind)}
        for key in values.keys() - names.keys():
            raise ValueError(f"{key!r}{where} is not known{nearest(key, names)}")
        given = {key: name for key, name in names.items() if key in values or name != "quantise"}
        zero = {"alone", "quantise"}  # and times
        return {
            name: _number(values, key, where, 1e-6 if key != name else 1.0, zero=key != name or name in zero)
            for key, name in given.items()
        }

    products = {what: Product(**rates(Product, row, f"{where}.products.{what}")) for what, row in table["products"].items()}
    attention = {what: Attending(**rates(Attending, row, f"{where}.attention.{what}")) for what, row in table["attention"].items()}
    for what, known in (("products", products), ("attention", attention)):
        if "fp16" not in known:
            raise KeyError(f"fp16{where}.{what}")
    return Measured(products, attention, _number(table, "stream", where), str(table["source"]))
