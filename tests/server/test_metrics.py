"""The samples of /metrics for given records, under our names and under vLLM's."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stallfree.core.draft import ENGINE_LIMIT
from stallfree.core.ledger import Ledger
from stallfree.core.plan import Capacity
from stallfree.core.record import Arrived, Delivered, Finished, StepRecord
from stallfree.core.slo import Slo
from stallfree.core.tier import Tier
from stallfree.metrics.stalls import StallAccount
from stallfree.server.metrics import FINISHED, Metrics
from stallfree.server.sharing import MOST_LABELS
from stallfree.server.vllm_names import NAMES

ROOT = Path(__file__).parents[2]
TARGET = Slo.parse("ttft=150ms,tbt=100ms")


def step(number: int, t_start: float, t_end: float, work, **fields) -> StepRecord:
    """An iteration in which all get a token."""
    values = {
        "emitted": [id for id, _, _ in work], "cached": [], "arrived": [], "finished": [], "preempted": [], "stalled": [],
        "num_running": 2, "num_waiting": 1, "free_blocks": 9, "budget": 64, "reason": "a is due", "limit_s": 0.08, "margin": 1.25,
    }  # fmt: skip
    return StepRecord(number, t_start, t_start, t_end, work, **values | fields)


def arrival(id: str, prompt_tokens: int = 10, slo: str = "") -> Arrived:
    return Arrived(id, 0.0, prompt_tokens, 9, 0, slo)


FIRST = step(0, 0.02, 0.1, [("a", 4, 6)], arrived=[arrival("a")], cached=[("a", 4)], reason="nobody decodes", limit_s=None)
HYBRID = step(1, 0.1, 0.3, [("a", 10, 1), ("b", 0, 30)], arrived=[arrival("b", 30)], cached=[("b", 0)])
END = step(2, 0.3, 0.35, [("a", 11, 1), ("b", 30, 1)], finished=[Finished("a", "length")])


def served(*records: StepRecord, slo: Slo | None = TARGET) -> dict[tuple[str, ...], float]:
    """Sample name and label values -> value, once through Prometheus' own parser."""
    metrics, account = Metrics("toy", slo), StallAccount(slo)
    for record in records:
        account.record(record)
        metrics.record(record, account)
    text = metrics.expose(Ledger(Capacity(16, 10, 128), reserve="prompt"), 0.0).decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {(s.name.removeprefix("stallfree_"), *s.labels.values()): s.value for family in families for s in family.samples}


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, ...], float]:
    return served(FIRST, HYBRID, END)


def test_bubbles_of_a_pipeline_add_up():
    samples = served(*(replace(record, bubble_s=0.25) for record in (FIRST, HYBRID, END)))
    assert 0.75 == samples["pipeline_bubble_seconds_total",]


def test_tokens_are_counted_by_phase(samples):
    assert (36, 3) == (samples["step_tokens_total", "prefill"], samples["step_tokens_total", "decode"])


def test_a_late_token_adds_its_lateness_under_its_cause(samples):
    assert (1, pytest.approx(0.1)) == (samples["late_tokens_total", "prefill"], samples["decode_stall_seconds_total", "prefill"])
    assert 0 == samples["late_tokens_total", "decodes"]


def test_tokens_in_time_are_counted_beside_all_that_had_a_deadline(samples):
    assert (3, 2) == (samples["slo_tokens_total", "tbt"], samples["slo_tokens_in_time_total", "tbt"])
    assert (2, 1) == (samples["slo_tokens_total", "ttft"], samples["slo_tokens_in_time_total", "ttft"])
    assert pytest.approx(0.15) == samples["first_token_late_seconds_total",]
    assert 0 == samples["slo_tokens_total", "tpot"]


def test_a_request_is_in_time_with_no_more_late_tokens_than_its_percentile_leaves():
    strict, loose = served(FIRST, HYBRID, END), served(FIRST, HYBRID, END, slo=Slo.parse("ttft=150ms,tbt=100ms@p50"))
    assert (1, 0) == (strict["slo_requests_total",], strict["slo_requests_in_time_total",])
    assert (1, 1) == (loose["slo_requests_total",], loose["slo_requests_in_time_total",])


def test_a_request_s_own_target_is_what_its_tokens_are_held_to():
    own = step(0, 0.0, 0.1, [("a", 0, 10)], arrived=[arrival("a", slo="tbt=1s")])
    samples = served(own, step(1, 0.1, 0.5, [("a", 10, 1)]), slo=None)
    assert (1, 1) == (samples["slo_tokens_total", "tbt"], samples["slo_tokens_in_time_total", "tbt"])


def test_without_a_target_nothing_has_a_deadline():
    samples = served(FIRST, HYBRID, END, slo=None)
    assert 0 == sum(value for name, value in samples.items() if name[0].startswith(("slo_", "late_tokens", "decode_stall")))
    assert ("slack_seconds",) not in samples


def test_gauges_are_those_of_the_last_iteration(samples):
    assert (64, 0.08, 1.25) == (samples["budget_tokens",], samples["limit_seconds",], samples["margin_ratio",])
    assert pytest.approx(0.1) == samples["slack_seconds",]


def test_a_gauge_without_a_value_has_no_sample():
    samples = served(FIRST)
    assert [] == [name for name in ("limit_seconds", "slack_seconds") if (name,) in samples]


def test_reasons_of_the_budget_are_three_whatever_the_words():
    samples = served(FIRST, HYBRID, END, step(3, 0.4, 0.5, [("b", 31, 1)], reason=ENGINE_LIMIT))
    assert {"policy": 1, "deadline": 2, "engine": 1} == {name[1]: samples[name] for name in samples if name[0] == "steps_total"}


def test_the_phases_of_a_request_add_up_to_its_time(samples):
    phases = [samples[f"request_{phase}_seconds_sum",] for phase in ("queue", "prefill", "decode")]
    assert pytest.approx([0.02, 0.08, 0.25]) == phases
    assert pytest.approx(0.35) == samples["request_seconds_sum",]


def test_an_aborted_request_is_counted_and_not_timed():
    samples = served(FIRST, step(1, 0.1, 0.2, [], finished=[Finished("a", "abort")]))
    assert (1, 0) == (samples["requests_total", "abort"], samples["request_seconds_count",])
    assert 0 == samples["slo_requests_total",]


def test_drafts_are_counted_and_their_tokens_come_together():
    samples = served(
        FIRST,
        replace(step(1, 0.1, 0.2, [("a", 10, 4)]), drafted=[("a", 3)], emitted=["a", "a", "a"]),
    )
    assert (3, 2) == (samples["draft_tokens_total",], samples["accepted_draft_tokens_total",])
    assert 4 == samples["generation_tokens_total",]
    assert 4 == samples["step_tokens_total", "decode"]
    assert 3 == samples["inter_token_seconds_count",]


def test_what_was_handed_over_is_counted_with_its_share_of_decode_time():
    transfer = Delivered("a", 0.02, 0.1, 4, 6000, 0.05)
    samples = served(
        step(0, 0.1, 0.2, [("a", 10, 1)], arrived=[arrival("a")], delivered=[transfer], recalled=["b"]),
        step(1, 0.2, 0.6, [("a", 11, 1)], finished=[Finished("a", "length")]),
    )
    assert (1, 1) == (samples["kv_transfers_total", "delivered"], samples["kv_transfers_total", "recomputed"])
    assert (6000, 0.05) == (samples["kv_transfer_bytes_total",], samples["kv_transfer_seconds_total",])
    assert pytest.approx(0.1) == samples["kv_transfer_ratio",]
    assert (3, 4) == (samples["generation_tokens_total",], samples["cached_tokens_total",])
    assert pytest.approx(0.1) == samples["time_to_first_token_seconds_sum",]
    assert pytest.approx([0.02, 0.08, 0.5]) == [samples[f"request_{p}_seconds_sum",] for p in ("queue", "prefill", "decode")]
    assert pytest.approx(0.5) == samples["inter_token_seconds_sum",]


OWNED = [
    replace(FIRST, tenants=[("a", "acme", 3.0)], classes=[("a", "chat")], predicted=[("a", 0.05)]),
    HYBRID,
    END,
]


def test_requests_and_tokens_are_counted_by_tenant():
    samples = served(*OWNED)
    assert (1, 8) == (samples["tenant_requests_total", "acme"], samples["tenant_tokens_total", "acme"])
    assert {"acme"} == {name[1] for name in samples if name[0].startswith("tenant_")}


def test_hits_of_the_prefix_cache_are_counted_by_tenant():
    samples = served(replace(FIRST, tenants=[("a", "acme", 3.0)], cached=[("a", 2)]))
    (prompt,) = [request.prompt_tokens for request in FIRST.arrived]
    found = samples["tenant_prefix_lookup_tokens_total", "acme"], samples["tenant_cached_tokens_total", "acme"]
    assert (prompt, 2) == found


def test_what_comes_back_from_host_memory_is_counted_and_the_rest_of_a_long_prefix_too():
    samples = served(replace(FIRST, cached=[("a", 4)], restored=[("a", 3)]), step(1, 0.1, 0.2, [("a", 7, 1)], restored=[("a", 2)]))
    assert (5, 6) == (samples["restored_tokens_total",], samples["cached_tokens_total",])


def test_host_memory_is_a_gauge_where_there_is_any():
    ledger = Ledger(Capacity(16, 10, 128), reserve="prompt")
    assert "\nstallfree_host_kv_blocks " not in Metrics("toy").expose(ledger, 0.0).decode()
    ledger.pool.tier = Tier(7, 1)
    text = Metrics("toy").expose(ledger, 0.0).decode()
    assert "stallfree_host_kv_blocks 7.0" in text
    assert "stallfree_used_host_kv_blocks 0.0" in text


def test_late_tokens_are_counted_by_class():
    samples = served(*OWNED)
    assert (2, 1) == (samples["class_tokens_total", "chat"], samples["class_late_tokens_total", "chat"])
    assert (1, 0) == (samples["class_requests_total", "chat"], samples["class_requests_in_time_total", "chat"])


def test_a_forecast_is_counted_by_how_wrong_it_was():
    samples = served(*OWNED)
    assert (1, pytest.approx(2)) == (samples["first_token_forecast_ratio_count",], samples["first_token_forecast_ratio_sum",])


def test_refusals_are_counted_by_tenant_and_reason():
    metrics = Metrics("toy")
    for tenant, reason in (("acme", "late"), ("acme", "late"), ("", "queue")):
        metrics.refuse(tenant, reason)
    text = metrics.expose(Ledger(Capacity(16, 10, 128), reserve="prompt"), 0.0).decode()
    assert 'stallfree_refused_total{reason="late",tenant="acme"} 2.0' in text
    assert 'stallfree_refused_total{reason="queue",tenant=""} 1.0' in text


def test_a_client_that_makes_up_names_gets_no_more_series():
    metrics = Metrics("toy")
    for number in range(100):
        metrics.refuse(f"tenant-{number}", "late")
    (family,) = [family for family in metrics.collect() if family.name == "stallfree_refused"]
    assert MOST_LABELS + 1 == len(family.samples)
    assert 100 - MOST_LABELS == next(sample.value for sample in family.samples if sample.labels["tenant"] == "other")


def test_prefill_engines_are_counted_where_they_are_asked():
    ledger = Ledger(Capacity(16, 10, 128), reserve="prompt")
    text = Metrics("toy").expose(ledger, 0.0, (1, 2)).decode()
    assert "stallfree_prefill_engines 1.0" in text
    assert "stallfree_prefill_engines_configured 2.0" in text
    assert "\nstallfree_prefill_engines" not in Metrics("toy").expose(ledger, 0.0).decode()


def test_buckets_are_cumulative_and_end_with_all(samples):
    assert [0, 2, 3, 3] == [samples["inter_token_seconds_bucket", le] for le in ("0.025", "0.075", "0.3", "+Inf")]
    assert (3, pytest.approx(0.3)) == (samples["inter_token_seconds_count",], samples["inter_token_seconds_sum",])


def test_the_prefix_cache_is_counted_in_tokens(samples):
    assert (40, 4) == (samples["prefix_lookup_tokens_total",], samples["cached_tokens_total",])


@pytest.mark.parametrize(
    ("vllm", "own"),
    [
        ("vllm:num_requests_running", "running_requests"),
        ("vllm:num_requests_waiting", "waiting_requests"),
        ("vllm:kv_cache_usage_perc", "kv_usage_ratio"),
        ("vllm:gpu_cache_usage_perc", "kv_usage_ratio"),
        ("vllm:num_preemptions_total", "preemptions_total"),
        ("vllm:prompt_tokens_total", "prompt_tokens_total"),
        ("vllm:generation_tokens_total", "generation_tokens_total"),
        ("vllm:prefix_cache_queries_total", "prefix_lookup_tokens_total"),
        ("vllm:prefix_cache_hits_total", "cached_tokens_total"),
        ("vllm:time_to_first_token_seconds_sum", "time_to_first_token_seconds_sum"),
        ("vllm:inter_token_latency_seconds_count", "inter_token_seconds_count"),
        ("vllm:time_per_output_token_seconds_count", "inter_token_seconds_count"),
        ("vllm:request_time_per_output_token_seconds_count", "request_tpot_seconds_count"),
        ("vllm:e2e_request_latency_seconds_sum", "request_seconds_sum"),
        ("vllm:request_queue_time_seconds_sum", "request_queue_seconds_sum"),
        ("vllm:request_prefill_time_seconds_sum", "request_prefill_seconds_sum"),
        ("vllm:request_decode_time_seconds_sum", "request_decode_seconds_sum"),
        ("vllm:request_inference_time_seconds_sum", "request_service_seconds_sum"),
        ("vllm:request_prompt_tokens_sum", "request_prompt_tokens_sum"),
        ("vllm:request_generation_tokens_sum", "request_output_tokens_sum"),
        ("vllm:iteration_tokens_total_sum", "tokens_per_step_sum"),
    ],
)
def test_a_series_has_vllm_s_name_and_labels_too(samples, vllm, own):
    assert samples[own,] == samples[vllm, "0", "toy"]


def test_requests_by_reason_have_vllm_s_label():
    metrics = Metrics("toy")
    text = metrics.expose(Ledger(Capacity(16, 10, 128), reserve="prompt"), 0.0).decode()
    for reason in FINISHED:
        assert f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="toy"}} 0.0' in text


def test_a_bucket_of_iteration_tokens_has_vllm_s_name(samples):
    assert 3 == samples["vllm:iteration_tokens_total_bucket", "0", "64.0", "toy"]


def test_every_name_with_an_alias_is_one_of_ours():
    families = {family.name.removeprefix("stallfree_") for family in Metrics("toy").collect()}
    assert set() == set(NAMES) - families


def test_the_dashboard_asks_only_for_what_the_server_has():
    dashboard = json.loads((ROOT / "docs" / "grafana" / "stallfree.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queried = {name for expression in expressions for name in re.findall(r"stallfree_\w+", expression)}
    text = Metrics("toy", TARGET).expose(Ledger(Capacity(16, 10, 128), reserve="prompt"), 0.0).decode()
    families = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    ends = {"histogram": ("_bucket", "_sum", "_count")}
    exposed = {name + end for name, kind in families.items() for end in ends.get(kind, ("",))}
    assert queried
    assert set() == queried - exposed


def test_the_document_lists_every_metric_with_its_alias():
    document = (ROOT / "docs" / "metrics.md").read_text()
    names = {family.name.removeprefix("vllm:") for family in Metrics("toy").collect()}
    assert [] == sorted(name for name in names if f"`{name}" not in document)
