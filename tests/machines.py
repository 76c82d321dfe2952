"""Pretended machines: folders with the files of /proc and /sys that say what a machine is."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from stallfree.executors import machine

ZEN4 = "fpu avx2 avx512f avx512_bf16 avx512_vnni"
GIB = 1 << 30


def pretend(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    sockets: int = 1,
    cores: int = 4,
    smt: int = 1,
    flags: str = ZEN4,
    memory: int = 24 * GIB,
    free: int = 20 * GIB,
    allowed: str | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Make the process believe that it is on a machine with `cores` cores in each of `sockets` sockets, each with a NUMA node.
    Siblings have numbers as Linux gives them: first one processor of each core, then the others. `allowed`: the affinity mask, as
    "0-3"; `files`: more files, or others, by their paths."""
    count = sockets * cores
    write = {
        "proc/cpuinfo": f"model name\t: Pretended\ncpu family\t: 25\nmodel\t\t: 17\nflags\t\t: {flags}\n",
        "proc/meminfo": f"MemTotal: {memory // 1024} kB\nMemFree: 1 kB\nMemAvailable: {free // 1024} kB\n",
        "proc/loadavg": "0.05 0.1 0.2 1/100 7\n",
        "proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{allowed or f'0-{count * smt - 1}'}\n",
        "proc/self/cgroup": "0::/\n",
        "sys/devices/system/cpu/online": f"0-{count * smt - 1}\n",
        "sys/devices/system/node/online": f"0-{sockets - 1}\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }
    for core in range(count):
        siblings = [core + count * thread for thread in range(smt)]
        for processor in siblings:
            topology = f"sys/devices/system/cpu/cpu{processor}/topology"
            write[f"{topology}/core_cpus_list"] = ",".join(map(str, siblings))
            write[f"{topology}/physical_package_id"] = str(core // cores)
    for node in range(sockets):
        own = [core + count * thread for thread in range(smt) for core in range(node * cores, (node + 1) * cores)]
        write[f"sys/devices/system/node/node{node}/cpulist"] = ",".join(map(str, own))
    for path, text in (write | dict(files or {})).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.setattr(machine, "ROOT", root)


def container(*, cpu: str = "max 100000", memory: int | None = None, used: int = 0, cached: int = 0) -> dict[str, str]:
    """The files of a container's control group, of version 2, as the container sees them. Of `used` bytes, `cached` are files."""
    group = "sys/fs/cgroup"
    return {
        f"{group}/cgroup.controllers": "cpu memory",
        f"{group}/cpu.max": cpu,
        f"{group}/memory.max": "max" if memory is None else str(memory),
        f"{group}/memory.current": str(used),
        f"{group}/memory.stat": f"anon {used - cached}\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n",
    }
