"""A run explained in words: the whole run, a step, a request."""

from dataclasses import replace

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Loaded, Refusal, Run
from stallfree.core.request import Request
from stallfree.core.slo import Slo as Targets
from stallfree.metrics.explain import Explained
from stallfree.perf.fitted import Fitted
from stallfree.policies.prefill_first import PrefillFirst
from stallfree.policies.slo import Slo
from tests.metrics.test_stalls import DECODE, step
from tests.virtual import run

CAPACITY = Capacity(16, 200, 2048)


def explained(policy, slo: str) -> Explained:
    short = [Request(f"short-{i}", range(100 * i, 100 * i + 20), 40, arrival=0.01 * i) for i in range(3)]
    requests = [*short, Request("long", range(5000, 6000), 5, arrival=0.2)]
    return Explained(Run("a-policy", CAPACITY, Limits(), slo=slo), run(policy, requests, CAPACITY))


@pytest.fixture(scope="module")
def stopped() -> Explained:
    return explained(PrefillFirst(), "tbt=50ms@p99")


def test_the_whole_names_the_policy_the_late_tokens_and_the_culprit(stopped):
    text = "\n".join(stopped.on_the_whole())
    assert "under policy a-policy, tbt=50ms@p99." in text
    assert "4 requests arrived and got 125 tokens; ended: 4 by length." in text
    assert "6 ready decodes left out of iterations, 3 tokens late." in text
    assert "the prompt of long (1000 tokens) delayed 6 tokens" in text
    assert "other engine" not in text


def test_a_step_says_what_it_computed_and_whom_it_left_out(stopped):
    text = "\n".join(stopped.step(max(r.step for r in stopped.records if r.stalled)))
    assert "0 decodes." in text
    assert "1000 tokens of prefill of long: 0 to 1000 of 1000; admitted here after" in text
    assert "Ready, but left out: short-0, short-1, short-2." in text
    assert "short-1 waited: 410 ms since its token before; left out of step" in text


def test_a_step_of_the_slo_policy_says_its_limit_and_whether_it_was_kept():
    explanation = explained(Slo("tbt=50ms"), "tbt=50ms@p99")
    step = next(r.step for r in explanation.records if r.limit_s is not None)
    text = "\n".join(explanation.step(step))
    assert "The limit was" in text
    assert "of them used:" in text


def test_a_request_says_what_it_waited_for_and_its_stalls(stopped):
    text = "\n".join(stopped.request("short-2"))
    assert "short-2 arrived at 0.020 s: 20 prompt tokens, at most 40 of output." in text
    assert "Its prompt was computed in 1 chunk over" in text
    assert "2 stalled or late tokens:" in text
    assert "1000 prefill tokens of long" in text


def test_a_request_says_whom_its_prompt_delayed(stopped):
    text = "\n".join(stopped.request("l"))
    assert "Its own prompt delayed 6 tokens of 3 others: short-0, short-1, short-2." in text
    assert "0 stalled or late tokens." in text


def test_what_is_not_there_is_named(stopped):
    with pytest.raises(ValueError, match="step 9999 is not in the record; it holds steps 0 to"):
        list(stopped.step(9999))
    with pytest.raises(ValueError, match="no request in the record begins with 'x'; the first is short-0"):
        list(stopped.request("x"))
    with pytest.raises(ValueError, match="3 requests begin with 'short': short-0, short-1, short-2"):
        list(stopped.request("short"))
    with pytest.raises(ValueError, match="holds no iterations"):
        Explained(stopped.run, [])


@pytest.fixture(scope="module")
def kept_waiting() -> Explained:
    """Two streams that fill the target by themselves, and a prompt that waits."""
    streams = [Request(f"stream-{i}", range(100 * i, 100 * i + 20), 1200) for i in range(2)]
    requests = [*streams, Request("patient", range(5000, 5400), 5, arrival=1.0)]
    slo = "tbt=14ms@p99,ttft=500ms"
    return Explained(
        Run("slo", CAPACITY, Limits(), slo=slo), run(Slo(slo, Fitted((0.010, 0.04, 0.02, 0.02, 0, 0))), requests, CAPACITY)
    )


def test_a_request_says_what_kept_its_prompt_waiting(kept_waiting):
    text = "\n".join(kept_waiting.request("patient"))
    assert "iterations held no prefill at all, the last one step" in text
    assert "until stream-" in text


def test_the_whole_names_the_longest_waits_for_a_first_token(kept_waiting):
    text = "\n".join(kept_waiting.on_the_whole())
    assert "waited for long. The longest waits:" in text
    assert "patient waited" in text
    assert "iterations until then held no prefill at all; the last:" in text


def shared() -> Explained:
    """Three streams, and a prompt that comes in between and waits too long. One more was refused."""
    short = [Request(f"short-{i}", range(100 * i, 100 * i + 20), 40, arrival=0.01 * i, tenant="acme", weight=3.0) for i in range(3)]
    long = Request(
        "long", range(5000, 6000), 5, arrival=0.2, tenant="crawler", slo=Targets.parse("ttft=100ms"), service_class="batch"
    )
    long.predicted = 0.2
    records = run(PrefillFirst(), [*short, long], CAPACITY)
    records[3].refused.append(Refusal(0.3, "crawler", "the first token would come in about 2.50 s"))
    records[4].refused.append(Refusal(0.4, "crawler", "the first token would come in about 3.25 s"))
    return Explained(Run("slo", CAPACITY, Limits(), slo="tbt=50ms@p99"), records)


def test_the_whole_says_whose_tokens_were_late():
    text = "\n".join(shared().on_the_whole())
    assert "3 of these late tokens are of tenant acme" in text
    assert "class" not in text


def test_the_whole_says_who_was_refused_and_why():
    text = "\n".join(shared().on_the_whole())
    assert "2 requests were refused:" in text
    assert "2 of tenant crawler, the last one at 0.400 s, because: the first token would come in about 3.25 s" in text


def test_the_whole_counts_relegations_and_compares_forecasts():
    text = "\n".join(shared().on_the_whole())
    assert "1 request was relegated" in text
    assert "1 first token was forecast; actual times are 2." in text


def test_a_request_says_whose_it_is_what_was_expected_and_when_it_was_relegated():
    text = "\n".join(shared().request("long"))
    assert "at most 5 of output, of tenant crawler with weight 1, class batch, own targets ttft=100ms@p90." in text
    assert "At its arrival, its first token was expected after 200 ms." in text
    assert "It was relegated at 0.300 s at the latest: ttft=100ms@p90 could not be met any more" in text


def test_a_step_says_who_was_refused_before_it():
    explanation = shared()
    text = "\n".join(explanation.step(explanation.records[3].step))
    assert "A request of tenant crawler was refused at 0.300 s, because: the first token would" in text


def test_a_run_that_nobody_shares_says_nothing_of_it(stopped):
    text = "\n".join([*stopped.on_the_whole(), *stopped.request("long")])
    assert not [word for word in ("tenant", "class", "refused", "relegated", "forecast") if word in text]


def test_a_stream_that_is_passed_over_often_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr("stallfree.metrics.explain.WORST", 0)
    lines = list(explained(PrefillFirst(), "").request("short-2"))
    assert 1 == sum("passed over in" in line for line in lines)
    assert not [line for line in lines if "left out of step" in line]


def test_a_request_says_whether_it_waited_for_its_adapter():
    records = run(PrefillFirst(), [Request(f"r{i}", range(20), 3, arrival=0.01 * i) for i in range(3)], CAPACITY)
    arrived = [a for r in records for a in r.arrived]
    first = replace(
        records[0],
        adapters=[(a.id, "dutch", 3, 8) for a in records[0].arrived],
        loaded=[Loaded("dutch", 8, 3, arrived[0].arrival, records[0].t_plan)],
    )
    late = [replace(r, adapters=[(a.id, "dutch", 3, 8) for a in r.arrived]) for r in records[1:]]
    explanation = Explained(Run("a-policy", CAPACITY, Limits()), [first, *late])
    assert "Adapters were loaded 1 times" in "\n".join(explanation.on_the_whole())
    assert "Adapter dutch was loaded into 3 KV blocks" in "\n".join(explanation.step(first.step))
    assert "Its adapter dutch was resident." in "\n".join(explanation.request("r2"))


@pytest.mark.parametrize(("per_100_ranks", "blamed"), [(0.05, True), (0.0001, False)])
def test_a_large_adapter_is_blamed_for_a_long_iteration_if_the_prices_say_so(per_100_ranks, blamed):
    cost = Fitted((0.01, 0, 0, 0, 0, 0, per_100_ranks, 0))
    first = step(0, 0.0, 0.14, [("a", 0, 10)], adapters=[("a", "big", 9, 256)])
    explanation = Explained(Run("a-policy", CAPACITY, Limits(), slo="tbt=100ms"), [first, step(1, 0.14, 0.28, DECODE)], cost)
    whole, request = "\n".join(explanation.on_the_whole()), "\n".join(explanation.request("a"))
    assert blamed == ("the adapter big (rank 256) delayed 1 token" in whole)
    assert blamed == ("for 1 decode; the adapter big of rank 256 took about" in request)
