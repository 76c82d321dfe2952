"""When tokens are due: by the server's targets, by a request's own, and by a time for the whole answer."""

from math import inf

import pytest

from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.qos.answers import Answers
from stallfree.qos.deadlines import Deadlines


def request(slo: str = "", *, output: int = 0, arrival: float = 0.0, first: float = 1.0, last: float = 5.0) -> Request:
    r = Request("r", [1], 101, slo=Slo.parse(slo) if slo else None, arrival=arrival)
    r.output = [1] * output
    if output:
        r.first_token, r.last_token = first, last
    return r


def deadlines(slo: str) -> Deadlines:
    return Deadlines(Slo.parse(slo), Answers())


@pytest.mark.parametrize(
    ("server", "own", "due"),
    [
        ("tbt=100ms", "", 5.1),
        ("tbt=100ms", "tbt=300ms", 5.3),
        ("tpot=1s", "", 11.0),  # token 10 after the first
        ("ttft=2s,tpot=1s", "", 12.0),
        ("tbt=100ms", "ttlt=104s", 6.0),  # 99 s for at most 101 - 10 = 91 tokens; see below
    ],
)
def test_the_next_token_is_due(server, own, due):
    r = request(own, output=10)
    if "ttlt" in own:
        due = 5 + 99 / Answers().most_left(r)
    assert [pytest.approx(due)] == deadlines(server).nexts([r])


def test_an_answer_whose_time_is_over_keeps_an_even_pace_from_what_is_left():
    r = request("ttlt=4s", output=10)
    assert 5 < deadlines("tbt=100ms").nexts([r])[0] < inf


@pytest.mark.parametrize(("own", "due"), [("", 3.0), ("ttft=2s", 5.0), ("ttlt=10s", 8.0)])
def test_the_first_token_is_due(own, due):
    assert due == deadlines("tbt=100ms").first(request(own, arrival=3.0))


@pytest.mark.parametrize(
    ("own", "at", "missed"),
    [("", 1e9, False), ("ttft=2s", 5.5, True), ("ttft=2s", 4.5, False), ("ttlt=10s", 12.0, False), ("ttlt=10s", 13.5, True)],
)
def test_a_target_is_missed_if_the_first_token_comes_after_it(own, at, missed):
    assert missed == deadlines("tbt=100ms").missed(request(own, arrival=3.0), at)


def test_what_has_begun_misses_no_first_token():
    assert not deadlines("ttft=1s").missed(request(output=1), 1e9)
