"""A run explained in words: the whole run, a step, a request."""

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Run
from stallfree.core.request import Request
from stallfree.metrics.explain import Explained
from stallfree.perf.fitted import Fitted
from stallfree.policies.prefill_first import PrefillFirst
from stallfree.policies.slo import Slo
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
