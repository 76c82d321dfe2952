"""What is read of a machine: cores, instruction sets, and the limits of the container that the process is in."""

import pytest

from stallfree.executors.machine import Quota, Room, governors, huge_pages, load, machine, memory
from tests.machines import GIB, container, pretend

V1 = "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc\n"


def test_this_machine_has_a_core_and_memory():
    here, room = machine(), memory()
    assert here.name
    assert 1 <= here.threads <= here.processors
    assert room is None or 0 < room.free <= room.limit


def test_a_machine_that_says_nothing_has_one_socket_without_limits(tmp_path, monkeypatch):
    monkeypatch.setattr("stallfree.executors.machine.ROOT", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    here = machine()
    assert (3, 1, 1, (), None) == (here.threads, here.sockets, here.smt, here.sets, here.quota)
    assert (None, None, "", set()) == (memory(), load(), huge_pages(), governors())


def test_threads_are_the_cores_of_one_socket(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, sockets=2, cores=8, smt=2)
    here = machine()
    assert (32, 2, 2, 2) == (here.processors, here.sockets, here.nodes, here.smt)
    assert (16, 8, 8) == (len(here.cores), here.socket_cores, here.threads)
    assert {0, 1} == {core.node for core in here.cores}


def test_threads_keep_to_the_affinity_mask(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, sockets=2, cores=8, smt=2, allowed="6-10,22-26")  # two cores of socket 0, three of socket 1
    here = machine()
    assert [(0, (6, 22)), (0, (7, 23)), (1, (8, 24)), (1, (9, 25)), (1, (10, 26))] == [(c.socket, c.processors) for c in here.cores]
    assert (3, 10) == (here.threads, here.usable)


def test_small_cores_get_no_threads(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, cores=8, files={"sys/devices/cpu_core/cpus": "0-2", "sys/devices/cpu_atom/cpus": "3-7"})
    assert (8, 3) == (len(machine().cores), machine().threads)


@pytest.mark.parametrize(
    ("flags", "sets", "bf16"),
    [
        ("fpu avx avx2 fma", ("avx2",), False),
        ("avx2 avx_vnni", ("avx2", "avx_vnni"), False),
        ("avx2 avx512f avx512_vnni", ("avx2", "avx512f", "avx512_vnni"), False),
        ("avx2 avx512f avx512_bf16 amx_bf16 avx512_vnni amx_tile amx_int8", None, True),
    ],
)
def test_instruction_sets_are_those_that_matter(tmp_path, monkeypatch, flags, sets, bf16):
    pretend(tmp_path, monkeypatch, flags=flags)
    assert bf16 == machine().has_bf16()
    assert set(sets or flags.split()) == set(machine().sets)


@pytest.mark.parametrize(
    ("cpu", "threads"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("800000 100000", 4), ("20000 10000", 2)]
)
def test_a_quota_is_whole_processors_and_at_least_one(tmp_path, monkeypatch, cpu, threads):
    pretend(tmp_path, monkeypatch, files=container(cpu=cpu))
    assert threads == machine().threads


def test_the_least_quota_of_all_parents_counts(tmp_path, monkeypatch):
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": "0::/system.slice/stallfree.service\n",
        f"{group}/cgroup.controllers": "cpu memory",
        f"{group}/system.slice/cpu.max": "150000 100000",
        f"{group}/system.slice/stallfree.service/cpu.max": "300000 100000",
    }
    pretend(tmp_path, monkeypatch, files=files)
    assert Quota(1.5, "/sys/fs/cgroup/system.slice/cpu.max") == machine().quota


def test_version_1_of_control_groups_is_read_where_the_container_sees_it(tmp_path, monkeypatch):
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": V1,
        f"{group}/cpu,cpuacct/cpu.cfs_quota_us": "200000",
        f"{group}/cpu,cpuacct/cpu.cfs_period_us": "100000",
        f"{group}/memory/memory.limit_in_bytes": str(2 * GIB),
        f"{group}/memory/memory.usage_in_bytes": str(GIB),
        f"{group}/memory/memory.stat": f"cache 5\ntotal_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4}\n",
    }
    pretend(tmp_path, monkeypatch, files=files)
    assert Quota(2.0, "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us") == machine().quota
    assert Room(3 * GIB // 2, 2 * GIB, "/sys/fs/cgroup/memory/memory.limit_in_bytes") == memory()


def test_version_1_without_limits_limits_nothing(tmp_path, monkeypatch):
    group = "sys/fs/cgroup"
    files = {
        "proc/self/cgroup": V1,
        f"{group}/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        f"{group}/cpu,cpuacct/cpu.cfs_period_us": "100000",
        f"{group}/memory/memory.limit_in_bytes": "9223372036854771712",
        f"{group}/memory/memory.usage_in_bytes": "5",
    }
    pretend(tmp_path, monkeypatch, files=files)
    assert None is machine().quota
    assert "/proc/meminfo" == memory().file


def test_a_container_s_limit_counts_without_its_cached_files(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(memory=2 * GIB, used=GIB, cached=GIB // 2))
    assert Room(3 * GIB // 2, 2 * GIB, "/sys/fs/cgroup/memory.max") == memory()
    assert "/sys/fs/cgroup/memory.max allows 2.00 GiB, of which 0.50 are in use" == str(memory())


def test_memory_high_is_a_limit_too(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(used=0) | {"sys/fs/cgroup/memory.high": str(GIB)})
    assert Room(GIB, GIB, "/sys/fs/cgroup/memory.high") == memory()


def test_a_container_with_more_than_the_machine_has_gets_what_is_free(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, free=3 * GIB, files=container(memory=100 * GIB))
    assert Room(3 * GIB, 24 * GIB, "/proc/meminfo") == memory()


@pytest.mark.parametrize(
    ("threads", "says"),
    [
        (8, ""),
        (1, ""),
        (9, "more than the 8 cores of a socket"),
        (17, "more than the 16 cores that this process may use; take 8"),
    ],
)
def test_too_many_threads_have_an_objection(tmp_path, monkeypatch, threads, says):
    pretend(tmp_path, monkeypatch, sockets=2, cores=8, smt=2)
    assert says in machine().objection(threads)
    assert bool(says) == bool(machine().objection(threads))


def test_threads_beyond_the_quota_have_an_objection(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch, files=container(cpu="250000 100000"))
    assert "" == machine().objection(2)
    assert "more than the 2.5 processors that /sys/fs/cgroup/cpu.max allows" in machine().objection(3)


def test_governors_are_named_with_their_drivers(tmp_path, monkeypatch):
    at = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_{}"
    files = {at.format(n, name): text for n in (0, 1) for name, text in (("driver", "acpi-cpufreq"), ("governor", "powersave"))}
    pretend(tmp_path, monkeypatch, files=files)
    assert {"acpi-cpufreq powersave"} == governors()
