"""Lengths of answers, from those seen: the usual one, one that is hardly exceeded, and what is left of an answer that has begun."""

import pytest

from stallfree.core.request import Request
from stallfree.qos.answers import FIRST, MOST_TENANTS, Answers


def request(tenant: str = "", written: int = 0, most: int = 1000, reason: str | None = None) -> Request:
    r = Request("r", [1], most, tenant=tenant)
    r.output = [1] * written
    r.finish_reason = reason
    return r


def seen(*lengths: int, tenant: str = "") -> Answers:
    answers = Answers()
    for length in lengths:
        answers.learn(request(tenant, length, reason="stop"))
    return answers


def test_before_any_answer_a_guess_stands_in_that_max_tokens_bounds():
    assert FIRST == Answers().left(request()) == Answers().most_left(request())
    assert 7 == Answers().left(request(most=7))


def test_the_rest_of_an_answer_is_that_of_the_longer_ones():
    answers = seen(*[10] * 50, *[100] * 50)
    assert 55 == answers.left(request())
    assert 100 - 20 == answers.left(request(written=20))
    assert 100 == answers.most_left(request())


def test_an_answer_longer_than_any_goes_on_for_a_quarter():
    assert 50 == seen(10, 20).left(request(written=200))


def test_a_tenant_with_few_answers_is_taken_to_be_like_all():
    answers = seen(*[100] * 20, tenant="a")
    for _ in range(3):
        answers.learn(request("b", 10, reason="stop"))
    assert answers.left(request("b")) > 80
    for _ in range(10):
        answers.learn(request("b", 10, reason="stop"))
    assert 10 == answers.left(request("b"))
    assert 100 == answers.left(request("a"))


def test_only_whole_answers_tell():
    answers = Answers()
    answers.learn(request(written=3, reason="abort"))
    assert FIRST == answers.left(request())


def test_old_answers_are_forgotten():
    answers = seen(*[1000] * 128, *[10] * 128)
    assert 10 == pytest.approx(answers.left(request()))


def test_so_many_tenants_and_no_more_are_remembered():
    answers = Answers()
    for number in range(2 * MOST_TENANTS):
        answers.learn(request(str(number), 5, reason="stop"))
    assert MOST_TENANTS == len(answers._tenants)
