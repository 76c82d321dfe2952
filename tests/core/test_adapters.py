"""Adapters share the pool with KV. Who waits for one is parked, holds nobody up, and does not starve."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.core import transfer
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import Policy
from stallfree.core.request import Refused, Request
from stallfree.core.scheduler import Scheduler
from stallfree.policies.sarathi import Sarathi
from stallfree.policies.slo import Slo
from stallfree.policies.vtc import Vtc
from tests.virtual import answer


def scheduler(blocks: int = 20, sizes: dict[str, int] | None = None, *, max_seqs: int = 8, budget: int = 64) -> Scheduler:
    """With blocks of four tokens, and adapters of `sizes` blocks; their ranks are ten times as many."""
    s = Scheduler(Sarathi(budget), Capacity(4, blocks, 400), Limits(max_seqs, 64, watermark=0))
    s.ledger.adapters.known |= {key: (size, 10 * size) for key, size in (sizes or {}).items()}
    return s


def ask(s: Scheduler, id: str, adapter: str = "", length: int = 8, max_tokens: int = 4, **fields: object) -> Request:
    request = Request(id, range(length), max_tokens, adapter=adapter, **fields)
    s.submit(request)
    return request


def load(s: Scheduler) -> list[str]:
    """Load what finds room now, as if at once."""
    keys = []
    while (resident := s.ledger.adapters.next(s.ledger.spare)) is not None:
        keys.append(resident.key)
        s.ledger.adapters.loaded(resident.key)
    s.ledger.check()
    return keys


def step(s: Scheduler) -> set[str]:
    """Run an iteration. Returns the ids in it."""
    plan = s.schedule(0.0)
    if plan.work:
        s.complete(plan, answer(plan), 0.0)
    s.ledger.check()
    return {w.id for w in plan.work}


def run_out(s: Scheduler) -> None:
    for _ in range(1000):
        load(s)
        step(s)
        if not s.ledger.requests:
            return
    raise AssertionError("somebody starved")


def test_a_request_waits_beside_the_queue_until_its_adapter_is_here_and_others_run():
    s = scheduler(sizes={"a": 2})
    ask(s, "first", "a")
    ask(s, "plain")
    assert {"plain"} == step(s)
    assert 1 == s.ledger.num_waiting
    assert ["a"] == load(s)
    assert {"plain", "first"} == step(s)


def test_an_adapter_that_requests_use_stays_and_one_that_nobody_wants_leaves_for_another():
    s = scheduler(blocks=14, sizes={"a": 4, "b": 4, "c": 4})
    ask(s, "x", "a", max_tokens=9)
    load(s)
    step(s)
    ask(s, "y", "b", max_tokens=1)
    load(s)
    step(s)  # y has ended, and b is idle
    ask(s, "z", "c")
    assert ["c"] == load(s)
    assert {"a", "c"} == s.ledger.adapters.resident.keys()
    assert ["b"] == s.ledger.adapters.evicted
    run_out(s)


def test_kv_takes_the_room_of_idle_adapters_before_it_preempts_anybody():
    s = scheduler(blocks=10, sizes={"a": 4})
    ask(s, "x", "a", max_tokens=1)
    load(s)
    step(s)
    ask(s, "long", length=16, max_tokens=20)
    for _ in range(20):
        step(s)
    assert not s.ledger.adapters.resident
    assert 0 == s.ledger.num_waiting


def test_no_adapter_leaves_in_vain_for_a_request_that_does_not_fit_even_then():
    s = scheduler(blocks=20, sizes={"a": 3, "b": 4})
    ask(s, "x", "b", max_tokens=1)
    load(s)
    step(s)  # x has ended, and b is idle
    ask(s, "plain", length=16, max_tokens=4)  # five blocks in the end
    step(s)
    ask(s, "long", "a", length=52, max_tokens=4, arrival=1.0)  # 13 blocks: without b there are 12
    load(s)
    step(s)
    assert {"a", "b"} == s.ledger.adapters.resident.keys()
    run_out(s)


def test_who_waits_for_an_adapter_is_not_overtaken_for_ever_by_those_whose_adapters_are_here():
    s = scheduler(blocks=10, sizes={"a": 2, "big": 6}, max_seqs=2)
    ask(s, "first", "a", length=4, max_tokens=4)
    load(s)
    step(s)
    ask(s, "parked", "big", length=4, max_tokens=2, arrival=1.0)
    for number in range(60):
        ask(s, f"next {number}", "a", length=4, max_tokens=4, arrival=2.0 + number)
        load(s)
        if "parked" in step(s):
            break
    else:
        raise AssertionError("it was overtaken sixty times")
    assert number < 12
    run_out(s)


FAIR = pytest.mark.parametrize("policy", [Slo, Vtc])


def shared(policy: type[Policy], blocks: int, sizes: dict[str, int]) -> Scheduler:
    """As `scheduler`, with a policy that shares the machine among tenants."""
    s = Scheduler(policy(), Capacity(4, blocks, 400), Limits(8, 64, watermark=0))
    s.ledger.adapters.known |= {key: (size, 10 * size) for key, size in sizes.items()}
    return s


@FAIR
def test_a_tenant_s_many_rare_adapters_keep_nobody_else_s_waiting(policy):
    s = shared(policy, 20, {"rare": 2, **{str(number): 2 for number in range(100)}})
    for number in range(100):
        ask(s, f"flood {number}", str(number), tenant="flood")
    load(s)
    step(s)
    ask(s, "b", "rare", arrival=1.0, tenant="modest")
    loads = []
    while "rare" not in loads:
        step(s)
        loads += load(s)
    assert len(loads) <= 16  # by arrival, it would be the last of 93
    run_out(s)


@FAIR
def test_a_large_adapter_finds_room_while_another_tenant_s_small_ones_keep_coming(policy):
    s = shared(policy, 12, {"large": 8, **{str(number): 1 for number in range(20)}})
    ask(s, "plain", length=8, max_tokens=20, tenant="flood")
    step(s)
    ask(s, "b", "large", arrival=1.0, tenant="modest")
    for number in range(200):
        ask(s, f"flood {number}", str(number % 20), length=4, max_tokens=2, arrival=2.0 + number, tenant="flood")
        load(s)
        if "b" in step(s):
            break
    assert number < 60
    run_out(s)


@FAIR
@given(
    requests=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 24), st.integers(0, 2)), max_size=40),
    sizes=st.lists(st.integers(1, 8), min_size=6, max_size=6),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_nobody_starves_whatever_tenants_ask_for(policy, requests, sizes):
    s = shared(policy, 16, {str(number): size for number, size in enumerate(sizes)})
    for number, (adapter, tenant, length, priority) in enumerate(requests):
        ask(s, str(number), str(adapter), length, tenant=f"tenant {tenant}", priority=priority, arrival=float(number))
        if number % 3 == 0:
            load(s)
            step(s)
    run_out(s)


def test_no_circle_of_requests_waits_when_nobody_runs():
    """Found by the test above. "long" owed blocks to the parked "first" of its tenant. Its adapter could not evict that of "other"
    and "short", which come before it, and these were not asked before "long"."""
    s = shared(Slo, 16, {"a": 4, "b": 8, "c": 7, "d": 5})
    ask(s, "first", "a", 7, tenant="one", priority=2, arrival=0.0)
    load(s)
    step(s)
    ask(s, "urgent", "d", 15, tenant="one", arrival=1.0)
    ask(s, "long", "b", 17, tenant="one", priority=2, arrival=2.0)
    ask(s, "other", "c", 1, tenant="two", priority=2, arrival=3.0)
    load(s)
    step(s)
    ask(s, "short", "b", 1, tenant="two", priority=2, arrival=4.0)
    run_out(s)


def test_no_circle_of_requests_waits_for_kv_from_elsewhere():
    """The same for prompts that another engine computes."""
    s = shared(Slo, 16, {"0": 8, "1": 5, "3": 6, "5": 8})
    elsewhere, here = True, False
    for number, (where, adapter, tenant, length) in enumerate(
        [(here, "5", "a", 1), (elsewhere, "3", "a", 21), (elsewhere, "0", "b", 1), (here, "1", "a", 1), (here, "5", "a", 1),
         (elsewhere, "3", "b", 1), (here, "1", "b", 1)]
    ):  # fmt: skip
        request = Request(str(number), range(length), 4, adapter=adapter, tenant=tenant, arrival=float(number))
        if where is elsewhere:
            transfer.expect(s.ledger, request)
        else:
            s.submit(request)
        if number % 3 == 0:
            load(s)
            step(s)
    for _ in range(100):
        load(s)
        if (arrived := transfer.admit(s.ledger)) is not None:
            transfer.deliver(s.ledger, arrived, 0, 0.0)
        step(s)
    assert not s.ledger.requests


def test_the_loads_before_a_request_are_those_under_way_and_those_that_wait_before_it():
    s = scheduler(blocks=40, sizes=dict.fromkeys("abcde", 2))
    adapters = s.ledger.adapters
    for key in "abc":
        ask(s, key, key)
    adapters.next(0)
    adapters.next(0)
    new = {key: Request("new", [1], 1, adapter=key) for key in "abcde"}
    assert [1, 2, 3, 4] == [adapters.loads_until(new[key]) for key in "abcd"]
    assert 3 == adapters.loads_until(Request("urgent", [1], 1, adapter="d", priority=-1))
    assert 0 == adapters.loads_until(Request("plain", [1], 1))
    adapters.loaded("a")
    assert [0, 1, 2, 3] == [adapters.loads_until(new[key]) for key in "abcd"]


@FAIR
def test_the_loads_before_a_request_are_counted_in_the_order_of_tenants(policy):
    s = shared(policy, 40, dict.fromkeys("abcdef", 2))
    ask(s, "served", tenant="flood", length=60)
    step(s)
    for key in "abcd":
        ask(s, key, key, tenant="flood")
    ask(s, "e", "e", tenant="modest")
    step(s)
    ask(s, "more", tenant="flood", length=60)
    step(s)
    modest, flood = (Request("new", [1], 1, adapter="f", tenant=tenant) for tenant in ("modest", "flood"))
    assert 2 == s.ledger.adapters.loads_until(modest)
    assert 6 == s.ledger.adapters.loads_until(flood)


def test_an_adapter_waits_for_room_while_a_smaller_one_goes_before_it():
    s = scheduler(blocks=12, sizes={"big": 8, "small": 1})
    ask(s, "plain", length=16, max_tokens=4)  # takes five blocks in the end
    step(s)
    ask(s, "x", "big", arrival=1.0)
    ask(s, "y", "small", arrival=2.0)
    load(s)
    step(s)
    run_out(s)


def test_evicting_an_adapter_parks_those_who_wait_for_it():
    s = scheduler(blocks=12, sizes={"a": 4, "b": 6}, max_seqs=1)
    ask(s, "x", "a", length=4, max_tokens=20)
    load(s)
    step(s)
    ask(s, "y", "a", arrival=3.0)
    assert 1 == len(s.ledger.queue)
    s.abort("x")
    ask(s, "z", "b", arrival=1.0)  # it is earlier than y, and b does not fit beside a and KV
    s.ledger.adapters.evict("a")
    assert 0 == len(s.ledger.queue)
    assert 2 == s.ledger.num_waiting
    run_out(s)


def test_a_failed_load_returns_who_waited_and_gives_the_blocks_back():
    s = scheduler(sizes={"a": 3})
    asked = ask(s, "x", "a")
    resident = s.ledger.adapters.next(0)
    assert 17 == s.ledger.pool.num_free
    assert [asked] == s.ledger.adapters.failed(resident.key)
    s.abort("x", "error")
    assert 20 == s.ledger.pool.num_free
    s.ledger.check()


@pytest.mark.parametrize(
    ("fields", "message", "field"),
    [
        ({"adapter": "nobody"}, "adapter 'nobody' is not loaded", "model"),
        ({"adapter": "a", "length": 70, "max_tokens": 10}, "KV cache 80 tokens, of which adapter 'a' takes some", "prompt"),
    ],
)
def test_what_can_never_run_is_refused(fields, message, field):
    s = scheduler(sizes={"a": 3})
    with pytest.raises(Refused, match=message) as refusal:
        ask(s, "x", **fields)
    assert field == refusal.value.field
    assert not s.ledger.requests


def test_a_request_that_leaves_while_it_is_parked_leaves_no_trace():
    s = scheduler(sizes={"a": 3})
    ask(s, "x", "a")
    s.abort("x")
    assert 0 == s.ledger.num_waiting
    assert [] == load(s)


def test_another_version_under_the_same_name_finds_no_prefix_of_the_first():
    s = scheduler(sizes={"a": 1, "a#2": 1}, budget=64)
    ask(s, "x", "a", length=16, max_tokens=1)
    load(s)
    step(s)
    again, other = ask(s, "y", "a", length=16, max_tokens=1), ask(s, "z", "a#2", length=16, max_tokens=1)
    load(s)
    step(s)
    assert 12 == again.num_cached
    assert 0 == other.num_cached


def test_an_iteration_counts_each_adapter_once():
    s = scheduler(sizes={"a": 1, "b": 2})
    for id, adapter in (("x", "a"), ("y", "a"), ("z", "b"), ("plain", "")):
        ask(s, id, adapter, length=4)
    load(s)
    plan = s.schedule(0.0)
    assert (30, -1) == plan.shape[0]
    assert [(0, 4)] * 4 == plan.shape[1:]


def test_what_is_lost_takes_the_adapters_with_it():
    s = scheduler(sizes={"a": 2})
    ask(s, "x", "a")
    load(s)
    step(s)
    s.lost(restart=True)
    s.ledger.check()
    assert 20 == s.ledger.pool.num_free
    run_out(s)


def test_adapters_that_kv_from_elsewhere_waits_for_do_not_push_each_other_out():
    """One is always being loaded, so that there was never room for the request before them."""
    s = scheduler(21, {"a": 5, "b": 5, "c": 3})
    adapters, loading = s.ledger.adapters, []
    for key in "abc":
        transfer.expect(s.ledger, Request(f"with {key}", range(44), 4, adapter=key, priority=1))
    loading.append(adapters.next(s.ledger.spare))
    big = ask(s, "big", length=76, max_tokens=2)
    for _ in range(20):
        if (resident := adapters.next(s.ledger.spare)) is not None:
            loading.append(resident)
        if loading:
            adapters.loaded(loading.pop(0).key)
        step(s)
    assert big.finish_reason == "length"
