"""A request names its service class in its body or a header, in every API; the scheduler gets the class's targets, and the answer
says the class."""

import json

import pytest

from stallfree.core.classes import Classes
from tests.server.conftest import Server
from tests.server.test_bad_input import CHAT, COMPLETIONS, error_of

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]
BODIES = {
    CHAT: {"messages": HELLO, "max_tokens": 2},
    COMPLETIONS: {"prompt": "abc", "max_tokens": 2},
    RESPONSES: {"input": "hello", "max_output_tokens": 2},
    MESSAGES: {"messages": HELLO, "max_tokens": 2},
}
WORDS = "chat: ttft=1s@p95,tbt=100ms; batch: ttlt=10min; relaxed: ttft=10s@p80,tpot=200ms@p90"


class Observed:
    """A server, and the class and targets of its requests, in turn."""

    def __init__(self, server: Server):
        self.server, self.promises = server, []
        submit = server.engine.scheduler.submit

        def observe(request):
            self.promises.append((request.service_class, str(request.slo or "")))
            submit(request)

        server.engine.scheduler.submit = observe

    def post(self, route: str, fields: dict[str, object], headers: dict[str, str] | None = None):
        self.promises.clear()
        return self.server.post(route, BODIES[route] | fields, headers=headers)


@pytest.fixture(scope="module")
def observed():
    with Server(classes=Classes.parse(WORDS)) as server:
        yield Observed(server)
        server.settled()


@pytest.fixture(scope="module")
def classless():
    with Server() as server:
        yield Observed(server)
        server.settled()


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({"service_tier": "batch"}, {}, ("batch", "ttlt=600s@p99")),
        ({"slo": {"class": "batch"}}, {}, ("batch", "ttlt=600s@p99")),
        ({}, {"X-SLO-Class": "batch"}, ("batch", "ttlt=600s@p99")),
        ({"service_tier": "batch", "slo": {"class": "batch"}}, {"x-slo-class": "batch"}, ("batch", "ttlt=600s@p99")),
        ({"service_tier": "auto", "slo": {"class": "relaxed"}}, {}, ("relaxed", "ttft=10s@p80,tpot=200ms@p90")),
        ({"service_tier": "chat"}, {}, ("chat", "")),
        ({"service_tier": "auto"}, {}, ("chat", "")),
        ({"service_tier": "default"}, {}, ("chat", "")),
        ({"service_tier": None}, {}, ("chat", "")),
        ({}, {}, ("chat", "")),
    ],
)
def test_a_class_reaches_the_scheduler(observed, route, fields, headers, expected):
    assert 200 == observed.post(route, fields, headers).status_code
    assert [expected] == observed.promises


@pytest.mark.parametrize(
    ("slo", "headers", "expected"),
    [
        ({"class": "relaxed", "ttft_ms": 5000}, {}, "ttft=5s@p80,tpot=200ms@p90"),
        ({"class": "relaxed", "tbt_ms": 150}, {}, "ttft=10s@p80,tbt=150ms@p90"),
        ({"class": "relaxed", "ttlt_ms": 60_000}, {}, "ttlt=60s@p99"),
        ({"class": "batch", "ttlt_ms": 60_000}, {}, "ttlt=60s@p99"),
        ({"class": "relaxed"}, {"x-slo-ttft-ms": "5000"}, "ttft=5s@p80,tpot=200ms@p90"),
        ({"class": "chat", "ttft_ms": 500}, {}, "ttft=500ms@p95"),
    ],
)
def test_own_targets_go_before_those_of_the_class(observed, slo, headers, expected):
    assert 200 == observed.post(COMPLETIONS, {"slo": slo}, headers).status_code
    assert [expected] == [targets for _, targets in observed.promises]


def tier_of(route: str, answer: dict[str, object]) -> object:
    """The class in a whole answer. Anthropic's API has it in the usage."""
    return (answer["usage"] if route == MESSAGES else answer).get("service_tier")


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"service_tier": "batch"}, "batch"), ({"slo": {"class": "batch"}}, "batch"), ({"service_tier": "auto"}, "chat"), ({}, None)],
)
def test_the_answer_says_the_class_if_the_request_names_one(observed, route, fields, expected):
    assert expected == tier_of(route, observed.post(route, fields).json())


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_every_chunk_of_a_stream_says_the_class(observed, route):
    text = observed.post(route, {"service_tier": "batch", "stream": True}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks
    assert {"batch"} == {chunk["service_tier"] for chunk in chunks}


@pytest.mark.parametrize("route", [RESPONSES, MESSAGES])
def test_the_events_of_a_stream_say_the_class(observed, route):
    assert '"service_tier": "batch"' in observed.post(route, {"service_tier": "batch", "stream": True}).text


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"service_tier": "bach"}, {}, "service_tier"),
        ({"service_tier": "flex"}, {}, "service_tier"),
        ({"service_tier": ""}, {}, "service_tier"),
        ({"service_tier": 3}, {}, "service_tier"),
        ({"service_tier": "x" * 65}, {}, "service_tier"),
        ({"slo": {"class": "bach"}}, {}, "slo.class"),
        ({"slo": {"class": "auto"}}, {}, "slo.class"),
        ({"slo": {"class": ["batch"]}}, {}, "slo.class"),
        ({}, {"x-slo-class": "bach"}, "x-slo-class"),
        ({}, {"x-slo-class": ""}, "x-slo-class"),
        ({}, {"x-slo-class": "batch" * 1000}, "x-slo-class"),
        ({"service_tier": "batch", "slo": {"class": "chat"}}, {}, "slo.class"),
        ({"service_tier": "batch"}, {"x-slo-class": "chat"}, "x-slo-class"),
        ({"slo": {"class": "batch"}}, {"x-slo-class": "chat"}, "x-slo-class"),
    ],
)
def test_a_wrong_class_is_refused_by_its_place_and_reaches_nobody(observed, route, fields, headers, param):
    assert param == error_of(observed.post(route, fields, headers), 400)["param"]
    assert [] == observed.promises


def test_an_unknown_class_is_answered_with_the_known_ones(observed):
    message = error_of(observed.post(COMPLETIONS, {"service_tier": "bach"}), 400)["message"]
    assert "service_tier: unknown class 'bach' (did you mean 'batch'?); known: chat, batch, relaxed" == message


def test_messages_refuse_an_unknown_class_in_their_own_form(observed):
    response = observed.post(MESSAGES, {"service_tier": "bach"})
    assert (400, "invalid_request_error") == (response.status_code, response.json()["error"]["type"])


@pytest.mark.parametrize("tier", ["auto", "default", "flex", "priority", "scale", "standard_only"])
def test_without_classes_the_tiers_of_hosted_servers_have_no_effect(classless, tier):
    assert "service_tier" not in classless.post(CHAT, {"service_tier": tier}).json()
    assert [("", "")] == classless.promises


@pytest.mark.parametrize(
    ("fields", "param"), [({"service_tier": "batch"}, "service_tier"), ({"slo": {"class": "flex"}}, "slo.class")]
)
def test_without_classes_none_can_be_named(classless, fields, param):
    error = error_of(classless.post(CHAT, fields), 400)
    assert param == error["param"]
    assert "this server has none" in error["message"]
