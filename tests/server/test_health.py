"""What /health, /health/ready and /health/live say while the server works, drains, fails or hangs."""

import pytest

from stallfree.server import watchdog
from tests.server.conftest import Server, quiet
from tests.waiting import until


def statuses(server: Server) -> dict[str, int]:
    return {path: server.client.get(path).status_code for path in ("/health", "/health/ready", "/health/live")}


@pytest.mark.parametrize("api_key", [None, "secret"])
def test_a_server_that_works_is_healthy_ready_and_alive(api_key):
    with Server(api_key=api_key) as server:
        assert {"/health": 200, "/health/ready": 200, "/health/live": 200} == statuses(server)


def test_a_server_that_drains_is_not_ready_but_alive():
    with Server() as server:
        server.engine_thread._draining = True
        assert {"/health": 503, "/health/ready": 503, "/health/live": 200} == statuses(server)


def test_a_server_whose_engine_has_failed_is_not_alive():
    with Server() as server, quiet():
        server.engine.scheduler.policy = None
        assert 500 == server.post("/v1/completions", {"prompt": "a"}).status_code
        assert {"/health": 503, "/health/ready": 503, "/health/live": 503} == statuses(server)
        assert "the engine has failed" in server.client.get("/health/live").json()["error"]["message"]


def test_a_server_whose_iteration_hangs_is_neither_alive_nor_ready_until_it_ends(monkeypatch):
    monkeypatch.setattr(watchdog, "LEAST_S", 0.0)
    with Server() as server, quiet():
        server.executor.gate.clear()
        with server.client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": True}) as answer:
            until(lambda: 503 == server.client.get("/health/live").status_code)
            message = server.client.get("/health/live").json()["error"]["message"]
            assert message.startswith("iteration 0 has run for ")
            assert {"/health": 200, "/health/ready": 503, "/health/live": 503} == statuses(server)
            server.executor.gate.set()
            answer.read()
        server.settled()
        assert {"/health": 200, "/health/ready": 200, "/health/live": 200} == statuses(server)
