"""Each request's timeline, from a run's records."""

from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.metrics.timeline import Timeline, timelines
from stallfree.policies import load
from tests.virtual import run

ROOMY = Capacity(16, 1000, 4096)


def two_streams_and_a_long_prompt(policy: str):
    requests = [Request("a", range(10), 40), Request("b", range(100, 110), 40), Request("long", range(1000, 2000), 2, arrival=0.1)]
    return timelines(run(load(policy), requests, ROOMY))


def test_every_token_of_every_request_has_its_time():
    lines = two_streams_and_a_long_prompt("sarathi")
    assert {"a": 40, "b": 40, "long": 2} == {id: len(line.tokens) for id, line in lines.items()}
    assert {"length"} == {line.reason for line in lines.values()}
    assert all(line.arrival <= line.scheduled < line.tokens[0] <= line.finished for line in lines.values())
    assert all(gap > 0 for line in lines.values() for gap in line.gaps)


def test_ttft_counts_from_the_arrival():
    line = Timeline("a", arrival=2.0, prompt_tokens=5, tokens=[2.5, 2.75])
    assert (0.5, [0.25]) == (line.ttft, line.gaps)


def test_a_whole_prompt_stalls_each_stream_once_under_prefill_first_and_never_under_sarathi():
    assert [1, 1, 0] == [line.stalls for line in two_streams_and_a_long_prompt("prefill-first").values()]
    assert [0, 0, 0] == [line.stalls for line in two_streams_and_a_long_prompt("sarathi").values()]


def test_a_whole_prompt_makes_tokens_late_under_orca_though_nobody_is_left_out():
    lines = two_streams_and_a_long_prompt("orca").values()
    assert 0 == sum(line.stalls for line in lines)
    assert 2 == sum(gap > 0.1 for line in lines for gap in line.gaps)


def test_a_timeline_says_whose_it_is_and_what_was_promised():
    request = Request("a", range(10), 2, tenant="acme", service_class="batch", priority=1)
    line = timelines(run(load("sarathi"), [request, Request("b", range(10), 2)], ROOMY))
    assert ("acme", "batch", 1) == (line["a"].tenant, line["a"].service_class, line["a"].priority)
    assert ("", "", 0) == (line["b"].tenant, line["b"].service_class, line["b"].priority)
