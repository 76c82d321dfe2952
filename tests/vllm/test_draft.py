"""vLLM's requests as the policy sees them, without vLLM."""

import ast
import inspect
from types import SimpleNamespace

import pytest

from stallfree.core.request import Status
from stallfree.perf.fitted import Fitted
from stallfree.policies import slo
from stallfree.qos import order, turns
from stallfree.vllm.draft import Iteration, View, VllmDraft


def view(
    name: str, prompt: int, *, computed: int = 0, output: int = 0, in_flight: int = 0, most: int = 100, drafts: int = 0
) -> View:
    request = SimpleNamespace(
        request_id=name,
        priority=0,
        arrival_time=0.0,
        _output_token_ids=[7] * output,
        _all_token_ids=[7] * (prompt + output),
        num_prompt_tokens=prompt,
        num_computed_tokens=computed,
        num_output_placeholders=in_flight,
        max_tokens=most,
        spec_token_ids=[1] * drafts,
    )
    return View(request, 0.0, None, None)


def draft(running=(), waiting=(), *, most=100, seats=8, free=1000, ahead=True, speculates=False) -> VllmDraft:
    return VllmDraft(
        running,
        iter(waiting),
        0.0,
        num_waiting=len(waiting),
        most=most,
        seats=seats,
        free=free,
        block_size=16,
        cached=lambda v: 0,
        ahead=ahead,
        speculates=speculates,
    )


@pytest.mark.parametrize(
    ("of", "kind"),
    [
        (view("decode", 10, computed=10, output=1), "decoding"),
        (view("its first token is in flight", 10, computed=10, in_flight=1), "decoding"),
        (view("its last token is in flight", 10, computed=10, in_flight=1, most=1), "neither"),
        (view("prompt", 10, computed=4), "prefilling"),
        (view("last token of a prompt", 10, computed=9), "prefilling"),
        (view("computed again", 10, computed=3, output=5), "prefilling"),
        (view("its last chunk is in flight", 10, computed=10), "neither"),
    ],
    ids=lambda value: value.id if isinstance(value, View) else "",
)
def test_a_request_is_a_decode_or_a_prefill(of, kind):
    made = draft([of])
    assert {"decoding": ([of], []), "prefilling": ([], [of]), "neither": ([], [])}[kind] == (made.decoding, made.prefilling)


def test_decodes_get_their_tokens_in_order_while_there_are_any():
    def streams() -> list[View]:
        return [view(f"s{i}", 10 + i, computed=10 + i, output=1) for i in range(20)]

    short, roomy = draft(streams(), most=12), draft(streams())
    short.decode_all()
    assert (short.shape, short.left) == ([(10 + i, 1) for i in range(12)], 0)
    roomy.decode_all()
    assert (roomy.shape, roomy.left) == ([(10 + i, 1) for i in range(20)], 80)


def test_a_decode_whose_speculated_tokens_do_not_fit_is_passed_over():
    made = draft([view(f"s{n}", 10, computed=10, output=1, drafts=n) for n in (3, 9, 1)], most=8, speculates=True)
    made.decode_all()
    assert (made.shape, made.left) == ([(10, 4), (10, 2)], 2)


def test_drafts_of_speculation_are_charged():
    made = draft([view("s", 10, computed=10, output=1, drafts=3)], speculates=True)
    made.decode_all()
    assert made.shape == [(10, 4)]
    assert made.left == 96


def test_an_admission_needs_a_seat_tokens_and_blocks():
    waiting = [view(f"w{i}", 40) for i in range(3)]
    assert [draft(waiting=waiting, seats=2).admit(w) for w in waiting[:1]] == [40]
    few = draft(waiting=waiting, free=5)
    assert [few.admit(w) for w in [view(f"x{i}", 40) for i in range(3)]] == [40, 0, 0]
    seats = draft(seats=1)
    assert [seats.admit(w, 8) for w in [view(f"y{i}", 40) for i in range(2)]] == [8, 0]
    assert draft(most=10).admit(view("z", 40)) == 10


def test_caps_are_for_those_who_get_less_than_they_need():
    stream, long, other = view("s", 10, computed=10, output=1), view("long", 500, computed=100), view("other", 50, computed=20)
    made = draft([stream, long, other])
    made.decode_all()
    assert made.prefill(long, 60) == 60
    new = view("new", 30)
    assert made.admit(new) == 30
    assert made.caps == {"long": 60, "other": 0}
    assert new.status is Status.RUNNING


def test_nobody_gets_work_twice():
    stream, long = view("s", 10, computed=10, output=1), view("long", 500, computed=100)
    made = draft([stream, long])
    made.decode_all()
    made.decode_all()
    assert made.left == 99
    assert made.prefill(long, 10) == 10
    assert made.prefill(long, 10) == 0
    assert made.admit(long) == 0
    assert made.shape == [(10, 1), (100, 10)]


def read_by(module, name: str) -> set[str]:
    """What a module reads of the variables called `name`."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name}


def test_all_that_the_policy_reads_of_a_draft_is_there():
    wanted = set().union(*(read_by(module, "draft") for module in (slo, order, turns)))
    only_with_lanes_or_tenants = {"displace", "first", "full", "kv_tokens", "queue_version"}
    assert wanted - set(dir(VllmDraft)) == only_with_lanes_or_tenants


def test_the_policy_plans_and_learns():
    policy = slo.Slo("tbt=100ms@p99", Fitted())
    streams = [view(f"s{i}", 10, computed=10, output=1) for i in range(3)]
    prompts, late = [view("long", 5000), view("short", 30)], [view("begun", 5000, computed=64)]
    for step, made in enumerate(
        (draft(waiting=prompts, most=8000), draft(streams, prompts, most=8000), draft(streams + late), draft())
    ):
        policy.plan(made)
        assert made.work.keys() >= {*made.decoding}
        decoding, others = [v for v in made.work if v in made.decoding], [v for v in made.work if v not in made.decoding]
        done = Iteration(step, made, decoding, others, [False] * len(others), made.shape, [], [], [])
        policy.learn(done, done.requests, made.now + 0.05)
    assert prompts[1].status is Status.RUNNING
