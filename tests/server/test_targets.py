"""A request's own latency targets, from its body or its headers, reach the scheduler; wrong ones are refused."""

import pytest

from stallfree.core.slo import Slo
from tests.server.conftest import Server
from tests.server.test_bad_input import COMPLETIONS, error_of

BODY = {"prompt": "abc", "max_tokens": 2}


@pytest.fixture(scope="module")
def observed():
    """A server with an SLO, and its requests' own targets, in turn."""
    with Server(slo=Slo.parse("ttft=1s@p95,tbt=100ms@p99.5")) as server:
        targets = []
        submit = server.engine.scheduler.submit
        server.engine.scheduler.submit = lambda request: (targets.append(str(request.slo or "")), submit(request))[1]
        yield server, targets
        server.settled()


@pytest.mark.parametrize(
    ("slo", "headers", "expected"),
    [
        ({"ttft_ms": 500, "tbt_ms": 40.5}, {}, "ttft=500ms@p95,tbt=40.5ms@p99.5"),
        ({"tpot_ms": 70}, {}, "tpot=70ms@p99.5"),
        ({"ttlt_ms": 600_000}, {}, "ttlt=600s@p99"),
        (None, {"x-slo-ttlt-ms": "60000", "x-llm-d-slo-ttlt-ms": "60000"}, "ttlt=60s@p99"),
        ({"ttft_ms": None}, {}, ""),
        ({}, {}, ""),
        (None, {"x-slo-ttft-ms": "1500", "x-slo-tbt-ms": "33.25"}, "ttft=1.5s@p95,tbt=33.25ms@p99.5"),
        (None, {"X-LLM-D-SLO-TTFT-MS": "250"}, "ttft=250ms@p95"),
        (None, {"x-llm-d-slo-tpot-ms": "50"}, "tpot=50ms@p99.5"),
        ({"ttft_ms": 250}, {"x-slo-ttft-ms": "250", "x-slo-tbt-ms": "80"}, "ttft=250ms@p95,tbt=80ms@p99.5"),
        (None, {}, ""),
    ],
)
def test_targets_reach_the_scheduler_with_the_servers_percentiles(observed, slo, headers, expected):
    server, targets = observed
    targets.clear()
    assert 200 == server.post(COMPLETIONS, BODY | {"slo": slo}, headers=headers).status_code
    assert [expected] == targets


@pytest.mark.parametrize(
    ("slo", "headers", "param"),
    [
        (None, {"x-slo-tbt-ms": "fast"}, "x-slo-tbt-ms"),
        (None, {"x-slo-tbt-ms": ""}, "x-slo-tbt-ms"),
        (None, {"x-slo-tbt-ms": "0"}, "x-slo-tbt-ms"),
        (None, {"x-slo-ttft-ms": "-5"}, "x-slo-ttft-ms"),
        (None, {"x-slo-ttlt-ms": "10min"}, "x-slo-ttlt-ms"),
        (None, {"x-slo-ttft-ms": "nan"}, "x-slo-ttft-ms"),
        (None, {"x-slo-ttft-ms": "1e3"}, "x-slo-ttft-ms"),
        (None, {"x-llm-d-slo-ttft-ms": "9" * 400}, "x-llm-d-slo-ttft-ms"),
        ({"ttft_ms": 100}, {"x-slo-ttft-ms": "200"}, "x-slo-ttft-ms"),
        ({"ttlt_ms": 100}, {"x-slo-ttlt-ms": "200"}, "x-slo-ttlt-ms"),
        (None, {"x-slo-ttft-ms": "100", "x-llm-d-slo-ttft-ms": "200"}, "x-llm-d-slo-ttft-ms"),
        ({"tbt_ms": 100}, {"x-slo-tpot-ms": "100"}, "x-slo-tpot-ms"),
        ({"tbt_ms": 100, "tpot_ms": 100}, {}, "slo.tpot_ms"),
        ({"tbt": 100}, {}, "slo.tbt"),
    ],
)
def test_wrong_targets_are_refused_by_their_place_and_reach_nobody(observed, slo, headers, param):
    server, targets = observed
    targets.clear()
    assert param == error_of(server.post(COMPLETIONS, BODY | {"slo": slo}, headers=headers), 400)["param"]
    assert [] == targets
