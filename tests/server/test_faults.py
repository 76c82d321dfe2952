"""Clients that leave, stop reading or never speak, an engine that fails, a queue that is full: nobody else is disturbed."""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from stallfree.server import door
from stallfree.server import run as running
from stallfree.server.run import PortError, bind
from tests.server.conftest import FAST, SLOW, Server, quiet
from tests.waiting import PATIENCE_S, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def send(server: Server, body: dict, length: int | None = None) -> socket.socket:
    """A raw connection that has posted a completion; `length` is a false length for its header."""
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(PATIENCE_S)
    sock.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(data)}\r\n\r\n".encode() + data)
    return sock


def running_requests(server: Server, number: int) -> None:
    until(lambda: len(server.engine.scheduler.ledger.running) == number)


def events(response: httpx.Response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_aborted(stream):
    with Server(SLOW) as server:
        sock = send(server, {"prompt": "a", "max_tokens": 2000, "n": 3, "stream": stream})
        running_requests(server, 3)
        sock.close()
        server.settled()
        assert 3 == server.aborted()


def test_a_client_that_stops_reading_disturbs_nobody_and_is_cut_off(monkeypatch):
    monkeypatch.setattr(running, "WRITE_TIMEOUT_S", 1.0)
    with Server(FAST, blocks=9000, max_model_len=32768) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        data = json.dumps({"prompt": "a", "max_tokens": 32000, "stream": True, "logprobs": 10}).encode()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        running_requests(server, 1)
        for _ in range(5):
            assert 200 == server.post(COMPLETIONS, {"prompt": "b", "max_tokens": 5}).status_code
        server.settled()
        assert 1 == server.aborted()
        deaf.close()


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    with Server() as server:
        for opening in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
            whole = opening.endswith(b"\r\n\r\n")
            monkeypatch.setattr(running, "HEAD_TIMEOUT_S", PATIENCE_S if whole else 0.2)
            sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
            with sock, contextlib.suppress(ConnectionError):  # on a busy machine the timeout may already be over
                sock.sendall(opening)
                if whole:
                    assert b"HTTP/1.1 200" == sock.recv(4096)[:12]
                    monkeypatch.setattr(running, "HEAD_TIMEOUT_S", 0.2)
                    sock.sendall(b"GET /")
                while sock.recv(4096):
                    pass


def test_a_body_that_never_comes_is_answered_with_408(monkeypatch):
    monkeypatch.setattr(door, "BODY_TIMEOUT_S", 0.2)
    with Server() as server, send(server, {"prompt": "a"}, length=1000) as sock:
        assert b"HTTP/1.1 408" == sock.recv(4096)[:12]


def test_bodies_that_fill_the_memory_for_them_are_refused_until_others_have_gone(monkeypatch):
    monkeypatch.setattr(door, "MOST_ARRIVING", 3)
    monkeypatch.setattr(door, "SMALL", 1000)
    with Server(max_body_bytes=4000) as server:
        arriving = [send(server, {"prompt": "a" * 3900}, length=4000) for _ in range(4)]
        (refused, *_), *_ = select.select(arriving, [], [], PATIENCE_S)
        answer = refused.recv(4096)
        assert (b"HTTP/1.1 503", True) == (answer[:12], b"retry-after: 1" in answer.lower())
        assert 200 == server.post(COMPLETIONS, {"prompt": "a" * 500, "max_tokens": 1}).status_code  # a small one never is
        for sock in arriving:
            sock.close()
        until(lambda: 200 == server.post(COMPLETIONS, {"prompt": "a" * 1500, "max_tokens": 1}).status_code)


def test_a_full_queue_answers_429_and_when_to_come_back():
    with Server(max_queue=2, blocks=4, max_model_len=64) as server:
        server.executor.gate.clear()
        held = [send(server, {"prompt": "a" * 40, "max_tokens": 24, "stream": True})]
        running_requests(server, 1)
        held += [send(server, {"prompt": "a" * 40, "max_tokens": 24, "stream": True}) for _ in range(2)]
        until(lambda: server.engine_thread.num_waiting == 2)
        response = server.post(COMPLETIONS, {"prompt": "a"})
        assert (429, "1", "queue_full") == (
            response.status_code,
            response.headers["retry-after"],
            response.json()["error"]["code"],
        )
        for sock in held:
            sock.close()
        server.executor.gate.set()
        server.settled()
        assert 200 == server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code


def test_more_choices_than_the_queue_holds_are_refused_for_good():
    with Server(max_queue=2) as server:
        assert 400 == server.post(COMPLETIONS, {"prompt": "a", "n": 3}).status_code


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_the_executor_fails_its_iteration_and_nothing_else(stream):
    with Server() as server, quiet():
        server.executor.fault = ValueError("the device is on fire")
        response = server.post(COMPLETIONS, {"prompt": "a", "stream": stream})
        error = events(response)[0]["error"] if stream else response.json()["error"]
        assert (200 if stream else 500, "engine_error") == (response.status_code, error["code"])
        assert "on fire" in error["message"]
        assert 200 == server.post(COMPLETIONS, {"prompt": "a"}).status_code
        assert 'stallfree_requests_total{reason="error"} 1.0' in server.client.get("/metrics").text
        server.settled()


def test_an_engine_that_has_failed_is_unhealthy_and_answers_503():
    with Server() as server, quiet():
        server.engine.scheduler.policy = None
        first = server.post(COMPLETIONS, {"prompt": "a"})
        assert 500 == first.status_code
        for response in (server.post(COMPLETIONS, {"prompt": "a"}), server.client.get("/health")):
            assert 503 == response.status_code
            assert "retry-after" not in response.headers


def test_a_bug_in_a_route_is_answered_with_an_error_object():
    with Server() as server, quiet():
        server.metrics.expose = None
        response = server.client.get("/metrics")
        assert (500, "internal_error") == (response.status_code, response.json()["error"]["code"])
        assert response.headers["x-request-id"]


def test_metrics_count_what_has_been_served():
    with Server() as server:
        server.post(COMPLETIONS, {"prompt": "abcd", "max_tokens": 5})
        server.settled()
        text = server.client.get("/metrics").text
        for line in (
            'stallfree_step_tokens_total{phase="prefill"} 4.0',
            'stallfree_step_tokens_total{phase="decode"} 4.0',
            "stallfree_prompt_tokens_total 4.0",
            "stallfree_generation_tokens_total 5.0",
            "stallfree_time_to_first_token_seconds_count 1.0",
            "stallfree_inter_token_seconds_count 4.0",
            'stallfree_requests_total{reason="length"} 1.0',
            "stallfree_running_requests 0.0",
            "stallfree_free_kv_blocks 1000.0",
            'vllm:generation_tokens_total{engine="0",model_name="toy"} 5.0',
        ):
            assert line in text


def test_the_storm_leaves_nothing_behind():
    """500 clients of all kinds at once: each is answered or turned away, and then everything is as before."""
    kinds = ("good", "stream", "bad", "leave", "half-open", "huge", "deaf", "silent", "many")

    async def client(server: Server, http: httpx.AsyncClient, number: int, left_open: list) -> tuple[str, int]:
        kind = kinds[number % len(kinds)]
        body = {"prompt": f"client {number} says", "max_tokens": 20 + number % 50}
        if kind in ("good", "bad", "huge", "many"):
            body |= {"bad": {"temperature": -1}, "many": {"n": 4}}.get(kind, {})
            content = b"[" + b" " * 10_000_000 if kind == "huge" else json.dumps(body).encode()
            return kind, (await http.post(COMPLETIONS, content=content)).status_code
        if kind == "stream":
            response = await http.post(COMPLETIONS, json=body | {"stream": True})
            if response.status_code == 200:
                assert response.text.endswith("data: [DONE]\n\n")
            return kind, response.status_code
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps(body | {"stream": True, "max_tokens": 1000}).encode()
        if kind != "silent":
            length = len(data) + 1000 * (kind == "half-open")
            writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + data)
        if kind == "leave":
            status = int((await reader.read(100)).split()[1])
            writer.transport.abort()
            return kind, status
        left_open.append(writer)
        return kind, 0

    async def storm(server: Server) -> list[tuple[str, int]]:
        left_open: list[asyncio.StreamWriter] = []
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as http:
            answers = await asyncio.gather(*(client(server, http, number, left_open) for number in range(500)))
        for writer in left_open:
            writer.transport.abort()
        return answers

    expected = {
        "good": {200, 429}, "stream": {200, 429}, "many": {200, 429}, "leave": {200, 429}, "bad": {400}, "huge": {413},
        "half-open": {0}, "deaf": {0}, "silent": {0},
    }  # fmt: skip
    with Server(FAST, blocks=600, max_queue=100) as server:
        answers = asyncio.run(storm(server))
        assert [] == [(kind, status) for kind, status in answers if status not in expected[kind]]
        assert ("good", 200) in answers
        server.settled()
        assert 200 == server.post(COMPLETIONS, {"prompt": "a"}).status_code


def test_a_port_in_use_is_named_with_the_way_out():
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PortError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            bind("127.0.0.1", port)


def test_a_host_that_there_is_not_is_named():
    with pytest.raises(PortError, match=r"host '300\.1\.1\.1'.*--host"):
        bind("300.1.1.1", 0)


SERVE = """
import sys
import threading
sys.path.insert(0, "")
from stallfree.server.run import run
from tests.server.conftest import SLOW, Server
server = Server(SLOW)
print(server.port, flush=True)
if sys.argv[2] == "shut":
    server.executor.gate.clear()
    threading.Thread(target=lambda: sys.stdin.readline() and server.executor.gate.set(), daemon=True).start()
run(server.app, server.engine_thread, server.socket, drain_timeout_s=float(sys.argv[1]))
"""


class Process:
    """A server in a process of its own. With its gate `shut` no token comes before `open` is called."""

    def __init__(self, drain_timeout_s: float, gate: str = "open"):
        command = [sys.executable, "-c", SERVE, str(drain_timeout_s), gate]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        assert 200 == httpx.get(f"{self.url}/health", timeout=PATIENCE_S).status_code
        self.response: httpx.Response | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def stream(self, max_tokens: int, stream: bool = True) -> threading.Thread:
        """Begin a completion; its thread ends with it."""

        def get() -> None:
            body = {"prompt": "a", "max_tokens": max_tokens, "stream": stream}
            self.response = httpx.post(self.url + COMPLETIONS, json=body, timeout=PATIENCE_S)

        thread = threading.Thread(target=get)
        thread.start()
        until(lambda: "stallfree_running_requests 1.0" in self.get("/metrics").text)
        return thread

    def open(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def drains(self) -> None:
        """Wait until the server says that it is shutting down."""
        until(lambda: self.get("/health").status_code == 503)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_takes_no_new_requests_and_exits_0(sig):
    with Process(PATIENCE_S, "shut") as server:
        thread = server.stream(20)
        os.kill(server.process.pid, sig)
        server.drains()
        assert 503 == httpx.post(server.url + COMPLETIONS, json={"prompt": "a"}, timeout=PATIENCE_S).status_code
        server.open()
        thread.join()
        assert "length" == events(server.response)[-2]["choices"][0]["finish_reason"]
        assert 0 == server.process.wait(PATIENCE_S)


def test_streams_that_outlast_the_drain_end_in_an_error():
    with Process(0.3) as server:
        thread = server.stream(1000)
        server.process.terminate()
        thread.join()
        assert "shutting down" in events(server.response)[-2]["error"]["message"]
        assert 0 == server.process.wait(PATIENCE_S)


def test_clients_that_stand_still_do_not_keep_the_process():
    with Process(0.3) as server, socket.create_connection(("127.0.0.1", server.port)) as half_open:
        half_open.settimeout(PATIENCE_S)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        half_open.sendall(head.encode())
        assert b"HTTP/1.1 100" == half_open.recv(4096)[:12]
        server.process.terminate()
        assert b"HTTP/1.1 503" == half_open.recv(4096)[:12]
        assert 0 == server.process.wait(PATIENCE_S)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_streams_in_an_error_event(sig):
    with Process(PATIENCE_S) as server:
        thread = server.stream(2000)
        os.kill(server.process.pid, sig)
        server.drains()
        os.kill(server.process.pid, sig)
        thread.join()
        *_, error, done = events(server.response)
        assert ("[DONE]", "unavailable") == (done, error["error"]["code"])
        assert "shutting down" in error["error"]["message"]
        assert 128 + sig == server.process.wait(PATIENCE_S)


def test_a_second_signal_ends_what_is_no_stream_with_503():
    with Process(PATIENCE_S) as server:
        thread = server.stream(2000, stream=False)
        server.process.terminate()
        server.drains()
        server.process.terminate()
        thread.join()
        assert (503, "unavailable") == (server.response.status_code, server.response.json()["error"]["code"])
        assert 128 + signal.SIGTERM == server.process.wait(PATIENCE_S)


def test_a_third_signal_ends_a_process_whose_engine_stands_still():
    with Process(PATIENCE_S, "shut") as server:
        thread = server.stream(20)
        server.process.terminate()
        server.drains()
        server.process.terminate()
        thread.join()  # its stream has ended, though the iteration has not
        server.process.terminate()
        assert 128 + signal.SIGTERM == server.process.wait(PATIENCE_S)


def test_a_drain_says_how_many_are_waited_for_how_long_and_the_way_out():
    with Process(300, "shut") as server:
        thread = server.stream(20)
        server.process.send_signal(signal.SIGINT)
        line = server.process.stderr.readline()
        assert "1 request has up to 300 s to finish; Ctrl-C again (or a second SIGTERM) ends them at once" in line
        server.process.send_signal(signal.SIGINT)
        assert "ending the unfinished requests (1)" in server.process.stderr.readline()
        thread.join()
        server.open()
        server.process.wait(PATIENCE_S)


def test_nothing_is_said_where_nobody_is_waited_for():
    with Process(PATIENCE_S) as server:
        server.process.terminate()
        assert (0, "") == (server.process.wait(PATIENCE_S), server.process.stderr.read())
