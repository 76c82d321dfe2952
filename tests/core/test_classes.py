"""Service classes in words: read, written again, and refused with what to write instead."""

import pytest

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo

WORDS = "interactive: ttft=1s,tbt=50ms; batch: ttlt=10min"


def test_each_class_has_its_own_targets_and_the_first_is_the_default():
    classes = Classes.parse(WORDS)
    assert ["interactive", "batch"] == list(classes)
    assert Slo.parse("ttft=1s,tbt=50ms") == classes.default == classes["interactive"]
    assert 600 == classes.find("batch").ttlt.seconds


def test_targets_without_a_name_are_the_only_class():
    assert {"": Slo.parse("tbt=50ms")} == dict(Classes.parse("tbt=50ms"))


@pytest.mark.parametrize("words", [WORDS, "tbt=50ms", "a: tpot=20ms@p90;"])
def test_classes_are_written_as_they_are_read(words):
    assert dict(Classes.parse(words)) == dict(Classes.parse(str(Classes.parse(words))))


def test_a_class_with_a_time_for_the_whole_answer_takes_no_other_target_from_the_default():
    classes = Classes.parse(WORDS)
    assert classes["batch"] == classes["batch"].within(classes.default)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("interactive: ; batch: ttlt=10min", "class 'interactive' has no targets"),
        ("a: tbt=1s; a: tbt=2s", "class 'a' is there twice"),
        ("a b: tbt=1s", "'a b: tbt=1s' does not begin with the name of a class"),
        ("a: tbt=1s; tbt=2s", "'tbt=2s' does not begin with the name of a class"),
        ("; ", "there is no class"),
        ("a: tbt=5", "tbt=5 has no unit"),
        ("a: ttlt=0min", "a latency target is a time above 0"),
    ],
)
def test_what_cannot_be_read_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Classes.parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [(WORDS, "unknown class 'bach' .did you mean 'batch'.*known: interactive, batch"), ("tbt=1s", "this server has none")],
)
def test_a_request_that_names_an_unknown_class_is_told_the_known_ones(words, message):
    with pytest.raises(ValueError, match=message):
        Classes.parse(words).find("bach")
