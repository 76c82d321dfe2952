"""`stallfree simulate` with adapters as a user sees it: the options, the record, and one clear line for a mistake."""

import json

import pytest

from stallfree.core.record import read

LOAD = ("--model", "llama2-7b", "--hardware", "a100-80g", "--rate", "5", "--lengths", "256/16", "--requests", "60")
ADAPTERS = ("--adapters", "1000", "--adapter-zipf", "1.0", "--rank", "8,16,32")


def test_simulate_with_adapters_serves_everybody_and_says_what_was_simulated(stallfree):
    code, out, _ = stallfree("simulate", *LOAD, *ADAPTERS, "--json")
    report = json.loads(out)
    assert (0, 60, {}) == (code, report["completed"], report["errors"])
    assert (1000, 1.0) == (report["workload"]["adapters"], report["workload"]["adapter_zipf"])
    assert "8,16,32" == report["deployment"]["rank"]


def test_adapters_take_longer(stallfree):
    plain, with_adapters = (json.loads(stallfree("simulate", *LOAD, *more, "--json")[1]) for more in ((), ADAPTERS))
    assert plain["tbt_s"]["p50"] < with_adapters["tbt_s"]["p50"]


def test_a_record_with_adapters_is_replayed(stallfree, tmp_path):
    record = tmp_path / "run.jsonl"
    assert 0 == stallfree("simulate", *LOAD, *ADAPTERS, "--record", str(record))[0]
    records = read(record.read_text().splitlines())[1]
    assert {8, 16, 32} == {row.rank for r in records for row in r.loaded}
    assert 60 == sum(len(r.adapters) for r in records)
    assert 0 == stallfree("replay", str(record))[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--adapters", "10", "--rank", "0"), "--rank '0' is no list of ranks from 1 to 1,024; write 8 or 8,16,32"),
        (("--adapters", "10", "--rank", "x"), "--rank 'x' is no list of ranks"),
        (("--adapters", "0", "--rank", "8"), "0 adapters are none; give 1 or more, or leave --adapters out"),
        (("--adapters", "10"), "it is not said how large these are; give --rank 8"),
        (
            ("--adapters", "10", "--rank", "8", "--adapter-modules", "foo"),
            "--adapter-modules 'foo' is unknown; known: attention, all",
        ),
        (
            ("--adapters", "10", "--rank", "8", "--adapter-zipf", "-1"),
            "an exponent of -1 for the popularity of adapters is invalid",
        ),
        (("--on-late", "wait"), "--on-late 'wait' is neither serve nor refuse"),
        (("--on-late", "refuse", "--policy", "sarathi"), "policy 'sarathi' forecasts no first tokens"),
    ],
)
def test_a_mistake_is_one_line(stallfree, arguments, says):
    code, out, err = stallfree("simulate", *LOAD, *arguments)
    assert (2, "", 1) == (code, out, len(err.splitlines()))
    assert says in err
