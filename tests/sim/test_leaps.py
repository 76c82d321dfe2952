"""For any arrivals and any machine, leaps give the same records as single steps, to the last bit."""

import hypothesis.strategies as st
from hypothesis import given, settings

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.perf.fitted import Fitted
from stallfree.policies import load, names
from stallfree.sim.replica import Replica, script
from tests.virtual import run

COST = Fitted((0.011, 0.0042, 0.0025, 0.0025, 0.0002, 0.0005))
STEADY = [name for name in names() if getattr(load(name), "steady", False)]
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0.013, 0.2, 2.0]),  # since the one before
        st.integers(1, 90),  # prompt
        st.integers(1, 60),  # output
        st.integers(0, 2),  # priority
        st.integers(0, 2),  # family: prompts of one family begin alike
    ),
    min_size=1,
    max_size=25,
)


def requests(drawn) -> list[Request]:
    now, requests = 0.0, []
    for number, (gap, prompt, output, priority, family) in enumerate(drawn):
        now += gap
        alike = prompt * 2 // 3
        tokens = [*range(1000 * family, 1000 * family + alike), *[10_000 + number] * (prompt - alike)]
        requests.append(Request(str(number), tokens, output, arrival=now, priority=priority))
    return requests


@settings(max_examples=300, deadline=None)
@given(
    policy=st.sampled_from(STEADY),
    drawn=ARRIVALS,
    block_size=st.sampled_from([1, 4, 16]),
    num_tokens=st.integers(160, 1200),
    max_seqs=st.integers(1, 12),
    budget=st.integers(4, 40),
    watermark=st.sampled_from([0, 0.01, 0.2]),
)
def test_leaps_write_the_records_of_steps(policy, drawn, block_size, num_tokens, max_seqs, budget, watermark):
    options = {"token_budget": budget} if policy == "sarathi" else {}
    capacity, limits = Capacity(block_size, num_tokens // block_size, 160), Limits(max_seqs, 64, watermark)
    steps, leaps = (run(load(policy, **options), requests(drawn), capacity, limits, leap=leap) for leap in (1, 64))
    assert steps == leaps


@settings(max_examples=100, deadline=None)
@given(drawn=ARRIVALS, policy=st.sampled_from(STEADY), num_blocks=st.integers(11, 80), every=st.sampled_from([0.003, 0.02, 0.1]))
def test_what_a_replica_counts_at_any_moment_is_the_same_in_leaps(drawn, policy, num_blocks, every):
    options = {"token_budget": 24} if policy == "sarathi" else {}
    steps, leaps = (Replica(Scheduler(load(policy, **options), Capacity(16, num_blocks, 160)), COST, leap=leap) for leap in (1, 64))
    now, coming = 0.0, [[script(r, [7] * r.max_tokens) for r in requests(drawn)] for _ in range(2)]
    while coming[0] or steps.num_requests:
        for replica, waiting in zip((steps, leaps), coming, strict=True):
            while waiting and waiting[0].arrival <= now:
                replica.take(waiting.pop(0))
            replica.run(now)
        assert (steps.pending(now), steps.num_requests) == (leaps.pending(now), leaps.num_requests)
        now += every
