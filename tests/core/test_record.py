"""A record is one line of JSON; only complete records of this version are read."""

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.policies.sarathi import Sarathi
from tests.virtual import run


@pytest.fixture
def line() -> str:
    return run(Sarathi(), [Request("a", range(5), 2)], Capacity(16, 10, 100))[0].to_json()


def test_a_record_cut_short_is_refused(line):
    with pytest.raises(ValueError, match="cut short"):
        StepRecord.from_json(line[:-10])


def test_a_record_of_another_version_is_refused(line):
    with pytest.raises(ValueError, match="of version 3 but of 99"):
        StepRecord.from_json(line.replace('"version":3', '"version":99'))


def test_a_record_with_a_field_missing_is_refused(line):
    with pytest.raises(ValueError, match="other fields"):
        StepRecord.from_json(line.replace('"budget"', '"bucket"'))


def test_a_record_of_before_there_were_bubbles_has_none(line):
    old = line.replace(',"bubble_s":0.0', "")
    assert old != line
    assert StepRecord.from_json(line) == StepRecord.from_json(old)


def test_a_record_says_who_arrived_and_what_they_asked_for(line):
    assert [("a", 0.0, 5, 2, 0, "", ())] == StepRecord.from_json(line).arrived
