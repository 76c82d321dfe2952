"""Each router sends requests where its name says."""

from dataclasses import replace

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import Setup
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.metrics.report import report
from stallfree.perf.fitted import Fitted
from stallfree.policies import load as policy
from stallfree.sim.routers import NAMES, load
from stallfree.sim.simulate import simulate
from stallfree.workload.prompt import Prompt
from stallfree.workload.workload import Arrival, Workload

COST = Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005))
CAPACITY = Capacity(16, 2000, 8192)


def run(arrivals, router, replicas=2, **more):
    return simulate(
        arrivals,
        lambda: policy("sarathi", token_budget=256),
        COST,
        CAPACITY,
        replicas=replicas,
        router=router,
        records=True,
        **more,
    )


def run_slo(arrivals, **more):
    def slo():
        return policy("slo", Setup(Fitted.from_state(COST.state()), Slo.parse("ttft=5s,tbt=100ms")))

    return simulate(arrivals, slo, COST, CAPACITY, replicas=2, router="least-ttft", records=True, **more)


def served(result) -> list[list[str]]:
    """Who arrived at each replica."""
    return [sorted((a.id for r in records for a in r.arrived), key=int) for records in result.records]


def test_round_robin_takes_turns():
    assert [["0", "2", "4"], ["1", "3"]] == served(run([Arrival(i * 0.01, 100, 5) for i in range(5)], "round-robin"))


def test_the_least_loaded_has_the_fewest_requests():
    # The first stays on replica 0 all along, so the short ones, one after another, go to replica 1.
    arrivals = [Arrival(0.0, 100, 500), *(Arrival(1.0 + i, 100, 2) for i in range(4))]
    assert [["0"], ["1", "2", "3", "4"]] == served(run(arrivals, "least-loaded"))


def test_the_shortest_queue_counts_tokens_and_not_requests():
    arrivals = [Arrival(0.0, 4000, 5), *(Arrival(0.001 * i, 200, 5) for i in range(1, 6))]
    assert [["0"], ["1", "2", "3", "4", "5"]] == served(run(arrivals, "shortest-queue"))


def test_the_tokens_of_a_long_prompt_count_less_as_it_is_computed():
    # When the third comes, most of the first prompt is done, in one leap that is still under way.
    arrivals = [Arrival(0.0, 4000, 5), Arrival(0.3, 1500, 5), Arrival(0.301, 1600, 5)]
    assert [["0", "2"], ["1"]] == served(run(arrivals, "shortest-queue"))


def test_prefix_affinity_keeps_a_familys_prompts_together_and_hits_the_cache():
    coming = Workload.parse("poisson", "2500/20").draw(1.5, 1, requests=60)
    families = [replace(a, blocks=tuple(100 * (i % 4) + b for b in range(4))) for i, a in enumerate(coming)]

    def cached(router):
        result = run(families, router, replicas=3, reuse=True)
        return sum(count for records in result.records for r in records for _, count in r.cached)

    assert cached("prefix-affinity") > cached("round-robin") > 0


def test_prefix_affinity_does_not_put_everybody_in_one_place():
    arrivals = [Arrival(0.001 * i, 1024, 50, (7, 8)) for i in range(40)]
    assert all(len(ids) >= 8 for ids in served(run(arrivals, "prefix-affinity", reuse=True)))


def test_least_ttft_takes_the_replica_that_is_done_earliest():
    arrivals = [Arrival(0.0, 4000, 5), *(Arrival(0.001 * i, 200, 5) for i in range(1, 6))]
    assert [["0"], ["1", "2", "3", "4", "5"]] == served(run_slo(arrivals))


def test_least_ttft_spreads_what_arrives_at_one_moment():
    assert [["0", "2"], ["1", "3"]] == served(run_slo([Arrival(0.0, 1000, 5) for _ in range(4)]))


def test_least_ttft_takes_a_busier_replica_if_its_cache_saves_more_than_the_wait():
    arrivals = [
        Arrival(0.0, 4097, 2, tuple(range(8))),
        Arrival(20.0, 2500, 2, (0, 1)),  # some 1,500 tokens to compute where the first one was
        Arrival(20.001, 4097, 2, tuple(range(8))),
        Arrival(20.002, 1100, 2, (0, 1)),  # here the cache saves less than the wait
    ]
    assert [["0", "1", "2"], ["3"]] == served(run_slo(arrivals, reuse=True))


def test_a_forecast_does_not_keep_what_another_replicas_cache_has():
    replicas = run_slo([Arrival(0.0, 2049, 2, tuple(range(4)))], reuse=True).replicas
    request = Request("a", Prompt(2049, tuple(range(4)), -9), 2)
    before = request.lookup
    cached, uncached = (replica.forecast(request) for replica in replicas)
    assert cached < uncached
    assert before == request.lookup


@pytest.mark.parametrize("router", NAMES)
def test_every_router_serves_everybody(router):
    coming = Workload.parse("gamma:cv=3", "median=300,p90=900/median=30,p90=100").draw(8, 2, requests=100)
    assert 100 == report(run(coming, router, replicas=3).lines).completed


def test_leaps_end_where_steps_do_in_a_cluster():
    coming = Workload.parse("gamma:cv=3", "median=300,p90=900/median=30,p90=100").draw(8, 2, requests=100)
    for router in NAMES:
        leaps, steps = (run(coming, router, replicas=3, leap=leap, limits=Limits(32)) for leap in (64, 1))
        assert steps.records == leaps.records, router


def test_an_unknown_router_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'least-loaded'"):
        load("least-load")
