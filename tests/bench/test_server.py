"""A server started for a measurement ends with it, however the measurement ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from stallfree.bench.server import server
from tests.waiting import PATIENCE_S

SIMULATED = ("--executor", "simulated")


def pid_of(url: str) -> int:
    """The server's process: the only child of this process with `serve` in its command line."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (pid,) = (int(pid) for pid in children if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_server_answers_while_it_is_wanted_and_is_gone_afterwards():
    with server([*SIMULATED, "--policy", "orca"]) as url:
        assert 200 == httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code
        pid = pid_of(url)
    assert not alive(pid)


def test_a_server_is_gone_after_an_error():
    def fail():
        with server(SIMULATED) as url:
            pids.append(pid_of(url))
            raise KeyError

    pids = []
    with pytest.raises(KeyError):
        fail()
    assert not alive(pids[0])


def test_a_server_is_gone_after_a_signal_to_the_one_who_measures():
    code = f"""
import time
from stallfree.bench.server import server
with server({SIMULATED}) as url:
    print(url, flush=True)
    time.sleep({PATIENCE_S})
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    url = owner.stdout.readline().strip()
    assert 200 == httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code
    owner.send_signal(signal.SIGTERM)
    assert 128 + signal.SIGTERM == owner.wait(PATIENCE_S)
    owner.stdout.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_handlers_of_signals_are_those_from_before():
    before = signal.getsignal(signal.SIGTERM)
    with server(SIMULATED):
        assert before != signal.getsignal(signal.SIGTERM)
    assert before == signal.getsignal(signal.SIGTERM)


def test_a_server_that_does_not_come_up_is_named_and_says_why_itself(capfd):
    with pytest.raises(ValueError, match="serve --policy saraty. ended with exit code 1"), server(["--policy", "saraty"]):
        pass
    assert "did you mean 'sarathi'?" in capfd.readouterr().err
