"""After every event the counts of pools and replicas equal a count of their requests one by one, also while some are held, expected
or preempted. An expected request that does not come leaves nothing behind.
"""

from collections import Counter
from dataclasses import replace
from math import inf, nextafter
from random import Random
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from stallfree.core.plan import Capacity
from stallfree.core.request import Request, Status
from stallfree.core.scheduler import Scheduler
from stallfree.perf.fitted import Fitted
from stallfree.policies import load as policy
from stallfree.sim import pairings, split
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.replica import Replica, script
from stallfree.sim.simulator import instance
from stallfree.sim.split import SplitSimulator
from stallfree.sim.transfer import Pools, Transfer
from stallfree.workload.workload import Arrival

PREFILL = Deployment("llama2-7b", policy="hybrid-only", max_tokens=2048, max_model_len=4096, replicas=2)
DECODE = Deployment("llama2-7b", policy="sarathi", token_budget=512, max_model_len=4096, replicas=2)
POOLS = {"prefill": PREFILL, "decode": DECODE}
BURST = [Arrival(0.002 * i, 50 + 97 * i % 700, 1 + 53 * i % 500) for i in range(40)]
ARRIVALS = st.lists(st.builds(Arrival, st.floats(0, 3), st.integers(1, 1900), st.integers(1, 300)), min_size=1, max_size=30).map(
    lambda many: sorted(many, key=lambda a: a.at)
)


class Stepping(Replica):
    """A replica without leaps."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more | {"leap": 1})


class Remembering(Stepping):
    """A replica that remembers every request that it took."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.taken: list[Request] = []

    def take(self, request):
        self.taken.append(request)
        super().take(request)

    def unfinished(self) -> list[Request]:
        inside = self.scheduler.ledger.requests
        to_come = [r for r in self.taken if r.status is Status.WAITING and not r.output and r.id not in inside]
        return [*inside.values(), *to_come]


class Watched(Pools):
    """Pools that are counted anew after every event. `preempted`: preempted requests that these counts met."""

    preempted = 0

    def _place(self, request):
        super()._place(request)
        self.count(request.arrival)

    def _run(self, until):
        while (due := min([self.fabric.due, *(replica.due for replica in (*self.prefill, *self.decode))])) < until:
            super()._run(nextafter(due, inf))
            self.count(due)

    def count(self, now):
        for replica in (*self.prefill, *self.decode):
            requests = replica.unfinished()
            assert sum(r.num_tokens - r.num_planned for r in requests) == replica.pending(now)
            assert len(requests) == replica.num_requests
            replica.scheduler.ledger.check()
            Watched.preempted += sum(r.num_preemptions > 0 for r in requests)
        for number, replica in enumerate(self.decode):
            ways = self._transfers.values()
            promised = [p.request for p in ways if p.target == number and p.twin is None]
            without_room = [*promised, *(p.twin for p in ways if p.target == number and p.twin is not None and not p.room)]
            used = {block for r in replica.scheduler.ledger.requests.values() for block in r.blocks}
            assert len(used) + sum(-(-len(r.prompt) // 16) for r in without_room) == self.kv(number)
            assert len(replica.unfinished()) + len(promised) == self.load(number)


def served(pairing, arrivals, blocks, pools=POOLS):
    """`arrivals` in two pools, with so many KV blocks in a replica of each, counted after every event."""
    parts = [instance(pool) for pool in pools.values()]
    small = [part._replace(capacity=replace(part.capacity, num_blocks=number)) for part, number in zip(parts, blocks, strict=True)]
    with patch.object(split, "Pools", Watched), patch.object(split, "Replica", Remembering):
        result = SplitSimulator(Split(**pools, pairing=pairing, link="eth-25g", nodes=2, per_node=2), *small).run(arrivals)
    assert Counter(a.output_tokens for a in arrivals) == Counter(len(line.tokens) for line in result.lines)
    return result


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
@settings(max_examples=20, deadline=None)
@given(arrivals=ARRIVALS, blocks=st.tuples(st.integers(260, 1000), st.integers(260, 1000)))
def test_counts_are_those_of_the_requests_after_every_event(pairing, arrivals, blocks):
    served(pairing, arrivals, blocks)


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
def test_counts_are_those_of_the_requests_also_where_some_are_preempted(pairing):
    Watched.preempted = 0
    served(pairing, BURST, (140, 140))
    assert Watched.preempted > 0


def lines(split_, parts, arrivals):
    result = SplitSimulator(split_, *parts).run(arrivals)
    return sorted(result.lines, key=lambda line: int(line.id)), result.transfers


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
@settings(max_examples=60, deadline=None)
@given(
    arrivals=ARRIVALS,
    blocks=st.tuples(st.integers(140, 600), st.integers(140, 600)),
    link=st.sampled_from(["eth-25g", "ib-200g"]),
)
@example(arrivals=BURST, blocks=(140, 140), link="eth-25g")
def test_pools_that_leap_give_the_times_of_single_steps_to_the_last_bit(pairing, arrivals, blocks, link):
    parts = [instance(pool) for pool in POOLS.values()]
    small = [part._replace(capacity=replace(part.capacity, num_blocks=number)) for part, number in zip(parts, blocks, strict=True)]
    pools = Split(**POOLS, pairing=pairing, link=link, nodes=2, per_node=2)
    leaps = lines(pools, small, arrivals)
    with patch.object(split, "Replica", Stepping):
        assert leaps == lines(pools, small, arrivals)


class Late(pairings.Splitwise):
    """The decode replica is chosen at the arrival, and KV leaves when the prompt is computed."""

    __slots__ = ()
    overlap = False


def test_counts_are_those_of_the_requests_where_what_is_promised_is_long_in_coming():
    with patch.dict(pairings.PAIRINGS, {"late": Late}):
        served("late", BURST, (140, 140))
        served(
            "late", [Arrival(0.01 * i, 1500, 1) for i in range(8)], (1000, 200), POOLS | {"decode": replace(DECODE, max_output=60)}
        )


@pytest.mark.parametrize("pairing", pairings.PAIRINGS)
def test_a_request_that_ends_with_its_first_token_leaves_nothing_where_it_was_expected(pairing):
    # They ask for more tokens than they get, so nobody knows their end before. The decode pool has room for two at a time.
    served(pairing, [Arrival(0.01 * i, 1500, 1) for i in range(8)], (1000, 200), POOLS | {"decode": replace(DECODE, max_output=60)})


def test_a_prompt_that_is_preempted_sends_its_kv_once():
    draw = Random(9)
    many = [Arrival(draw.uniform(0, 4), draw.randint(20, 900), draw.randint(1, 600)) for _ in range(25)]
    sent: dict[Transfer, list[float]] = {}
    send = Pools._send

    def noted(pools, transfer, tokens, begin):
        sent.setdefault(transfer, []).append(tokens)
        send(pools, transfer, tokens, begin)

    one_each = {
        "prefill": replace(PREFILL, policy="sarathi", token_budget=256, replicas=1, engine="graph"),
        "decode": replace(DECODE, replicas=1, engine="graph"),
    }
    with patch.object(Pools, "_send", noted):
        served("splitwise", sorted(many, key=lambda a: a.at), (150, 150), one_each)
    assert any(transfer.request.num_preemptions for transfer in sent)
    for transfer, parts in sent.items():
        assert min(parts) >= 0
        assert len(transfer.request.prompt) == pytest.approx(sum(parts))


def test_a_token_machine_with_as_many_requests_promised_as_it_may_run_takes_no_more():
    two_each = POOLS | {"decode": replace(DECODE, max_seqs=2)}
    result = served("splitwise", [Arrival(0.001 * i, 500, 20) for i in range(8)], (1000, 1000), two_each)
    assert (4, 4) == (result.transfers.transferred, result.transfers.local)


def test_a_request_that_is_delivered_with_its_last_token_has_ended():
    ended: list[str] = []
    replica = Replica(
        Scheduler(policy("sarathi", token_budget=64), Capacity(16, 100, 1000)),
        Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005)),
        ended=lambda request: ended.append(request.id),
        leap=1,
    )
    request = script(Request("a", range(50), 1), [7])
    replica.expect(request, 0.0)
    assert request is replica.admit(0.0)
    replica.deliver(request, 7, 2.0)
    assert (["a"], 0, 0) == (ended, replica.num_requests, replica.pending(2.0))
    assert 2.0 == request.sampling.line.finished
