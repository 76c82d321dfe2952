"""Grammars are tried in another process, and nothing that a grammar does there reaches this one."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stallfree.grammar import compiling
from stallfree.grammar.compiling import GrammarError, Grammars
from stallfree.grammar.sources import Grammar, of_choice, of_regex
from stallfree.processes import Died, Helper
from tests.server.models import chat_text

TEXT = chat_text()


def shout(prefix):
    def answer(value):
        if value == "die":
            os._exit(3)
        while value == "hang":
            time.sleep(0.01)
        return prefix + value

    return answer


def test_a_helper_answers_again_after_a_call_that_hung_and_one_that_died():
    helper = Helper(shout, "!")
    try:
        assert "!a" == helper.call("a", 60)
        with pytest.raises(TimeoutError):
            helper.call("hang", 0.1)
        assert "!b" == helper.call("b", 60)
        with pytest.raises(Died):
            helper.call("die", 60)
        assert "!c" == helper.call("c", 60)
    finally:
        helper.close()


def run(grammars, *all_grammars):
    async def compile_them():
        return await asyncio.gather(*(grammars.constraints(g, 1) for g in all_grammars), return_exceptions=True)

    try:
        return asyncio.run(compile_them())
    finally:
        grammars.close()


def constraint_of(grammar):
    """The constraint of a grammar, with threads that outlive its compiler."""
    (constraints,) = run(Grammars(TEXT), grammar)
    (constraint,) = constraints
    constraint._threads = ThreadPoolExecutor(1)
    return constraint


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_served(monkeypatch):
    call, slow, quick = Helper.call, of_regex("[a-z]{1,30}"), of_choice(["a"])

    def called(self, source, limit_s):
        if source != slow:
            return call(self, source, 60)
        call(self, quick, 60)
        os.kill(self._process.pid, signal.SIGSTOP)  # no answer can come in time
        return call(self, source, limit_s)

    monkeypatch.setattr(Helper, "call", called)
    monkeypatch.setattr(compiling, "LIMIT_S", 0.0)
    monkeypatch.setattr(compiling, "PROCESSES", 1)
    refusal, served = run(Grammars(TEXT), Grammar(slow, "guided_regex"), Grammar(quick, "guided_choice"))
    assert isinstance(refusal, GrammarError)
    assert "guided_regex: it takes more than 0 s to compile; make it simpler, or try again" == str(refusal)
    assert len(served) == 1


def test_the_constraint_follows_the_output():
    constraint = constraint_of(Grammar(of_choice(["ab", "ac"]), "guided_choice"))
    ids = {letter: TEXT.encode(letter, special=False)[0] for letter in "abc"}
    (end,) = TEXT.eos_ids

    def letters(output):
        mask = constraint.mask(output)
        return {letter for letter, id in ids.items() if mask[id] == 0} | ({"end"} if mask[end] == 0 else set())

    assert {"a"} == letters([])
    assert {"b", "c"} == letters([ids["a"]])
    assert {"end"} == letters([ids["a"], ids["c"]])
    assert {"b", "c"} == letters([ids["a"]]), "a request that starts again begins with fewer tokens"


def test_the_constraint_says_what_may_follow_each_draft():
    constraint = constraint_of(Grammar(of_regex("ab(cb)*d"), "guided_regex"))
    a, b, c, d = (TEXT.encode(letter, special=False)[0] for letter in "abcd")

    def letters(output):
        mask = constraint.mask(output)
        return {id for id in (a, b, c, d) if mask[id] == 0}

    constraint.begin([], [a, b, c])
    assert [{a}, {b}, {c, d}, {b}] == [letters([a, b, c][:number]) for number in range(4)]
    constraint.begin([a], [b, b, c])  # the grammar does not allow the second b
    assert [{b}, {c, d}] == [letters([a]), letters([a, b])]
    with pytest.raises(ValueError, match="not allowed"):
        constraint.mask([a, b, b])
    constraint.begin([a, b, c], [b, c])
    assert {b} == letters([a, b, c])
    assert {c, d} == letters([a, b, c, b]), "drafts that were wrong leave nothing behind"
    assert {b} == letters([a])


def test_nothing_is_taken_after_a_draft_that_may_begin_the_grammar():
    opens = TEXT.encode("a", special=False)[0]
    constraint = constraint_of(Grammar(of_choice(["bc"]), "guided_choice", after=opens))
    b = TEXT.encode("b", special=False)[0]
    constraint.begin([], [opens, b])
    assert constraint.mask([]) is None
    with pytest.raises(ValueError, match="not allowed"):
        constraint.mask([opens])
    constraint.begin([opens], [b])
    assert 0 == constraint.mask([opens])[b]
