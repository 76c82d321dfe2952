"""Short time slices, so that an iteration does not wait its turn in every operator when something else wants the machine.

An operator is done when all of its threads are, and an iteration has hundreds. Where another process keeps a core busy, a thread
whose operator begins is let in only when that process' slice of some milliseconds is over. Linux lets a thread ask for slices of
its own length (from 6.12 on), and lets one with a short slice in before one with a long slice has used its up; shares of the
machine stay as they were. It takes no privileges. This module knows of threads, and nothing of what they do.
"""

import ctypes
import os
import platform
import struct

SLICE_NS = 100_000
"""The least that Linux takes."""
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""Number of the system call (Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h): the C library
has no name for it before glibc 2.41.
"""


def shorten() -> None:
    """Ask for short slices for this thread and those that it starts from now on. Where there are none, all stays as it is; so does
    a scheduling class that somebody chose for the process.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if platform.system() != "Linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    # struct sched_attr (Linux, include/uapi/linux/sched/types.h): size, policy, flags, nice, priority, runtime, deadline, period.
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)
