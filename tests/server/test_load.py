"""GET /load says how much a server has to do, and when a new request would have its first token."""

import pytest

from stallfree import policies
from stallfree.core.classes import Classes
from stallfree.core.plan import Capacity
from stallfree.core.policy import Setup
from stallfree.core.slo import Slo
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.perf.fitted import Fitted
from stallfree.server.intake import CUT
from stallfree.server.tenants import FAIRNESS
from tests.server.conftest import FAST, LETTERS, Executor, Server
from tests.server.test_bad_input import COMPLETIONS, error_of
from tests.waiting import until

LENGTH = 2048


def forecasting(**options) -> Server:
    """A server whose policy forecasts, priced so that a token of a prompt takes 1 ms. The targets are so wide that it is never
    late."""
    text = bytes_as_text()
    executor = Executor(Capacity(16, 1000, LENGTH), text.encode(LETTERS, special=False), FAST)
    cost = Fitted((0.001, 0.1, 0.0, 0.0, 0.0, 0.0))
    setup = Setup(cost, Slo.parse("ttft=100s,tbt=10s"))
    return Server(engine=Engine(executor, text, policies.load("slo", setup)), slo=setup.targets, **options)


def load(server: Server, tokens: int | None = None, **headers: str) -> dict[str, float | None]:
    parameters = {} if tokens is None else {"prompt_tokens": tokens}
    answer = server.client.get("/load", params=parameters, headers=headers)
    assert 200 == answer.status_code, answer.text
    return answer.json()


@pytest.fixture
def server():
    with forecasting() as running:
        yield running
        running.executor.gate.set()
        running.settled()


def test_an_idle_server_has_room_and_nothing_to_do(server):
    idle = load(server)
    assert (0, 0, 0.0) == (idle["running"], idle["waiting"], idle["backlog_s"])
    assert idle["prefill_room_s"] == pytest.approx(100.0)


def test_a_longer_prompt_has_its_first_token_later(server):
    times = [load(server, tokens)["predicted_ttft_s"] for tokens in (1, 100, LENGTH)]
    assert times == sorted(set(times))


def test_without_a_length_it_is_the_forecast_for_the_shortest_prompt(server):
    assert load(server, 1) == load(server)


def test_what_waits_takes_room_and_delays_a_new_request(server):
    """No iteration ends meanwhile, so the engine answers nothing: the load comes without it."""
    before = load(server, 100)
    server.executor.gate.clear()
    body = {"prompt": "x" * 1000, "max_tokens": 2, "stream": True}
    with server.client.stream("POST", COMPLETIONS, json=body) as answer:
        assert 200 == answer.status_code
        after = load(server, 100)
        assert 1 == after["running"] + after["waiting"]
        assert after["backlog_s"] > before["backlog_s"]
        assert after["prefill_room_s"] == pytest.approx(100.0 - after["backlog_s"])
        assert after["predicted_ttft_s"] > before["predicted_ttft_s"]
        server.executor.gate.set()
        answer.read()
    until(lambda: load(server)["backlog_s"] == 0.0)


def test_the_room_is_a_metric_too(server):
    assert f"stallfree_prefill_room_seconds {load(server)['prefill_room_s']}" in server.client.get("/metrics").text


def test_a_server_whose_prompts_are_computed_elsewhere_counts_what_it_computes_itself():
    with Server(serves_peers=True) as prefill, forecasting(asks=[prefill.peer_socket.getsockname()]) as decode:
        idle = load(decode, 1000)
        assert 0.0 == idle["backlog_s"] < idle["predicted_ttft_s"]
        assert f"stallfree_prefill_room_seconds {idle['prefill_room_s']}" in decode.client.get("/metrics").text
        prefill.executor.gate.clear()
        backlogs = []
        for cut in ("1000", "200"):
            body = {"prompt": "x" * 1000, "max_tokens": 2, "stream": True}
            with decode.client.stream("POST", COMPLETIONS, json=body, headers={CUT: cut}) as answer:
                assert 200 == answer.status_code
                backlogs.append(load(decode)["backlog_s"])
        prefill.executor.gate.set()
        assert [0.0, pytest.approx(0.8, rel=0.01)] == backlogs


def test_a_forecast_is_for_the_tenant_that_asks(server):
    """Of another tenant's work, at most that one's share comes first."""
    server.executor.gate.clear()
    body = {"prompt": "x" * 1000, "max_tokens": 2, "stream": True, "user": "one"}
    with server.client.stream("POST", COMPLETIONS, json=body) as answer:
        assert 200 == answer.status_code
        own, other = (load(server, 10, **{FAIRNESS: name})["predicted_ttft_s"] for name in ("one", "two"))
        assert other < own
        server.executor.gate.set()
        answer.read()


def test_a_policy_that_forecasts_nothing_has_null():
    with Server() as plain:
        assert {
            "prefill_room_s": None,
            "backlog_s": None,
            "running": 0,
            "waiting": 0,
            "predicted_ttft_s": None,
        } == load(plain)


@pytest.mark.parametrize(("tokens", "bound"), [("0", "1"), ("-1", "1"), (str(LENGTH + 1), str(LENGTH)), ("9" * 30, str(LENGTH))])
def test_a_length_that_no_prompt_has_is_refused_with_the_bound(server, tokens, bound):
    error = error_of(server.client.get("/load", params={"prompt_tokens": tokens}), 400)
    assert "prompt_tokens" == error["param"]
    assert f"than or equal to {bound}" in error["message"]


@pytest.mark.parametrize("tokens", ["many", "1.5", ""])
def test_what_is_no_number_of_tokens_is_refused(server, tokens):
    assert "prompt_tokens" == error_of(server.client.get("/load", params={"prompt_tokens": tokens}), 400)["param"]


def test_it_needs_a_key_as_the_metrics_do():
    with forecasting(api_key="secret") as server:
        assert [401, 401] == [server.client.get(path).status_code for path in ("/load", "/metrics")]
        assert load(server, Authorization="Bearer secret")["running"] == 0


def test_with_classes_the_forecast_is_for_the_default_one():
    classes = Classes.parse("chat: ttft=100s,tbt=10s; batch: ttlt=1000s")
    with forecasting(classes=classes) as server:
        assert load(server, 10)["predicted_ttft_s"] > 0
