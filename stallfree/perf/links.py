"""Links between nodes, for KV transfers. A node has one port of a link for all its devices. This module does not know what shares a
port.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stallfree.core.nearest import nearest


@dataclass(frozen=True, slots=True)
class Network:
    """`bandwidth` in bytes per second, in each direction; `latency_s` of a message."""

    bandwidth: float
    latency_s: float


@cache
def _known() -> dict[str, Network]:
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {name: Network(row["gbit_s"] * 1e9 / 8, row["latency_us"] * 1e-6) for name, row in rows.items()}


def names() -> list[str]:
    return list(_known())


def load(name: str) -> Network:
    """The link `name`. Raises ValueError naming the nearest if there is none."""
    if name not in _known():
        raise ValueError(f"unknown link {name!r}{nearest(name, names())}; known: {', '.join(names())}")
    return _known()[name]
