"""Grammars are tried in another process, and nothing that a grammar does there reaches this one."""

import asyncio
import os
import time

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


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_served(monkeypatch):
    monkeypatch.setattr(compiling, "LIMIT_S", 0.0)
    grammars = Grammars(TEXT)
    (slow,) = run(grammars, Grammar(of_regex("[a-z]{1,30}"), "guided_regex"))
    assert isinstance(slow, GrammarError)
    assert "guided_regex: it takes more than 0 s to compile; make it simpler, or try again" == str(slow)


def test_the_constraint_follows_the_output():
    (constraints,) = run(Grammars(TEXT), Grammar(of_choice(["ab", "ac"]), "guided_choice"))
    (constraint,) = constraints
    ids = {letter: TEXT.encode(letter, special=False)[0] for letter in "abc"}
    (end,) = TEXT.eos_ids

    def letters(output):
        mask = constraint._find(output, len(output))
        return {letter for letter, id in ids.items() if mask[id] == 0} | ({"end"} if mask[end] == 0 else set())

    assert {"a"} == letters([])
    assert {"b", "c"} == letters([ids["a"]])
    assert {"end"} == letters([ids["a"], ids["c"]])
    assert {"b", "c"} == letters([ids["a"]]), "a request that starts again begins with fewer tokens"
