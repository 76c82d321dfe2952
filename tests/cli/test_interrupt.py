"""Ctrl-C ends a search and its processes at once, with no message about resources left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S, until

LOAD = ("--model", "llama3-8b", "--lengths", "1000/200", "--requests", "1000000", "--slo", "tbt=40ms")
SEARCHES = {
    "capacity": ("capacity", "sarathi:512", "slo", *LOAD),
    "compare": ("compare", "sarathi:512", "slo", "--rates", "4,5,6", *LOAD),
    "plan": ("plan", "--model", "llama2-13b", "--gpus", "16", "--nodes", "2", "--lengths", "2000/130", "--slo", "ttft=1s,tbt=50ms"),
}

UNHEARD = """
import signal, sys, threading
from pathlib import Path
from stallfree.cli import main
from tests.cli.test_interrupt import workers
from tests.waiting import until

def interrupt():
    until(lambda: workers("self"))
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

threading.Thread(target=interrupt).start()
main()
"""
"""Another thread takes the signal, so it does not wake the waiting thread. A signal just before the wait is the same."""


def workers(pid: int | str) -> list[int]:
    """The search's processes for trials."""
    children = [int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("whole", [True, False], ids=["group", "alone"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_ctrl_c_ends_a_search_and_its_processes(search, whole, times):
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", "stallfree", *search], stdout=pipe, stderr=pipe, text=True, process_group=0)
    until(lambda: workers(process.pid))
    pids = workers(process.pid)
    for _ in range(times):
        (os.killpg if whole else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (130, "") == (process.returncode, out), err
    assert not any(word in err for word in ("Traceback", "leaked", "Broken")), err
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_ctrl_c_that_wakes_nobody_is_heard_nevertheless(search):
    done = subprocess.run([sys.executable, "-c", UNHEARD, *search], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (130, "") == (done.returncode, done.stdout), done.stderr
