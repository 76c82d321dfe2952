"""A latency target is parsed from text; text without a meaning is refused with text that has one."""

import pytest

from stallfree.core.slo import Slo, Target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tbt=100ms@p99", Slo(tbt=Target(0.1, 99))),
        ("tbt=100ms", Slo(tbt=Target(0.1, 99))),
        ("ttft=2s", Slo(ttft=Target(2, 90))),
        (" ttft = 2s@p95 , tpot=50ms@p99.9", Slo(ttft=Target(2, 95), tpot=Target(0.05, 99.9))),
        ("tbt=500us@P50", Slo(tbt=Target(0.0005, 50))),
        ("tbt=1e2ms@99", Slo(tbt=Target(0.1, 99))),
    ],
)
def test_words_become_numbers(text: str, expected: Slo) -> None:
    assert str(expected) == str(Slo.parse(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tbt=-5", "has no unit"),
        ("tbt=-5ms", "a time above 0"),
        ("tbt=0ms", "a time above 0"),
        ("tbt=100", "write tbt=100ms or tbt=100s"),
        ("tbt=100m", "unknown unit 'm'"),
        ("tbt=100ms@p0", "p0 cannot be promised"),
        ("tbt=100ms@p100", "below p100"),
        ("tbt=100ms@often", "write @p99"),
        ("tbt=1.2.3ms", "is not a number"),
        ("itl=100ms", "known are ttft, tbt, tpot"),
        ("tbt=100ms,tbt=50ms", "two targets for tbt"),
        ("tbt=100ms,tpot=50ms", "give one of them"),
        ("100ms", "write ttft=2s@p90,tbt=100ms@p99"),
        ("", "write ttft=2s@p90,tbt=100ms@p99"),
        ("tbt=100ms,", "write ttft=2s@p90,tbt=100ms@p99"),
        ("tbt=nanms", "is not a latency target"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Slo.parse(text)


@pytest.mark.parametrize("text", ["tbt=100ms@p99", "ttft=2s@p90,tbt=1.5s@p50", "ttft=250ms@p90,tpot=33.3ms@p99.9"])
def test_targets_survive_the_journey_through_words(text: str) -> None:
    assert text == str(Slo.parse(text))
    assert Slo.parse(text) == Slo.parse(str(Slo.parse(text)))


def test_a_requests_own_targets_leave_the_others_as_they_are() -> None:
    default = Slo.parse("ttft=2s,tbt=100ms")
    assert "ttft=500ms@p90,tbt=100ms@p99" == str(Slo.parse("ttft=500ms").within(default))
    assert "ttft=2s@p90,tpot=50ms@p99" == str(Slo.parse("tpot=50ms").within(default))


@pytest.mark.parametrize("text", ["tbt=0.01us", "tbt=1e-9us", "tbt=1e20s", "ttft=1e300s,tpot=1e-300s"])
def test_the_words_of_any_target_can_be_read_again(text: str) -> None:
    assert Slo.parse(text) == Slo.parse(str(Slo.parse(text)))


def test_milliseconds_take_the_percentiles_of_the_default() -> None:
    default = Slo.parse("ttft=2s@p95,tpot=100ms@p99.9")
    assert "ttft=500ms@p95,tbt=50ms@p99.9" == str(Slo.of({"ttft": 500, "tbt": 50}, default))
    with pytest.raises(ValueError, match="known are ttft, tbt, tpot"):
        Slo.of({"itl": 5}, default)
