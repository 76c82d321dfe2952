"""The log's line for each request: what is in it, what never is, and how lines look."""

import json
import logging
import socket
import sys

import pytest
from starlette.requests import Request
from starlette.responses import Response

from stallfree.server import logs
from stallfree.server.keys import Keys
from stallfree.server.request_log import LONGEST_PATH, Entry
from tests.server.conftest import Server, quiet
from tests.waiting import PATIENCE_S, until

COMPLETIONS = "/v1/completions"
SECRET = "sk-9f3c"


class Lines(logging.Handler):
    """Keeps what the request log writes, as fields and as lines."""

    def __init__(self):
        super().__init__()
        self.fields: list[dict[str, object]] = []
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.fields.append(record.fields)
        self.text += [logs.Text().format(record), logs.Json().format(record)]

    def last(self, number: int = 1) -> dict[str, object]:
        """The fields of the `number`th request, once it is logged."""
        until(lambda: len(self.fields) >= number, lambda: f"there are {len(self.fields)} of {number} lines")
        assert number == len(self.fields)
        return self.fields[-1]


@pytest.fixture
def lines():
    handler = Lines()
    logger = logging.getLogger("stallfree.server.request_log")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_a_request_is_one_line_with_its_id_key_and_times(lines):
    with Server(log_requests=True, keys=Keys.of("first")) as server:
        headers = {"x-api-key": "first", "x-request-id": "mine"}
        assert (
            200 == server.post(f"{COMPLETIONS}?prompt=secret", {"prompt": "secret", "max_tokens": 3}, headers=headers).status_code
        )
        fields = lines.last()
    assert ("mine", "default", "POST", COMPLETIONS, 200) == tuple(
        fields[name] for name in ("id", "key", "method", "path", "status")
    )
    assert fields["total_ms"] > 0
    assert not any("secret" in line or "first" in line for line in lines.text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_generates_has_its_tokens_and_why_it_ended(lines, stream):
    with Server(log_requests=True) as server:
        server.post(COMPLETIONS, {"prompt": "abcd", "max_tokens": 3, "n": 2, "stream": stream})
        fields = lines.last()
    assert (4, 6, "length") == (fields["prompt_tokens"], fields["completion_tokens"], fields["finish_reason"])
    assert 0 < fields["ttft_ms"] <= fields["total_ms"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/nothing", None, {"x-api-key": SECRET}, 404),
        ("DELETE", "/health", None, {}, 405),
        ("POST", COMPLETIONS, {"prompt": 3.5}, {"x-api-key": SECRET}, 400),
        ("POST", COMPLETIONS, {"prompt": "a"}, {"x-api-key": "wrong"}, 401),
        ("GET", "/health", None, {}, 200),
    ],
)
def test_refused_requests_have_a_line_too(lines, method, path, body, headers, status):
    with Server(log_requests=True, api_key=SECRET) as server:
        server.client.request(method, path, json=body, headers=headers)
        fields = lines.last()
    assert (method, path, status, None) == (fields["method"], fields["path"], fields["status"], fields["finish_reason"])
    assert ("default" if headers.get("x-api-key") == SECRET else None) == fields["key"]
    assert not any(SECRET in line or "wrong" in line for line in lines.text)


def test_a_bug_has_a_line(lines):
    with Server(log_requests=True) as server, quiet():
        server.metrics.expose = None
        logging.disable(logging.NOTSET)
        server.client.get("/metrics")
        assert 500 == lines.last()["status"]


def test_a_client_that_leaves_has_a_line_that_says_so(lines):
    with Server(log_requests=True) as server:
        server.executor.gate.clear()
        for number, stream in enumerate((True, False), 1):
            body = json.dumps({"prompt": "a", "max_tokens": 100, "stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
                sock.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda number=number: server.engine_thread.unfinished == 1)
            fields = lines.last(number)
            assert (200 if stream else 499, "abort") == (fields["status"], fields["finish_reason"])
        server.executor.gate.set()
        server.settled()


def test_a_client_that_leaves_before_its_body_came_has_a_line(lines):
    with Server(log_requests=True) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
            sock.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode())
            assert b"HTTP/1.1 100" == sock.recv(4096)[:12]
        fields = lines.last()
    assert (499, "abort") == (fields["status"], fields["finish_reason"])


def test_what_a_route_counts_is_in_the_line(lines):
    async def counted(request: Request) -> Response:
        entry = Entry.of(request.scope)
        entry.first_token()
        first = entry.ttft_s
        entry.first_token()
        assert first == entry.ttft_s
        entry.count(12, 3, ["stop"])
        entry.count(12, 7, ["length", "stop"])
        return Response()

    server = Server(log_requests=True)
    server.app.add_route("/counted", counted)
    with server:
        assert 200 == server.client.get("/counted").status_code
        fields = lines.last()
    assert (12, 7, "stop,length") == (fields["prompt_tokens"], fields["completion_tokens"], fields["finish_reason"])
    assert 0 <= fields["ttft_ms"] <= fields["total_ms"]


def test_a_path_cannot_forge_a_line_and_is_cut(lines):
    with Server(log_requests=True) as server:
        server.client.get("/%0A2026-01-01T00:00:00.000Z%20" + "x" * 1000)
        path = lines.last()["path"]
    assert path.startswith("/%0A2026")
    assert LONGEST_PATH == len(path)
    assert all(1 == len(line.splitlines()) for line in lines.text)


def test_nothing_is_logged_unless_asked(lines):
    with Server() as server:
        server.client.get("/health")
    assert [] == lines.fields


RECORD = logging.LogRecord("stallfree.x", logging.WARNING, __file__, 1, "it is %s", ("late",), None)
RECORD.created = 1769860800.0625


def test_a_line_of_text_has_time_level_logger_message_and_fields():
    record = logging.makeLogRecord(vars(RECORD) | {"fields": {"a": 1, "b": None, "c": "x"}})
    assert "2026-01-31T12:00:00.062Z warning stallfree.x: it is late a=1 c=x" == logs.Text().format(record)


def test_a_line_of_json_has_the_same_and_null_for_what_is_not_known():
    record = logging.makeLogRecord(vars(RECORD) | {"fields": {"a": 1, "b": None}})
    expected = {"level": "warning", "logger": "stallfree.x", "message": "it is late", "a": 1, "b": None}
    assert {"time": "2026-01-31T12:00:00.062Z", **expected} == json.loads(logs.Json().format(record))


@pytest.mark.parametrize("formatter", [logs.Text(), logs.Json()])
def test_a_traceback_is_kept(formatter):
    try:
        raise KeyError("gone")
    except KeyError:
        record = logging.makeLogRecord(vars(RECORD) | {"exc_info": sys.exc_info()})
    assert "KeyError: 'gone'" in formatter.format(record)
