"""Helper processes end with the process that started them."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.waiting import until

PARENT = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from stallfree.processes import follow_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), follow_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie has ended, but its parent has not yet asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_helper_process_does_not_outlive_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    done = subprocess.run([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    assert -signal.SIGKILL == done.returncode
    pid = int(done.stdout)
    until(lambda: not alive(pid))
