"""A run read back from its file is the same run."""

from pathlib import Path

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Run, read
from stallfree.core.request import Request
from stallfree.engine.recording import RecordFile
from stallfree.policies.sarathi import Sarathi
from tests.virtual import run

RUN = Run("sarathi", Capacity(16, 10, 100), Limits(), slo="tbt=100ms@p99", options={"token_budget": 64})
RECORDS = run(Sarathi(), [Request("a", range(5), 3)], Capacity(16, 10, 100))


def test_what_is_written_is_read_back(tmp_path):
    file = RecordFile(tmp_path / "run.jsonl")
    file.begin(RUN)
    for record in RECORDS:
        file.write(record)
    file.close()
    assert (RUN, RECORDS) == read((tmp_path / "run.jsonl").read_text().splitlines())


def test_a_run_is_not_written_over_another(tmp_path):
    (tmp_path / "run.jsonl").touch()
    with pytest.raises(ValueError, match="exists; name another"):
        RecordFile(tmp_path / "run.jsonl")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory"):
        RecordFile(tmp_path / "no" / "run.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_the_recording_with_a_log_line(tmp_path, caplog):
    file = RecordFile(tmp_path / "run.jsonl")
    file.close()
    file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for record in RECORDS:
        file.write(record)
    assert 1 == caplog.text.count("No space left")
