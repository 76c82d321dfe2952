"""What Prometheus reads: valid, once under our names and once under vLLM's, and enough for the dashboard."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.policies.prefill_first import PrefillFirst
from stallfree.policies.slo import Slo as Policy
from stallfree.server.metrics import Metrics
from tests.virtual import run

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
CAPACITY = Capacity(16, 200, 2048)


def read(policy, slo: str, requests) -> dict[tuple[str, tuple], float]:
    """Every sample by its name and its labels' values, in the order of their names, after `requests` were served."""
    metrics, end = Metrics("toy", Slo.parse(slo)), 0.0
    for record in run(policy, requests, CAPACITY):
        metrics.record(record)
        end = record.t_end
    text = metrics.expose(Scheduler(policy, CAPACITY), end).decode()
    return {
        (s.name, tuple(s.labels[name] for name in sorted(s.labels))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.fixture(scope="module")
def stopped():
    """Two streams that a prompt of 1,000 tokens stops for 0.4 s, under targets of 50 ms and, for TTFT, 200 ms."""
    short = [Request(f"short-{i}", range(100 * i, 100 * i + 20), 40, arrival=0.01 * i) for i in range(2)]
    return read(PrefillFirst(), "tbt=50ms,ttft=200ms", [*short, Request("long", range(5000, 6000), 5, arrival=0.2)])


def test_tokens_are_counted_by_phase(stopped):
    assert 1040 == stopped["stallfree_step_tokens_total", ("prefill",)]
    assert 39 + 39 + 4 == stopped["stallfree_step_tokens_total", ("decode",)]
    assert 85 == stopped["stallfree_generation_tokens_total", ()]


def test_stall_seconds_have_kind_and_cause(stopped):
    short, long = 0.018, 0.410
    assert 3 == stopped["stallfree_decode_stalls_total", ("prefill", "left out")]
    assert 2 == stopped["stallfree_decode_stalls_total", ("left out", "late")]
    assert short + 2 * long == pytest.approx(stopped["stallfree_decode_stall_seconds_total", ("prefill", "left out")])
    assert 2 * (long - 0.050) < stopped["stallfree_decode_stall_seconds_total", ("left out", "late")] < 2 * long


def test_attainment_is_judged_token_by_token_and_request_by_request(stopped):
    assert (82, 2) == (stopped["stallfree_slo_cases_total", ("tbt",)], stopped["stallfree_slo_late_total", ("tbt",)])
    assert (3, 1) == (stopped["stallfree_slo_cases_total", ("ttft",)], stopped["stallfree_slo_late_total", ("ttft",)])
    assert 1 - 2 / 82 == pytest.approx(stopped["stallfree_slo_attainment", ("tbt",)])
    assert (3, 0) == (stopped["stallfree_requests_total", ("length",)], stopped["stallfree_good_requests_total", ()])


def test_a_policy_with_a_deadline_shows_budget_reason_limit_margin_and_slack():
    short = [Request(f"short-{i}", range(100 * i, 100 * i + 20), 40, arrival=0.01 * i) for i in range(2)]
    found = read(Policy("tbt=50ms"), "tbt=50ms", [*short, Request("long", range(5000, 6000), 5, arrival=0.2)])
    assert found["stallfree_steps_total", ("deadline",)] > 10
    assert found["stallfree_steps_total", ("nobody decodes",)] >= 1
    assert found["stallfree_margin", ()] >= 1
    assert 0 < found["stallfree_limit_seconds", ()] < 0.051
    assert 0 < found["stallfree_slack_seconds", ()] < 0.05
    assert 3 == found["stallfree_good_requests_total", ()]


def test_the_same_numbers_have_vllms_names(stopped):
    labels = ("0", "toy")
    assert stopped["stallfree_generation_tokens_total", ()] == stopped["vllm:generation_tokens_total", labels]
    assert 3 == stopped["vllm:request_success_total", ("0", "length", "toy")]
    for name in (
        "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    ):  # fmt: skip
        assert stopped[f"vllm:{name}_count", labels] in (3, 82), name
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= {name for name, _ in stopped}


def test_a_requests_own_target_is_what_it_is_judged_by():
    metrics = Metrics("toy", Slo.parse("tbt=50ms"))
    for record in run(PrefillFirst(), [Request("a", range(20), 10, slo=Slo.parse("tbt=1ms"))], CAPACITY):
        metrics.record(record)
    assert b'stallfree_slo_late_total{target="tbt"} 9.0' in metrics.expose(Scheduler(PrefillFirst(), CAPACITY), 1.0)


def test_what_has_ended_is_forgotten():
    metrics = Metrics("toy")
    for record in run(PrefillFirst(), [Request(str(i), range(20), 3) for i in range(5)], CAPACITY):
        metrics.record(record)
    assert {} == metrics._lives
    assert {} == metrics._account._streams


def test_every_metric_of_the_dashboard_is_there(stopped):
    dashboard = json.loads(DASHBOARD.read_text())
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expr in exprs for name in re.findall(r"\bstallfree_\w+", expr)}
    assert len(used) > 15
    assert used <= {name for name, _ in stopped} | {"stallfree_slack_seconds"}
