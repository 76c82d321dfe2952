"""Devices, one TOML file each; this folder is their registry. It says what a device is and what was measured of it, not what runs
there.

A file holds the data sheet's figures, the links to other devices, the price of an hour, the source of each, and under `[measured]`
the coefficients by which kernels fall short of the data sheet. Another device is another file here, or anywhere, named by its path.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stallfree.core.nearest import nearest

USUAL = "a100-80g"
"""The device that is meant where a name leaves open which."""
SIZES = ("fp16", "fp8", "int8")
"""Precisions of arithmetic that a device may have a peak rate for; fp16 stands for bf16 too, and each has it."""


KEYS = {
    *("about", "profiles", "processors", "clock_ghz", "memory_mib", "bandwidth_gb_s", "price_usd_hour", "node"),
    *("peak_tflops", "links", "measured", "sources"),
}
"""What a device's file says; `profiles` may be left out."""


@dataclass(frozen=True, slots=True)
class Link:
    """What joins devices. `span`: the most devices of a node that it joins, 0 for a link between nodes. Bytes per second:
    `bandwidth` from one device to another; `ring` what each device of a ring sends and receives (NCCL's bus bandwidth);
    `node_ring` the same for rings through nodes of 4 devices and more, which may share several network cards. `latency_s` of a
    message; `collective_s` of an all-reduce whose ranks are launched one by one and wait for each other, `step_s` of one whose
    ranks are in step.
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

    `compute`, `bandwidth`: the share of the peak rates that a large matrix product sustains; `stream`: of the bandwidth, that
    reading rows or KV in order does. `kernel_s`: a kernel's own latency; `wave_s`: filling and draining the pipeline once per
    wave of tiles. `attention`: the share of peak fp16 that prefill attention sustains; `attention_s`: its latency; `split_s`:
    splitting the KV among processors and merging what they found.
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
    """One device. `peak`: operations per second by precision (`SIZES`); `bandwidth` in bytes per second, `memory` in bytes,
    `processors`: streaming multiprocessors, at `clock` Hz; `price`: US dollars an hour; `node`: devices in a node; `profiles`: what
    folders of measured profiles call the device or the node; `links` by name; `sources`: of the figures, in words.
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
        """What joins `devices`, `per_node` of them in each node: the link with the smallest span that is enough; between nodes
        `network`, or the device's first. Raises ValueError if there is none.
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
    """The device `name`, or the one in the TOML file of that path. Raises ValueError naming the nearest, or what is wrong in the
    file."""
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
    """The device in this folder that profiles call `name`. Raises ValueError if none is called so."""
    known = {alias: device for device in names() for alias in (device, *load(device).profiles)}
    if name not in known:
        raise ValueError(f"no hardware is called {name!r} in profiles{nearest(name, known)}; known: {', '.join(sorted(known))}")
    return load(known[name])


def _read(found: Mapping[str, Any], name: str) -> Hardware:
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

    for key in found.keys() - KEYS:
        raise ValueError(f"{key!r} is not known{nearest(key, KEYS)}")
    measured = found["measured"]
    coefficients = {what: number(measured, what, " in measured") for what in ("compute", "bandwidth", "stream", "attention")}
    for what in ("kernel", "wave", "attention", "split"):
        coefficients[f"{what}_s"] = number(measured, f"{what}_us", " in measured", 1e-6)
    peak = {size: number(found["peak_tflops"], size, " in peak_tflops", 1e12) for size in found["peak_tflops"]}
    if "fp16" not in peak or not peak.keys() <= set(SIZES):
        raise ValueError(f"peak_tflops has {', '.join(peak)}; expected fp16, and any of {', '.join(SIZES)}")
    return Hardware(
        name,
        str(found["about"]),
        tuple(found.get("profiles", ())),
        int(number(found, "processors", "")),
        number(found, "clock_ghz", "", 1e9),
        number(found, "memory_mib", "", 2**20),
        number(found, "bandwidth_gb_s", "", 1e9),
        number(found, "price_usd_hour", ""),
        int(number(found, "node", "")),
        peak,
        {key: link(table, f" in links.{key}") for key, table in found["links"].items()},
        Measured(**coefficients, source=str(measured["source"])),
        {key: str(value) for key, value in found["sources"].items()},
    )
