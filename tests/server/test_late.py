"""Requests whose first token would come too late: refused at once with the predicted time, or served if that is wanted. The engine
stands in an iteration that does not end, and is not asked."""

import httpx
import pytest

from stallfree.core.plan import Capacity
from stallfree.core.slo import Slo as Targets
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.perf.fitted import Fitted
from stallfree.policies.slo import Slo
from tests.server.conftest import FAST, LETTERS, Executor, Server
from tests.waiting import until

WORDS = "a" * 1500
"""Its prefill takes 0.6 s by the policy's prices."""


@pytest.fixture
def busy():
    """A server with a target of 1 s for first tokens, which stands in an iteration while three long prompts wait."""
    text = bytes_as_text()
    executor = Executor(Capacity(16, 1000, 2048), text.encode(LETTERS, special=False), FAST)
    engine = Engine(executor, text, Slo(Targets.parse("ttft=1s,tbt=200ms"), Fitted()))
    with Server(engine=engine, slo=Targets.parse("ttft=1s,tbt=200ms")) as server, httpx.Client(base_url=server.url) as client:
        executor.gate.clear()
        with client.stream("POST", "/v1/completions", json=body(stream=True, slo={"on_late": "serve"})):
            until(lambda: engine.running_plan is not None)
            with client.stream("POST", "/v1/completions", json=body(stream=True, slo={"on_late": "serve"})):
                yield server, client
                executor.gate.set()


def body(**more):
    return {"model": "toy", "prompt": WORDS, "max_tokens": 4} | more


def test_a_request_that_would_be_late_is_refused_with_the_predicted_time(busy):
    _, client = busy
    answer = client.post("/v1/completions", json=body())
    error = answer.json()["error"]
    assert (429, "too_late") == (answer.status_code, error["code"])
    assert 1000 == error["target_ttft_ms"] < error["predicted_ttft_ms"]
    assert int(answer.headers["Retry-After"]) >= (error["predicted_ttft_ms"] - 1000) / 1000
    assert "the first token would come in about" in error["message"]


def test_the_refusal_is_in_anthropics_form_too_and_is_counted(busy):
    _, client = busy
    messages = [{"role": "user", "content": WORDS}]
    answer = client.post("/v1/messages", json={"model": "toy", "max_tokens": 4, "messages": messages})
    assert (429, "rate_limit_error") == (answer.status_code, answer.json()["error"]["type"])
    client.post("/v1/completions", json=body(user="acme"))
    assert 'stallfree_refused_total{reason="late",tenant="acme"} 1.0' in client.get("/metrics").text


def test_who_asks_to_be_served_late_is_served(busy):
    server, client = busy
    server.executor.gate.set()
    assert 200 == client.post("/v1/completions", json=body(slo={"on_late": "serve"})).status_code


def test_a_prompt_that_nobody_delays_is_served_whatever_its_length():
    text = bytes_as_text()
    executor = Executor(Capacity(16, 1000, 2048), text.encode(LETTERS, special=False), FAST)
    engine = Engine(executor, text, Slo(Targets.parse("ttft=100ms,tbt=200ms"), Fitted()))
    with Server(engine=engine) as server:
        assert 200 == httpx.post(f"{server.url}/v1/completions", json=body()).status_code
