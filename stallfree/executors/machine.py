"""What this machine is: its processor, cores, instruction sets and memory, and what the container of this process may use of them.

It reads Linux's files below `ROOT`. What no file says is left out. It knows no models and no executors.
"""

import os
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""The folder in which /proc and /sys are. A test puts a pretended machine into another one."""

SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
"""The instruction sets that decide how matrix products are computed, as /proc/cpuinfo calls them."""

UNLIMITED = 1 << 60
"""Bytes of memory from which on a control group has no limit: version 1 then says nearly 2^63."""


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core: its socket, its NUMA node, and its processors (hardware threads) that this process may use. `efficient`: it
    is one of the small cores of a processor that has two kinds."""

    socket: int
    node: int
    processors: tuple[int, ...]
    efficient: bool = False


@dataclass(frozen=True, slots=True)
class Quota:
    """Processors that a control group lets its processes use at once, on average, and the `file` that says so."""

    processors: float
    file: str


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of memory that may still be allocated without swapping, of a `limit` in bytes that `file` sets."""

    free: int
    limit: int
    file: str

    def __str__(self) -> str:
        used = max(0, self.limit - self.free)
        return f"{self.file} allows {self.limit / 2**30:.2f} GiB, of which {used / 2**30:.2f} are in use"


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine. `kind`: family and model of the processor, whose `name` may be a whole product line's. `processors`, `sockets` and
    `nodes` (NUMA): how many it has; `smt`: processors of a core. `cores`: those that this process may use. `quota`: the least one,
    if there is any.
    """

    name: str
    kind: str
    sets: tuple[str, ...]
    processors: int
    sockets: int
    nodes: int
    smt: int
    cores: tuple[Core, ...]
    quota: Quota | None

    @property
    def usable(self) -> int:
        """The processors that this process may use at once, at least 1."""
        return self._allowed(sum(len(core.processors) for core in self.cores))

    @property
    def socket_cores(self) -> int:
        """The cores of one socket that this process may use, of the socket with the most of them. Where there are two kinds of
        cores, the small ones do not count: each thread has the same share of a product, so all would wait for them."""
        large = [core for core in self.cores if not core.efficient] or self.cores
        return max(Counter(core.socket for core in large).values())

    @property
    def threads(self) -> int:
        """The default number of an executor's threads: one for each core of a socket, no more than the quota, at least 1."""
        return self._allowed(self.socket_cores)

    def has_bf16(self) -> bool:
        """Whether the processor multiplies in bfloat16."""
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(self.sets)

    def objection(self, threads: int) -> str:
        """What speaks against this number of threads, in words; "" if nothing does."""
        if self.quota is not None and threads > self._allowed(threads):
            allowed = f"{self.quota.processors:g} processors that {self.quota.file} allows"
            what = f"the {allowed}: some are stopped, and all wait for them"
        elif threads > len(self.cores):
            what = f"the {len(self.cores)} cores that this process may use"
        elif threads > max(Counter(core.socket for core in self.cores).values()):
            what = (
                f"the {self.socket_cores} cores of a socket: the others reach weights and KV through the link between the sockets; "
                "a server for each socket uses both (docs/doctor.md)"
            )
        else:
            return ""
        return f"{threads} threads are more than {what}; take {self.threads}"

    def _allowed(self, number: int) -> int:
        return number if self.quota is None else max(1, min(number, int(self.quota.processors)))


def machine() -> Machine:
    """This machine, and what this process may use of it."""
    online = _numbers(_text("sys/devices/system/cpu/online")) or list(range(os.cpu_count() or 1))
    allowed = set(_numbers(_field("proc/self/status", "Cpus_allowed_list"))) & set(online) or set(online)
    nodes = {processor: node for node in _nodes() for processor in _numbers(_text(f"sys/devices/system/node/node{node}/cpulist"))}
    large = _numbers(_text("sys/devices/cpu_core/cpus"))
    groups: dict[tuple[int, int], list[int]] = {}
    for processor in online:
        topology = f"sys/devices/system/cpu/cpu{processor}/topology"
        siblings = _numbers(_text(f"{topology}/core_cpus_list") or _text(f"{topology}/thread_siblings_list")) or [processor]
        socket = _text(f"{topology}/physical_package_id")
        groups.setdefault((int(socket or 0), min(siblings)), []).append(processor)
    cores = [
        Core(socket, nodes.get(first, 0), tuple(usable), bool(large) and first not in large)
        for (socket, first), processors in groups.items()
        if (usable := [processor for processor in processors if processor in allowed])
    ]
    flags = _field("proc/cpuinfo", "flags").split()
    return Machine(
        name=_field("proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        kind=f"family {_field('proc/cpuinfo', 'cpu family') or '?'}, model {_field('proc/cpuinfo', 'model') or '?'}",
        sets=tuple(name for name in SETS if name in flags),
        processors=len(online),
        sockets=len({socket for socket, _ in groups}),
        nodes=max(1, len(set(nodes.values()))),
        smt=max(map(len, groups.values())),
        cores=tuple(cores),
        quota=min(_quotas(), key=lambda quota: quota.processors, default=None),
    )


def memory() -> Room | None:
    """The least room for memory: of the machine, or of a control group that this process is in. None if no file says it."""
    total, free = (_field("proc/meminfo", name).split() for name in ("MemTotal", "MemAvailable"))
    whole = [Room(int(free[0]) * 1024, int(total[0]) * 1024, "/proc/meminfo")] if total and free else []
    return min([*_rooms(), *whole], key=lambda room: room.free, default=None)


def huge_pages() -> str:
    """Who gets transparent huge pages: "always", "madvise" (who asks), "never", or "" if the system has none."""
    return _text("sys/kernel/mm/transparent_hugepage/enabled").partition("[")[2].partition("]")[0]


def load() -> float | None:
    """Threads that ran or waited for a processor, on average over the last minute. None if no file says it."""
    averages = _text("proc/loadavg").split()
    return float(averages[0]) if averages else None


def governors() -> set[str]:
    """Each driver and governor of the processors' frequencies, as "acpi-cpufreq powersave"; none where the system sets none."""
    folders = (ROOT / "sys/devices/system/cpu").glob("cpu*/cpufreq")
    return {
        " ".join(_text(str(folder.relative_to(ROOT) / f"scaling_{name}")) for name in ("driver", "governor")) for folder in folders
    }


def _quotas() -> list[Quota]:
    quotas = []
    for folder in _groups("cpu"):
        both = _text(f"{folder}/cpu.max").split()
        file = f"/{folder}/cpu.max"
        if not both:
            both = [_text(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
            file = f"/{folder}/cpu.cfs_quota_us"
        if all(number.isdecimal() and int(number) for number in both):
            quotas.append(Quota(int(both[0]) / int(both[1]), file))
    return quotas


def _rooms() -> list[Room]:
    """What each control group of this process leaves. Its cached files do not count as used: the kernel frees them when it needs
    memory."""
    rooms = []
    for folder in _groups("memory"):
        files = [("max", "current", ""), ("high", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")]
        for limit, usage, prefix in files:
            most, used = _text(f"{folder}/memory.{limit}"), _text(f"{folder}/memory.{usage}")
            if not most.isdecimal() or not used.isdecimal() or int(most) >= UNLIMITED:
                continue
            stat = dict(line.split() for line in _text(f"{folder}/memory.stat").splitlines())
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            held = max(0, int(used) - cached)
            rooms.append(Room(max(0, int(most) - held), int(most), f"/{folder}/memory.{limit}"))
    return rooms


def _groups(controller: str) -> list[str]:
    """The folders of the control groups that this process is in, from its own up to the root, of versions 1 and 2.

    In a container /proc may name the group by its path on the host, and the folder is not there. Then only the root is, and it is
    the container's own.
    """
    folders, base = [], "sys/fs/cgroup"
    for line in _text("proc/self/cgroup").splitlines() or ["0::/"]:
        _, names, path = line.split(":", 2)
        if not names:
            top = base if (ROOT / base / "cgroup.controllers").exists() else f"{base}/unified"
        elif controller in names.split(","):
            top = f"{base}/{names}" if (ROOT / base / names).exists() else f"{base}/{controller}"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # it is outside of this container
            parts = []
        folders += ["/".join([top, *parts[:depth]]) for depth in range(len(parts), -1, -1)]
    return folders


def _nodes() -> Iterable[int]:
    return _numbers(_text("sys/devices/system/node/online"))


def _numbers(text: str) -> list[int]:
    """The numbers in a list as "0-3,8"."""
    numbers: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _field(path: str, name: str) -> str:
    """The first value of `name` in a file of "name: value" lines, or "" if it has none."""
    for line in _text(path).splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _text(path: str) -> str:
    """A file below `ROOT`, or "" if it cannot be read."""
    try:
        return (ROOT / path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
