"""Two pools: each adapter is loaded where its requests' prompts are computed and where they decode, and nobody starves."""

from collections import Counter
from dataclasses import replace
from typing import ClassVar
from unittest.mock import patch

import pytest

from stallfree.core.slo import Slo
from stallfree.sim import pairings, split
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.replica import Replica
from stallfree.sim.shelf import Shelf
from stallfree.sim.simulator import Instance, instance
from stallfree.sim.split import SplitSimulator
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

PREFILL = Deployment("llama2-7b", policy="hybrid-only", max_tokens=2048, max_model_len=4096, rank="8,16")
DECODE = Deployment("llama2-7b", policy="sarathi", token_budget=512, max_model_len=4096, rank="8,16")
CHATS = Traffic(lengths="median=500,p90=2000/median=60,p90=200", max_total=4000, requests=80, adapters=30)


class Loading(Replica):
    """A replica whose ledger is checked after every iteration, and that counts the adapters that it loads by their pool."""

    counts: ClassVar[Counter[tuple[str, str]]] = Counter()
    """By the policy of the replica, and the adapter."""

    def _complete(self):
        super()._complete()
        self.scheduler.ledger.check()

    def _load(self, now):
        before = set(self.scheduler.ledger.adapters.resident)
        super()._load(now)
        came = self.scheduler.ledger.adapters.resident.keys() - before
        Loading.counts.update((type(self.scheduler.policy).__name__, key) for key in came)
        assert Loading.counts.total() < 5000, "adapters come and go, and nobody is served"


def pools(pairing="distserve", **more) -> Split:
    return Split(PREFILL, DECODE, pairing, **({"nodes": 2, "per_node": 1} | more))


def small(load_s: float, blocks: int, size: int = 20) -> Instance:
    shelf = Shelf((8,), lambda rank: size, lambda rank: load_s)
    placed = instance(replace(DECODE, rank=None))
    return placed._replace(capacity=replace(placed.capacity, num_blocks=blocks), shelf=shelf, front_s=0.0)


def served(arrivals, prefill=None, decode=None, pairing="distserve", **more):
    arrivals = list(arrivals)
    Loading.counts = Counter()
    with patch.object(split, "Replica", Loading):
        result = SplitSimulator(pools(pairing, **more), prefill, decode).run(arrivals)
    assert Counter(a.output_tokens for a in arrivals) == Counter(len(line.tokens) for line in result.lines)
    assert all(line.tokens == sorted(line.tokens) for line in result.lines)
    return result


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
@pytest.mark.parametrize("rate", [2.0, 12.0])
def test_everybody_gets_all_tokens(pairing, rate):
    many = pools(pairing, nodes=2, per_node=4)
    many = replace(many, prefill=replace(PREFILL, replicas=2), decode=replace(DECODE, replicas=3))
    arrivals = list(CHATS.stream(rate, 0))
    result = SplitSimulator(many).run(arrivals)
    assert Counter(a.output_tokens for a in arrivals) == Counter(len(line.tokens) for line in result.lines)


def test_both_pools_load_each_adapter():
    arrivals = list(replace(CHATS, requests=20).stream(2.0, 0))
    served(arrivals, small(0.01, 1000), small(0.01, 1000))
    asked = {a.adapter for a in arrivals if a.output_tokens > 1}
    assert {(policy, key) for policy in ("HybridOnly", "Sarathi") for key in asked} <= Loading.counts.keys()


def test_a_request_waits_in_the_decode_pool_until_its_adapter_is_there():
    one = [Arrival(0.0, 1000, 20, adapter="0")]
    fast, slow = (served(one, small(0.0, 2000), small(load_s, 2000)) for load_s in (0.0, 3.0))
    # The adapter begins to load when the decode pool expects the request: when the prompt is computed.
    assert fast.lines[0].tokens[0] + 3.0 == pytest.approx(slow.lines[0].tokens[0], abs=0.01)
    assert fast.lines[0].gaps == pytest.approx(slow.lines[0].gaps)


def test_a_request_whose_adapter_is_there_goes_before_one_that_waits():
    arrivals = [Arrival(0.0, 100, 20, adapter="0"), Arrival(0.5, 100, 20, adapter="1"), Arrival(0.6, 100, 20)]
    lines = {line.id: line for line in served(arrivals, small(0.0, 2000), small(5.0, 2000)).lines}
    assert lines["2"].tokens[-1] < lines["0"].tokens[0] < lines["1"].tokens[0]


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
def test_everybody_is_served_when_few_of_the_adapters_fit(pairing):
    """In each pool 30 adapters would take 600 of 340 blocks."""
    served(CHATS.stream(3.0, 0), small(0.05, 340), small(0.05, 340), pairing)
    assert max(Counter(key for _, key in Loading.counts.elements()).values()) > 2


def test_a_rare_adapter_is_served_while_others_would_take_every_block_of_the_decode_pool():
    """Requests for two adapters keep the decode pool full; one for a third comes early and is not among the last."""
    arrivals = [Arrival(0.1 * number, 500, 150, adapter=str(number % 2)) for number in range(150)]
    arrivals.insert(51, Arrival(5.01, 500, 150, adapter="2"))
    result = served(arrivals, small(0.01, 4000), small(0.01, 200))
    order = [line.id for line in sorted(result.lines, key=lambda line: line.tokens[0])]
    assert order.index("51") < 51 + 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": None}, "each adapter is in both pools, but prefill has rank 8,16 and decode None; give the same"),
        ({"adapter_modules": "all"}, "prefill has adapter_modules attention and decode all"),
        ({"policy": "slo", "token_budget": None, "on_late": "refuse"}, "two pools forecast no first tokens"),
    ],
)
def test_pools_that_cannot_serve_them_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        SplitSimulator(Split(PREFILL, replace(DECODE, **change), nodes=2, per_node=1))


def test_requests_for_adapters_need_their_rank():
    plain = Split(replace(PREFILL, rank=None), replace(DECODE, rank=None), nodes=2, per_node=1)
    with pytest.raises(ValueError, match="give --rank 8"):
        SplitSimulator(plain).run(CHATS.stream(2.0, 0))


def test_a_trial_is_the_same_again():
    simulator = SplitSimulator(pools())
    first, again = (simulator.trial(CHATS, 3.0, 1, Slo.parse("ttft=1s")) for _ in range(2))
    assert first == again
