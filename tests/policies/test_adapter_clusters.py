"""The policy keeps the number of adapters in an iteration small, and serves everybody nevertheless."""

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.policies import load
from stallfree.policies.adapter_clusters import AdapterClusters
from tests.virtual import answer


def scheduler(clusters: int, adapters: int = 8) -> Scheduler:
    """Its adapters are all here."""
    s = Scheduler(AdapterClusters(64, clusters), Capacity(16, 400, 1024), Limits(32, 64))
    s.ledger.adapters.known |= {str(number): (2, 8) for number in range(adapters)}
    return s


def ask(s: Scheduler, id: str, adapter: str, max_tokens: int = 4) -> Request:
    request = Request(id, range(8), max_tokens, adapter=adapter)
    s.submit(request)
    while (resident := s.ledger.adapters.next(0)) is not None:
        s.ledger.adapters.loaded(resident.key)
    return request


def served(s: Scheduler) -> list[tuple[set[str], int]]:
    """Run to the end. Of each iteration: the adapters in it, and the requests in it."""
    adapter = {r.id: r.adapter for r in s.ledger.requests.values()}
    iterations = []
    while s.ledger.requests:
        plan = s.schedule(0.0)
        assert plan.work
        iterations.append(({adapter[w.id] for w in plan.work} - {""}, len(plan.work)))
        s.complete(plan, answer(plan), 0.0)
        s.ledger.check()
    return iterations


@pytest.mark.parametrize("clusters", [1, 2, 5])
def test_no_iteration_has_more_adapters_than_clusters(clusters):
    s = scheduler(clusters)
    requests = [ask(s, f"r{number}", str(number % 8)) for number in range(24)]
    assert clusters == max(len(adapters) for adapters, _ in served(s))
    assert {4} == {len(r.output) for r in requests}


def test_a_later_request_with_an_adapter_of_the_batch_goes_first():
    s = scheduler(1)
    for id, adapter in (("a1", "1"), ("b1", "2"), ("a2", "1")):
        ask(s, id, adapter)
    plan = s.schedule(0.0)
    assert ["a1", "a2"] == [w.id for w in plan.work]


def test_requests_without_an_adapter_are_not_kept_out():
    s = scheduler(1)
    for id, adapter in (("a1", "1"), ("b1", "2"), ("plain", "")):
        ask(s, id, adapter)
    assert ["a1", "plain"] == [w.id for w in s.schedule(0.0).work]


def test_the_next_adapter_comes_in_when_one_has_left():
    s = scheduler(1)
    for id, adapter, tokens in (("a1", "1", 2), ("b1", "2", 2)):
        ask(s, id, adapter, tokens)
    assert [{"1"}, {"1"}, {"2"}, {"2"}] == [adapters for adapters, _ in served(s)]


@pytest.mark.parametrize(("option", "says"), [({"clusters": 0}, "clusters is 0"), ({"token_budget": 0}, "token_budget is 0")])
def test_options_below_one_are_refused(option, says):
    with pytest.raises(ValueError, match=says):
        load("adapter-clusters", **option)


def test_its_options_can_be_given_by_name():
    policy = load("adapter-clusters", token_budget=128, clusters=3)
    assert (128, 3) == (policy.token_budget, policy.clusters)
