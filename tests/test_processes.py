"""Helper processes end with the process that started them, and never hear Ctrl-C."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.waiting import until

PARENT = """
import os, signal
from stallfree.processes import Helpers

def masked():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

if __name__ == "__main__":
    pool = Helpers(1, print)
    print(pool.submit(os.getpid).result(), pool.submit(masked).result(), masked(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie has ended, but its parent has not yet asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_helper_process_does_not_hear_ctrl_c_and_does_not_outlive_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    done = subprocess.run([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    assert -signal.SIGKILL == done.returncode
    pid, helper_blocks, parent_blocks = done.stdout.split()
    assert ("True", "False") == (helper_blocks, parent_blocks)
    until(lambda: not alive(int(pid)))
