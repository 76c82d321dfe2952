"""A record is one line of JSON; only complete records of this version are read."""

from dataclasses import replace

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.record import RARE, Refusal, StepRecord
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


def whole(request: Request) -> StepRecord:
    return StepRecord.from_json(run(Sarathi(), [request], Capacity(16, 10, 100))[0].to_json())


def test_what_hardly_anybody_has_is_not_written(line):
    assert not [name for name in RARE if f'"{name}"' in line]


def test_a_record_says_whose_a_request_is_and_what_it_was_promised():
    request = Request("a", range(5), 2, tenant="acme", weight=3.0, service_class="batch")
    request.predicted = 0.25
    record = whole(request)
    assert ([("a", "acme", 3.0)], [("a", "batch")], [("a", 0.25)]) == (record.tenants, record.classes, record.predicted)


def test_a_weight_is_kept_without_a_tenant():
    assert [("a", "", 2.0)] == whole(Request("a", range(5), 2, weight=2.0)).tenants


def test_refusals_are_read_back(line):
    refused = replace(StepRecord.from_json(line), refused=[Refusal(1.5, "acme", "60 requests a minute")])
    assert refused == StepRecord.from_json(refused.to_json())
