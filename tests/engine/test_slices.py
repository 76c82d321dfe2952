"""The server's threads are let in at once, where the system can be asked for that."""

import platform
import subprocess
import sys

import pytest

from stallfree.engine import slices

SEEN = """
import ctypes, os, platform, struct, threading
from stallfree.engine.slices import SLICE_NS, shorten
GETATTR = {"x86_64": 315, "aarch64": 275}[platform.machine()]
def seen():
    found = ctypes.create_string_buffer(48)
    ctypes.CDLL(None).syscall(GETATTR, 0, found, 48, 0)
    _, policy, _, nice, _, runtime, _, _ = struct.unpack("IIQiIQQQ", found.raw)
    told.append((policy, nice, runtime == SLICE_NS))
told = []
os.nice(3)
CHOSEN
shorten()
thread = threading.Thread(target=seen)
thread.start()
thread.join()
print(told)
"""


def after(chosen: str) -> str:
    """Scheduling class, niceness, and whether its slice is short, of a thread that began after it was asked for."""
    code = SEEN.replace("CHOSEN", chosen)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def version() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split(".")[:2])


linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in slices.SCHED_SETATTR or version() < (6, 12),
    reason="slices can be asked for from Linux 6.12 on",
)


@linux
def test_threads_have_short_slices_and_the_niceness_that_they_had():
    assert "[(0, 3, True)]" == after("")


@linux
def test_a_scheduling_class_that_somebody_chose_stays():
    assert "[(3, 3, False)]" == after("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))")


@linux
def test_on_other_systems_nothing_is_asked_for():
    assert "[(0, 3, False)]" == after("platform.system = lambda: 'Darwin'")
