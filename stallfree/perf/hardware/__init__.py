"""Devices, one TOML file each; this folder is their registry. It does not know what runs on them.

A file has the data sheet's figures, the links to other devices, the price of an hour, and the source of each. Under `[measured]` it
has the coefficients by which kernels fall short of the data sheet. A new device is a new file, here or anywhere, named by its path.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stallfree.core.nearest import nearest

USUAL = "a100-80g"
"""The device to suggest first for a name that fits several."""
SIZES = ("fp16", "fp8", "int8")
"""Precisions for which a device may have a peak rate. Each device has fp16, which also stands for bf16."""


KEYS = {
    *("about", "profiles", "processors", "clock_ghz", "memory_mib", "bandwidth_gb_s", "price_usd_hour", "node"),
    *("peak_tflops", "links", "measured", "sources"),
}
"""The keys of a device's file. `profiles` is optional."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link between devices. `span`: the most devices of a node that it joins; 0 for a link between nodes.

    Bytes per second: `bandwidth` from one device to another; `ring` that each device of a ring sends and receives (NCCL's bus
    bandwidth); `node_ring` the same for rings through nodes of at least 4 devices, which may share several network cards. Seconds:
    `latency_s` of a message; `collective_s` of an all-reduce whose ranks start one by one; `step_s` of one whose ranks start
    together.
    """

    span: int
    bandwidth: float
    ring: float
    node_ring: float
    latency_s: float
    collective_s: float
    step_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """How kernels fall short of the data sheet. Each is one physical quantity; `source` says what it was fitted to, and how well.

    Shares: `compute` and `bandwidth` of the peak rates that a large matrix product sustains; `stream` of the bandwidth for reading
    rows or KV in order; `attention` of peak fp16 for prefill attention. Seconds: `kernel_s`, a kernel's latency; `wave_s`, to fill
    and drain the pipeline once per wave of tiles; `attention_s`, the latency of attention; `split_s`, to split the KV among
    processors and to merge their results.
    """

    compute: float
    bandwidth: float
    stream: float
    kernel_s: float
    wave_s: float
    attention: float
    attention_s: float
    split_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device. `peak`: operations per second by precision (`SIZES`); `bandwidth`: bytes per second; `memory`: bytes;
    `processors`: streaming multiprocessors, at `clock` Hz; `price`: US dollars per hour; `node`: devices per node; `profiles`: its
    names, or its node's, in folders of measured profiles; `links` by name; `sources` of the figures, in words.
    """

    name: str
    about: str
    profiles: tuple[str, ...]
    processors: int
    clock: float
    memory: float
    bandwidth: float
    price: float
    node: int
    peak: Mapping[str, float]
    links: Mapping[str, Link]
    measured: Measured
    sources: Mapping[str, str]

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
    def number(table: Mapping[str, Any], key: str, where: str, scale: float = 1.0) -> float:
        value = table[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{key}{where} is {value!r}, expected a number above 0")
        return value * scale

    def link(table: Mapping[str, Any], where: str) -> Link:
        ring = number(table, "ring_gb_s", where, 1e9)
        return Link(
            int(table["span"]),
            number(table, "bandwidth_gb_s", where, 1e9),
            ring,
            number(table, "node_ring_gb_s", where, 1e9) if "node_ring_gb_s" in table else ring,
            *(number(table, key, where, 1e-6) for key in ("latency_us", "collective_us", "step_us")),
        )

    for key in values.keys() - KEYS:
        raise ValueError(f"{key!r} is not known{nearest(key, KEYS)}")
    measured = values["measured"]
    coefficients = {what: number(measured, what, " in measured") for what in ("compute", "bandwidth", "stream", "attention")}
    for what in ("kernel", "wave", "attention", "split"):
        coefficients[f"{what}_s"] = number(measured, f"{what}_us", " in measured", 1e-6)
    peak = {size: number(values["peak_tflops"], size, " in peak_tflops", 1e12) for size in values["peak_tflops"]}
    if "fp16" not in peak or not peak.keys() <= set(SIZES):
        raise ValueError(f"peak_tflops has {', '.join(peak)}; expected fp16, and any of {', '.join(SIZES)}")
    return Hardware(
        name,
        str(values["about"]),
        tuple(values.get("profiles", ())),
        int(number(values, "processors", "")),
        number(values, "clock_ghz", "", 1e9),
        number(values, "memory_mib", "", 2**20),
        number(values, "bandwidth_gb_s", "", 1e9),
        number(values, "price_usd_hour", ""),
        int(number(values, "node", "")),
        peak,
        {key: link(table, f" in links.{key}") for key, table in values["links"].items()},
        Measured(**coefficients, source=str(measured["source"])),
        {key: str(value) for key, value in values["sources"].items()},
    )
