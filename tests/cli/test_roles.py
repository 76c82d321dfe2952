"""`serve --role` and `route`: messages for mistakes, before anything is loaded, and three commands together."""

import contextlib
import json
import socket
import subprocess
import sys

import httpx
import pytest

from tests.waiting import PATIENCE_S, until


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--role", "decode"], "give --prefill HOST:PORT"),
        (["--role", "prefill"], "give --peer-port 9000"),
        (["--prefill", "127.0.0.1:9000"], "--prefill is for --role decode, not both"),
        (["--role", "prefill", "--peer-port", "0", "--prefill", "a:1"], "--prefill is for --role decode, not prefill"),
        (["--role", "decode", "--prefill", "a:1", "--peer-port", "0"], "--peer-port is for --role prefill, not decode"),
        (["--role", "prefill", "--peer-port", "0", "--peer-host", "0.0.0.0"], "set STALLFREE_PEER_KEY"),
        (["--transfer-kv", "u4"], "--transfer-kv is for --role prefill or decode, not both"),
        (["--role", "decode", "--prefill", "127.0.0.1"], "'127.0.0.1' is not an address"),
        (["--role", "decode", "--prefill", "a:1,,b:2"], "'' is not an address"),
        (["--role", "decode", "--prefill", "a:99999"], "'a:99999' is not an address"),
    ],
)
def test_roles_and_addresses_that_cannot_be(stallfree, arguments, says):
    code, _, error = stallfree("serve", "--executor", "simulated", "--port", "0", *arguments)
    assert 1 == code
    assert says in error


def failing(*arguments: str) -> str:
    """The error text of a command that fails after it has opened ports, which close with its process."""
    command = [sys.executable, "-m", "stallfree", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert 1 == done.returncode
    return done.stderr


def test_a_peer_port_in_use_is_named_with_its_option():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = failing("serve", "--executor", "simulated", "--port", "0", "--role", "prefill", "--peer-port", port)
    assert f"port {port} on 127.0.0.1 is in use; stop what uses it, or give another with --peer-port" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--decode", "nowhere"], "'nowhere' is not a server's URL"),
        (["--decode", "http://a:1", "--prefill", "b"], "--prefill 'b' is not an address"),
    ],
)
def test_a_route_to_nowhere(stallfree, arguments, says):
    code, _, error = stallfree("route", "--port", "0", *arguments)
    assert 1 == code
    assert says in error


@contextlib.contextmanager
def running(*arguments: str):
    """Runs a command as a process and gives its first line. The process must end by itself when asked to."""
    command = [sys.executable, "-m", "stallfree", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            yield process.stdout.readline()
        finally:
            process.terminate()
            assert 0 == process.wait(PATIENCE_S)


def test_three_commands_make_a_server_that_hands_over():
    plain = ("--executor", "simulated", "--policy", "sarathi", "--port", "0", "--json")
    with contextlib.ExitStack() as stack:
        prefill = json.loads(stack.enter_context(running("serve", *plain, "--role", "prefill", "--peer-port", "0")))
        decode = json.loads(stack.enter_context(running("serve", *plain, "--role", "decode", "--prefill", prefill["peers"])))
        output = stack.enter_context(running("route", "--port", "0", "--decode", decode["url"], "--prefill", prefill["peers"]))
        assert ("prefill", "decode", prefill["peers"]) == (prefill["role"], decode["role"], decode["peers"])
        url = output.split()[0]
        urls, body = (url, f"{prefill['url']}/v1"), {"prompt": "x" * 90}
        answers = [httpx.post(f"{url}/completions", json=body, timeout=PATIENCE_S).json() for url in urls]
        assert answers[0]["choices"] == answers[1]["choices"]
        delivered = 'kv_transfers_total{outcome="delivered"}'

        def handed_over() -> bool:
            httpx.post(f"{url}/completions", json={"prompt": "y" * 90}, timeout=PATIENCE_S)
            metrics = httpx.get(f"{decode['url']}/metrics", timeout=PATIENCE_S).text
            return delivered in metrics and f"{delivered} 0.0" not in metrics

        until(handed_over)


def test_an_engine_of_another_kind_is_refused_at_the_start():
    plain = ("--executor", "simulated", "--policy", "sarathi", "--port", "0", "--json")
    with running("serve", *plain, "--role", "prefill", "--peer-port", "0", "--peer-key", "a") as card:
        peer = json.loads(card)["peers"]
        error = failing("serve", *plain, "--role", "decode", "--prefill", peer, "--peer-key", "b")
    assert f"prefill engine {peer}: the peer key is wrong or missing" in error
