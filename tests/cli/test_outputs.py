"""Files that commands write in addition to their answer: rows for programs. An existing file is never overwritten."""

import csv
import json

import pytest

from stallfree.cli import outputs
from stallfree.metrics.requests import COLUMNS, row
from stallfree.metrics.timeline import Timeline
from tests.server.conftest import Server

LLAMA = ("--model", "llama3-8b", "--lengths", "300/30", "--requests", "12", "--rate", "4")
TRACE = "arrived_at,prompt_tokens,output_tokens\n10,30,3\n10.5,20,5\n"


@pytest.fixture(scope="module")
def url():
    with Server() as server:
        yield server.url
        server.settled()


def rows(file) -> list[dict]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_simulation_writes_a_row_for_each_request(stallfree, tmp_path, name):
    file = tmp_path / name
    report = json.loads(stallfree("simulate", *LLAMA, "--requests-out", str(file), "--json")[1])
    written = rows(file)
    assert [list(COLUMNS)] * 12 == [list(row) for row in written]
    assert report["completed"] == len({row["id"] for row in written}) == 12
    assert report["output_tokens"] == sum(int(row["output_tokens"]) for row in written)
    assert report["ttft_s"]["max"] == pytest.approx(max(float(row["ttft_s"]) for row in written))
    assert report["e2e_s"]["max"] == pytest.approx(max(float(row["e2e_s"]) for row in written))
    assert report["tbt_s"]["max"] == pytest.approx(max(float(row["tbt_max_s"]) for row in written))
    assert all(float(row["arrival_s"]) <= float(row["scheduled_s"]) < float(row["first_token_s"]) for row in written)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_bench_writes_a_row_for_each_request(stallfree, tmp_path, url, name):
    file, trace = tmp_path / name, tmp_path / "trace.csv"
    trace.write_text(TRACE)
    code, _, err = stallfree("bench", "load", "--url", url, "--trace", str(trace), "--requests-out", str(file), "--json")
    assert 0 == code, err
    assert [("30", "3", "length"), ("20", "5", "length")] == [
        (str(row["prompt_tokens"]), str(row["output_tokens"]), row["reason"]) for row in rows(file)
    ]
    assert TRACE == trace.read_text()


def test_a_request_that_got_nothing_has_an_empty_row():
    assert ("a", 1.0, None, None, None, "HTTP 429", 5, 0, None, None, None, None, 0, "", "", 0) == row(
        Timeline("a", 1.0, 5, reason="HTTP 429")
    )


def test_simulate_reads_a_trace_and_does_not_write_it(stallfree, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    report = json.loads(stallfree("simulate", "--model", "llama3-8b", "--trace", str(trace), "--json")[1])
    assert (2, 8) == (report["completed"], report["output_tokens"])
    assert TRACE == trace.read_text()


@pytest.mark.parametrize(
    "command",
    [
        ("simulate", *LLAMA, "--record"),
        ("simulate", *LLAMA, "--chrome-trace"),
        ("simulate", *LLAMA, "--requests-out"),
        ("simulate", *LLAMA, "--html"),
        ("compare", "slo", *LLAMA[:6], "--rates", "4", "--html"),
        ("plan", "--model", "llama2-7b", "--slo", "ttft=1s,tbt=50ms", "--html"),
        ("bench", "load", "--url", "http://127.0.0.1:9", "--rate", "1", "--requests-out"),
        ("bench", "load", "--url", "http://127.0.0.1:9", "--rate", "1", "--html"),
        ("bench", "compare", "a=http://127.0.0.1:9", "--rate", "1", "--html"),
        ("serve", "--executor", "simulated", "--port", "0", "--record"),
    ],
    ids=" ".join,
)
def test_no_command_writes_over_a_file(stallfree, tmp_path, command):
    file = tmp_path / "mine.csv"
    file.write_text("mine")
    code, out, err = stallfree(*command, str(file))
    assert (True, "") == (code in (1, 2), out)
    assert f"{file} exists" in err
    assert "mine" == file.read_text()


def test_plots_go_into_an_empty_folder_only(stallfree, tmp_path):
    (tmp_path / "mine.png").write_text("mine")
    code, _, err = stallfree("reproduce", "sarathi", "--only", "chunking", "--plots", str(tmp_path))
    assert (2, True) == (code, "there are files in it, and none is overwritten" in err)


def test_a_file_that_has_come_to_be_there_is_not_written_over(tmp_path):
    outputs.write(tmp_path / "file", "first")
    with pytest.raises(ValueError, match="exists, and is not overwritten"):
        outputs.write(tmp_path / "file", "second")
    assert "first" == (tmp_path / "file").read_text()


def test_what_is_no_file_is_written_to(stallfree):
    assert 0 == stallfree("simulate", *LLAMA, "--chrome-trace", "/dev/null")[0]


def test_rows_in_a_format_that_is_not_written_are_refused(stallfree, tmp_path):
    code, _, err = stallfree("simulate", *LLAMA, "--requests-out", str(tmp_path / "rows.xlsx"))
    assert (2, True) == (code, "rows are written as .csv or .jsonl" in err)
