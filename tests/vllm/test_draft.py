"""vLLM's requests as the policy sees them, without vLLM."""

from types import SimpleNamespace

import pytest

from stallfree.core.request import Status
from stallfree.vllm.draft import View, VllmDraft


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
