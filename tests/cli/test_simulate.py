"""`stallfree simulate`, `capacity` and `compare` as a user sees them."""

import json

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.record import read
from stallfree.engine import calibrate
from stallfree.perf.fitted import Fitted

LLAMA = ("--model", "llama3-8b", "--requests", "40", "--lengths", "300/30")


def test_simulate_prints_a_table_for_people(stallfree):
    code, out, _ = stallfree("simulate", *LLAMA, "--rate", "4", "--policy", "sarathi", "--token-budget", "512", "--slo", "tbt=50ms")
    assert 0 == code
    assert ["completed", "40"] in [line.split() for line in out.splitlines()]
    assert all(part in out for part in ("sarathi:512", "within tbt=50ms@p99", "llama3-8b on a100-80g", "per million output tokens"))


def test_simulate_prints_the_keys_of_bench_for_programs(stallfree):
    code, out, _ = stallfree("simulate", *LLAMA, "--rate", "4", "--slo", "tbt=60ms,ttft=2s", "--json")
    report = json.loads(out)
    assert (0, 40, {}) == (code, report["completed"], report["errors"])
    assert [{"p50", "p90", "p99", "max"}] * 5 == [
        set(report[name]) for name in ("ttft_s", "tbt_s", "tpot_s", "e2e_s", "scheduling_s")
    ]
    assert {"model": "llama3-8b", "hardware": "a100-80g", "policy": "slo", "slo": "tbt=60ms,ttft=2s"} == report["deployment"]
    assert {"ttft", "tbt"} == set(report["slo_attainment"])
    assert 40 * 30 == report["output_tokens"]


SHARED = (
    *("--slo", "interactive: ttft=1s,tbt=60ms; batch: ttlt=60s", "--tenant-weights", "acme=3"),
    *("--mix", "acme: 50% class=interactive; crawler: 50% class=batch priority=1"),
)


def test_simulate_reports_each_class_and_each_tenant(stallfree, tmp_path):
    record = tmp_path / "run.jsonl"
    code, out, _ = stallfree("simulate", *LLAMA, "--rate", "4", *SHARED, "--record", str(record), "--json")
    report = json.loads(out)
    assert (0, {"interactive", "batch"}, {"acme", "crawler"}) == (code, set(report["classes"]), set(report["tenants"]))
    assert {"interactive ttft", "interactive tbt", "batch ttlt"} == set(report["slo_attainment"])
    assert 40 == sum(part["requests"] for part in report["classes"].values())
    assert pytest.approx(1) == sum(part["share"] for part in report["tenants"].values())
    records = read(record.read_text().splitlines())[1]
    assert {("acme", 3.0), ("crawler", 1.0)} == {(tenant, weight) for r in records for _, tenant, weight in r.tenants}
    assert 0 == stallfree("replay", str(record))[0]


def test_classes_and_tenants_are_tables_for_people(stallfree):
    out = stallfree("simulate", *LLAMA, "--rate", "4", *SHARED)[1]
    heads = [line.split()[0] for line in out.splitlines() if line.split()]
    assert {"class", "interactive", "batch", "tenant", "acme", "crawler"} <= set(heads)
    out = stallfree("compare", "slo", "vtc", *LLAMA, "--rates", "4", *SHARED)[1]
    assert all(part in out for part in ("vtc, 4/s: batch", "slo, 4/s: crawler", "batch ttlt 100 %"))


def test_what_if_judges_each_request_by_its_class(stallfree, tmp_path):
    record = tmp_path / "run.jsonl"
    stallfree("simulate", *LLAMA, "--rate", "4", *SHARED, "--record", str(record))
    runs = json.loads(stallfree("replay", str(record), "--policy", "vtc", "--json")[1])["runs"]
    assert [{"interactive", "batch"}] * 3 == [set(run["classes"]) for run in runs.values()]


@pytest.mark.slow
def test_capacity_is_where_each_class_keeps_its_targets(stallfree):
    search = (*SHARED, "--start", "8", "--tolerance", "0.5", "--trials", "1", "--json")
    ((_, found),) = json.loads(stallfree("capacity", "slo", *LLAMA, *search)[1])["configurations"].items()
    assert 0 < found["capacity"] < found["above"]
    missed = [why for trial in found["trials"] if not trial["passed"] for why in trial["why"]]
    assert all("interactive" in why or "batch" in why for why in missed)


def test_simulate_writes_records_that_explain_reads_a_trace_and_a_page(stallfree, tmp_path):
    record, trace, html = tmp_path / "run.jsonl", tmp_path / "trace.json", tmp_path / "page.html"
    files = ("--record", str(record), "--chrome-trace", str(trace), "--html", str(html))
    report = json.loads(stallfree("simulate", *LLAMA, "--rate", "4", "--slo", "tbt=60ms", *files, "--json")[1])
    run, records = read(record.read_text().splitlines())
    assert ("slo", report["iterations"]) == (run.policy, len(records))
    assert "40 requests arrived and got 1200 tokens" in stallfree("explain", str(record))[1]
    assert report["iterations"] == sum(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"])
    assert all(part in html.read_text() for part in ("<svg", "TBT p99, ms", "llama3-8b on a100-80g"))


def test_options_come_from_a_file_and_the_command_line_before_it(stallfree, tmp_path):
    file = tmp_path / "load.toml"
    file.write_text('model = "llama3-8b"\nlengths = "300/30"\nrequests = 20\nrate = 4\npolicy = "sarathi"\ntoken-budget = 512\n')
    report = json.loads(stallfree("simulate", "--config", str(file), "--token-budget", "64", "--json")[1])
    assert (20, 64) == (report["completed"], report["deployment"]["token_budget"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle = 'x'", "unknown option 'modle' (did you mean 'model'?)"),
        ("tp = 1.5", "tp is 1.5, expected a whole number"),
        ("tp = true", "tp is True, expected a whole number"),
        ("rate = 'two'", "rate is 'two', expected a number"),
        ("model = 7", "model is 7, expected text in quotes"),
        ("prefix-cache = 1", "prefix-cache is 1, expected true or false"),
        ("tp = ", "is not TOML"),
        ("configurations = 3", "configurations are tables"),
        (
            "[configurations.one]\ntp = 2",
            "this command takes one configuration; the simulated `capacity` and `compare` take several",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(stallfree, tmp_path, text, says):
    file = tmp_path / "load.toml"
    file.write_text(text)
    code, out, err = stallfree("simulate", "--config", str(file), *LLAMA, "--rate", "4")
    assert (2, "") == (code, out)
    assert says in err


def test_capacity_is_found_for_each_configuration(stallfree, tmp_path):
    file = tmp_path / "two.toml"
    file.write_text("[configurations.two-devices]\ntp = 2\n")
    search = ("--config", str(file), "--slo", "tbt=40ms", "--start", "8", "--tolerance", "0.3", "--trials", "1", "--shortest", "5")
    code, out, _ = stallfree("capacity", "sarathi:256", *LLAMA, *search, "--json")
    configurations = json.loads(out)["configurations"]
    assert (0, {"sarathi:256", "two-devices"}) == (code, set(configurations))
    assert 2 == configurations["two-devices"]["deployment"]["tp"]
    for configuration in configurations.values():
        assert configuration["capacity"] > 0
        assert {"rate", "seed", "passed", "why", "ttft_s", "slo_attainment"} <= set(configuration["trials"][0])
        assert max(trial["rate"] for trial in configuration["trials"] if trial["passed"]) == configuration["capacity"]
    table = stallfree("capacity", "sarathi:256", *LLAMA, *search)[1]
    assert all(name in table for name in ("sarathi:256", "two-devices", "missed at", "$ per million"))


def test_compare_puts_configurations_at_several_loads_side_by_side(stallfree, tmp_path):
    loads = ("--rates", "2,8", "--slo", "tbt=40ms")
    code, out, _ = stallfree("compare", "sarathi:256", "orca", *LLAMA, *loads, "--html", str(tmp_path / "page.html"))
    assert 0 == code
    rows = [line.split()[:2] for line in out.splitlines()[1:]]
    assert [["sarathi:256", "2"], ["orca", "2"], ["sarathi:256", "8"], ["orca", "8"]] == rows
    assert "<svg" in (tmp_path / "page.html").read_text()
    answer = json.loads(stallfree("compare", "sarathi:256", "orca", *LLAMA, *loads, "--json")[1])
    assert [(run["configuration"], run["rate"]) for run in answer["runs"]] == [(name, float(rate)) for name, rate in rows]


def test_this_cpu_is_simulated_as_calibrated(stallfree, tmp_path, monkeypatch):
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path))
    model = Fitted((0.01, 0.05, 0.02, 0.03, 0.02, 0.004))
    key = calibrate.machine() | {"model": ["small.gguf", 1, 2]}
    slower = model.errors([([(1, 1)], 1.25 * model.seconds([(1, 1)]))])
    calibrate.remember(model, slower, key, tmp_path / "calibration", Capacity(32, 500, 2048))
    lone = ("--hardware", "this-cpu", "--requests", "1", "--rate", "1", "--lengths", "64/2")
    report = json.loads(stallfree("simulate", *lone, "--policy", "sarathi", "--json")[1])
    assert 1.25 * model.seconds([(64, 1)]) == pytest.approx(report["tbt_s"]["p50"])
    code, _, err = stallfree("simulate", *lone, "--tp", "2")
    assert 2 == code
    assert "tp, pp, sp, weights and kv are for other hardware" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simulate", *LLAMA, "--rate", "1", "--mix", "acme: 50% class=batch"), "unknown class 'batch'"),
        (("simulate", *LLAMA, "--rate", "1", "--slo", "a: tbt=60ms", "--mix", "acme: 50% class=b"), "unknown class 'b'; known: a"),
        (("simulate", *LLAMA, "--rate", "1", "--mix", "acme"), "'acme' is no part of a mix"),
        (("simulate", *LLAMA, "--rate", "1", "--tenant-weights", "acme=0"), "'acme=0' is not the weight of a tenant"),
        (("simulate", *LLAMA, "--rate", "1", "--tenant-weights", "acme=1,acme=2"), "tenant 'acme' has two weights"),
        (("simulate", *LLAMA, "--rate", "1", "--slo", "a: tbt=60ms; b: tbt=1us"), "tbt=0.001ms cannot be met"),
        (["simulate", *LLAMA], "how many requests a second?"),
        (["simulate", "--rate", "1"], "which model?"),
        (["simulate", *LLAMA, "--rate", "0"], "a rate of 0 requests"),
        (["simulate", *LLAMA, "--rate", "1", "--slo", "tbt=2ms"], "ask for at least about"),
        (["simulate", *LLAMA, "--rate", "1", "--lengths", "9000/10"], "--max-total 8192 draws only requests that fit"),
        (
            ["simulate", *LLAMA, "--rate", "1", "--lengths", "9000/10", "--max-total", "8192"],
            "do not fit --max-total 8192; raise it",
        ),
        (["simulate", *LLAMA, "--rate", "1", "--lengths", "nowhere.csv"], "the trace nowhere.csv cannot be read"),
        (["simulate", *LLAMA, "--rate", "1", "--router", "randm"], "unknown router 'randm'"),
        (["simulate", *LLAMA, "--rate", "1", "--replicas", "0"], "0 replicas"),
        (["simulate", *LLAMA, "--rate", "1", "--replicas", "2", "--record", "x"], "a record is of one replica"),
        (["simulate", *LLAMA, "--rate", "1", "--html", "nowhere/x.html"], "there is no folder nowhere"),
        (["capacity", *LLAMA], "which targets make the capacity of slo?"),
        (["capacity", "slo", "slo", *LLAMA], "is named twice"),
        (["capacity", *LLAMA, "--slo", "tbt=40ms", "--trials", "2"], "give an odd number"),
        (["compare", *LLAMA, "--rates", "2,x"], "are not different rates above 0"),
        (["compare", *LLAMA, "--rates", "2,2"], "are not different rates above 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stallfree, arguments, says):
    code, out, err = stallfree(*arguments)
    assert (2, "", 1) == (code, out, err.count("\n")), err
    assert says in err


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        ("arrived_at,prompt_tokens,output_tokens\n2,30,3\n1,20,5\n", "line 3: its time, 1 s, is before"),
        ("arrived_at,prompt_tokens,output_tokens\n-2,30,3\n", "line 2: arrived_at is '-2'"),
        ("arrived_at,prompt_tokens\n2,30\n", "line 1 is 'arrived_at,prompt_tokens'"),
        ("arrived_at,prompt_tokens,output_tokens\n2,8000,500\n", "context of 8192; --max-total 8192 leaves such requests out"),
        ("arrived_at,prompt_tokens,output_tokens\n", "no request follows the header"),
        ("", "trace.csv: it is empty; a trace's first line names its columns"),
        ("arrived_at,prompt_tokens,output_tokens\nsoon,30,3\n", "line 2: arrived_at is 'soon'; write a time"),
        ("arrived_at,prompt_tokens,output_tokens\n1,many,3\n", "line 2: prompt_tokens is 'many'; write a whole number"),
    ],
)
def test_a_mistake_in_a_trace_is_named_by_its_line(stallfree, tmp_path, trace, says):
    (tmp_path / "trace.csv").write_text(trace)
    code, _, err = stallfree("simulate", "--model", "llama3-8b", "--arrivals", "trace", "--lengths", str(tmp_path / "trace.csv"))
    assert 2 == code
    assert says in err


ONE, TWO_AT_ONCE = "1,300,30\n", "1,300,30\n1,300,30\n"


@pytest.mark.parametrize("command", ["simulate", "capacity"])
@pytest.mark.parametrize(
    ("rows", "says"),
    [(ONE, "trace.csv has one request, and a rate needs two"), (TWO_AT_ONCE, "all 2 requests of trace.csv arrive at")],
)
def test_a_trace_that_has_no_rate_says_why_if_it_needs_one(stallfree, tmp_path, command, rows, says):
    (tmp_path / "trace.csv").write_text("arrived_at,prompt_tokens,output_tokens\n" + rows)
    options = {"simulate": ("--rate", "1"), "capacity": ()}[command]
    code, out, err = stallfree(
        command, "--model", "llama3-8b", "--slo", "tbt=60ms", "--trace", str(tmp_path / "trace.csv"), *options
    )
    assert (2, "", 1) == (code, out, err.count("\n")), err
    assert says in err


@pytest.mark.parametrize("rows", [ONE, TWO_AT_ONCE])
def test_such_a_trace_is_simulated_at_its_own_times(stallfree, tmp_path, rows):
    (tmp_path / "trace.csv").write_text("arrived_at,prompt_tokens,output_tokens\n" + rows)
    code, out, err = stallfree("simulate", "--model", "llama3-8b", "--trace", str(tmp_path / "trace.csv"), "--json")
    assert 0 == code, err
    assert rows.count("\n") == json.loads(out)["completed"]


def test_prefix_cache_hits_are_reported(stallfree, tmp_path):
    row = '{"timestamp":%d,"input_length":1024,"output_length":4,"hash_ids":[0,%d]}\n'
    (tmp_path / "trace.jsonl").write_text("".join(row % (1000 * i, i + 1) for i in range(4)))
    arguments = ("simulate", "--model", "llama3-8b", "--policy", "sarathi", "--trace", str(tmp_path / "trace.jsonl"))
    out = stallfree(*arguments, "--prefix-cache")[1]
    assert ["prompt", "tokens", "from", "the", "prefix", "cache", "37.5%"] in [line.split() for line in out.splitlines()]
    assert 3 * 512 == json.loads(stallfree(*arguments, "--prefix-cache", "--json")[1])["cached_tokens"]
    assert "prefix cache" not in stallfree(*arguments)[1]
    assert "The prefix cache had no hits" in stallfree("simulate", *LLAMA, "--rate", "4", "--prefix-cache")[1]


GROUPS = ("--model", "llama2-7b", "--hardware", "a800", "--tp", "2", "--sp", "4", "--requests", "20", "--slo", "tbt=100ms")


def test_compare_puts_elastic_groups_beside_a_ring(stallfree):
    long = ("--lengths", "300/30 + 20%:100000/20", "--max-model-len", "200000", "--rates", "1")
    code, out, _ = stallfree("compare", "loongserve", "elastic", "slo", *GROUPS, *long, "--json")
    assert 0 == code
    runs = {run["configuration"]: run for run in json.loads(out)["runs"]}
    assert {"loongserve", "elastic", "slo"} == {*runs}
    assert all(20 == run["completed"] and not run["errors"] for run in runs.values())
    assert runs["elastic"]["tbt_s"]["max"] <= 0.1 < runs["slo"]["ttft_s"]["p50"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "elastic", "--sp", "1"), "policy elastic forms groups of instances, with the prices of rings; give --sp 2"),
        (("--policy", "loongserve", "--prefix-cache"), "policy loongserve has no prefix_cache, which is True; leave it out"),
        (("--policy", "elastic", "--slo", "ttft=1s"), "policy elastic fills iterations up to a target for TBT; give one"),
        (("--policy", "loongserve", "--max-model-len", "2000000"), "a request of 2,000,000 tokens (--max-model-len) does not fit"),
        (
            ("--policy", "elastic", "--replicas", "2"),
            "replicas of policy elastic share requests by shortest-queue",
        ),
        (("--policy", "elastic", "--record", "new.jsonl"), "policy elastic keeps no records; leave out --record"),
    ],
)
def test_what_elastic_groups_do_not_have_is_refused(stallfree, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = stallfree("simulate", *GROUPS, "--rate", "1", *options)
    assert code != 0
    assert message in error
    assert not [*tmp_path.iterdir()]


def test_systems_of_two_kinds_are_compared_with_co_location(stallfree):
    two = ("--model", "llama2-7b", "--replicas", "2", "--requests", "60", "--lengths", "300/20", "--slo", "ttft=1s,tbt=100ms")
    code, out, err = stallfree("compare", "slo", "distserve", "taichi:1", "dynaserve", "--rates", "2", *two, "--json")
    assert 0 == code, err
    runs = {run["configuration"]: run for run in json.loads(out)["runs"]}
    assert list(runs) == ["slo", "distserve", "taichi:1", "dynaserve"]
    assert all(run["completed"] == 60 for run in runs.values())
    assert json.loads(out)["configurations"]["taichi:1"]["prefill_replicas"] == 1
    for arguments, says in (
        (("simulate", "--policy", "taichi", "--rate", "2"), "`stallfree compare` and `capacity` simulate it"),
        (("compare", "distserve:2", "--rates", "2"), "2 of 2 replicas cannot be of the first kind"),
        (("compare", "slo", "--prefill-replicas", "1", "--rates", "2"), "slo has replicas of one kind"),
    ):
        code, _, err = stallfree(*arguments, *two)
        assert 2 == code
        assert says in err
