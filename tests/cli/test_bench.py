"""`stallfree bench` as a user sees it: its output, files and exit codes, and its messages for mistakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from stallfree.cli import bench
from stallfree.core.classes import Classes
from tests.server.conftest import SLOW, Server
from tests.waiting import PATIENCE_S, until

QUICK = ("--rate", "200", "--requests", "10", "--lengths", "20/8")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def url():
    with Server() as server:
        yield server.url
        server.settled()


def test_load_prints_a_table_for_people(stallfree, url):
    code, out, err = stallfree("bench", "load", "--url", url, *QUICK, "--slo", "tbt=300s")
    assert 0 == code
    assert ["completed", "10"] in [line.split() for line in out.splitlines()]
    assert all(
        row in out for row in ("TTFT p50, ms", "TBT max, ms", "TPOT p99, ms", "E2E p90, ms", "within tbt=300s@p99", "100.00% met")
    )
    assert "prompts as token ids; ignore_eos; usage in every event" in err


def test_load_prints_json_for_programs(stallfree, url):
    code, out, _ = stallfree("bench", "load", "--url", url, *QUICK, "--slo", "ttft=5s,tbt=10s", "--json")
    report = json.loads(out)
    assert (0, True, [], 10, {}) == (code, report["valid"], report["problems"], report["completed"], report["errors"])
    assert [{"p50", "p90", "p99", "max"}] * 4 == [set(report[name]) for name in ("ttft_s", "tbt_s", "tpot_s", "e2e_s")]
    assert {"after_s", "count", "share"} == set(report["stalls"])
    assert {"ttft", "tbt"} == set(report["slo_attainment"])
    assert 80 == report["output_tokens"]
    assert report["output_tokens_per_s"] > 0
    assert ("poisson", 200, 10) == tuple(report["workload"][key] for key in ("arrivals", "rate", "requests"))


CLASSES = "chat: ttft=300s,tbt=300s; batch: ttlt=600s"
MIX = "acme: 50% class=chat; crawler: 50% class=batch priority=1"


def test_load_is_of_tenants_in_classes_and_reports_each(stallfree):
    with Server(classes=Classes.parse(CLASSES)) as server:
        code, out, err = stallfree("bench", "load", "--url", server.url, *QUICK, "--mix", MIX, "--slo", CLASSES, "--json")
        server.settled()
    report = json.loads(out)
    assert (0, 10, {}) == (code, report["completed"], report["errors"]), err
    assert ({"chat", "batch"}, {"acme", "crawler"}) == (set(report["classes"]), set(report["tenants"]))
    assert (1.0, MIX) == (report["goodput"]["share"], report["workload"]["mix"])


def test_a_class_that_has_no_targets_is_named_before_the_run(stallfree):
    code, _, err = stallfree("bench", "load", "--url", NOBODY, *QUICK, "--mix", MIX, "--slo", "chat: tbt=1s; bulk: ttlt=9s")
    assert 1 == code
    assert "unknown class 'batch'" in err


def test_load_writes_a_page(stallfree, url, tmp_path):
    code, _, _ = stallfree("bench", "load", "--url", url, *QUICK, "--html", str(tmp_path / "page.html"))
    assert 0 == code
    assert all(part in (tmp_path / "page.html").read_text() for part in ("<svg", "TBT p99, ms", "arrivals poisson", url))


def test_load_takes_a_trace(stallfree, url, tmp_path):
    (tmp_path / "trace.csv").write_text("arrived_at,prompt_tokens,output_tokens\n10,30,3\n10.1,20,5\n")
    code, out, _ = stallfree(
        "bench", "load", "--url", url, "--arrivals", "trace", "--lengths", str(tmp_path / "trace.csv"), "--json"
    )
    report = json.loads(out)
    assert (0, 2, 8) == (code, report["completed"], report["output_tokens"])


def test_a_server_that_refuses_every_request_fails_the_run_with_its_words(stallfree, url):
    code, out, err = stallfree("bench", "load", "--url", url, "--rate", "200", "--requests", "5", "--lengths", "5000/8", "--json")
    assert (1, False, {"HTTP 400": 5}) == (code, json.loads(out)["valid"], json.loads(out)["errors"])
    assert "no request was completed" in err
    assert "5000" in err


def test_compare_puts_servers_and_policies_side_by_side(stallfree, url):
    before = children()  # such as the process that tracks another test's shared memory
    code, out, err = stallfree(
        "bench",
        "compare",
        f"there={url}",
        "sarathi:64",
        "slo",
        *QUICK,
        "--slo",
        "tbt=1s",
        "--serve",
        "--executor simulated",
        "--json",
    )
    servers = json.loads(out)["servers"]
    assert (0, ["there", "sarathi:64", "slo"]) == (code, list(servers))
    assert [10] * 3 == [server["completed"] for server in servers.values()], err
    assert before == children()


def test_a_server_that_does_not_start_costs_no_run_before_it(stallfree, url):
    code, out, err = stallfree("bench", "compare", f"there={url}", "slo", *QUICK, "--serve", "--executor unheard-of", "--json")
    assert (1, {"there"}) == (code, set(json.loads(out)["servers"]))
    assert "ended with exit code 1 before it served" in err


def test_compare_prints_a_column_for_each(stallfree, url):
    code, out, _ = stallfree("bench", "compare", f"ours={url}", f"theirs={url}/v1", *QUICK)
    assert 0 == code
    assert ["ours", "theirs"] == out.splitlines()[0].split()


def test_capacity_tells_every_trial(stallfree, url, monkeypatch):
    monkeypatch.setattr(bench, "LONGEST_S", 0.1)  # 3 requests, so no rate below 30 is tried
    options = ("--url", url, "--requests", "3", "--lengths", "20/2", "--start", "50", "--trials", "1", "--shortest", "0")
    code, out, err = stallfree("bench", "capacity", "--slo", "ttft=1us@p50", *options, "--json")
    answer = json.loads(out)
    assert (0, "ttft=0.001ms@p50", 0, 50) == (code, answer["slo"], answer["capacity"], answer["above"])
    assert [(50, 0, False)] == [(trial["rate"], trial["seed"], trial["passed"]) for trial in answer["trials"]]
    assert "50 requests/s, seed 0: 0.0% within ttft=" in err


def test_capacity_prints_its_trials_and_the_rate(stallfree, url):
    options = ("--url", url, "--requests", "1", "--lengths", "20/2", "--start", "1e6", "--trials", "1", "--shortest", "0")
    code, out, _ = stallfree("bench", "capacity", "--slo", "ttft=20s", *options)
    assert 0 == code
    assert "capacity 1.049e+12 requests/s for ttft=20s@p90 (no rate missed it)" in out


@pytest.mark.parametrize("command", ["load", "compare"])
def test_ctrl_c_ends_a_run_with_what_there_is(command, tmp_path):
    with Server(SLOW) as server:
        them = ("--url", server.url) if command == "load" else (f"a={server.url}", f"b={server.url}")
        arguments = ("bench", command, *them, "--rate", "5", "--requests", "1000", "--lengths", "20/400", "--json")
        process = subprocess.Popen(
            [sys.executable, "-m", "stallfree", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2 if command == "compare" else 1):
            process.stderr.readline()  # the line that says what the server accepts
        until(lambda: server.engine.scheduler.ledger.requests)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        server.settled()
    report = json.loads(out) if command == "load" else json.loads(out)["servers"]["a"]
    assert (1, False) == (process.returncode, report["valid"])
    assert "interrupted" in err
    assert "Traceback" not in err


def test_ctrl_c_leaves_no_server_of_a_policy_behind():
    arguments = ("bench", "compare", "slo", "sarathi", "--rate", "5", "--lengths", "20/400", "--serve", "--executor simulated")
    process = subprocess.Popen(
        [sys.executable, "-m", "stallfree", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    url, _, takes = process.stderr.readline().partition(": ")
    assert "model simulated" in takes
    # Python cannot report an interruption that comes exactly while an event loop is being made.
    until(lambda: "stallfree_running_requests 0.0" not in httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode
    assert "Traceback" not in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["load"], "--rate 2"),
        (["load", "--rate", "0"], "a rate of 0"),
        (["load", "--rate", "-1"], "a rate of -1"),
        (["load", "--rate", "1", "--requests", "0"], "0 requests"),
        (["load", "--rate", "1", "--requests", "1", "--duration", "1"], "either"),
        (["load", "--rate", "1e6", "--duration", "1e9"], "more than the limit of 1,000,000"),
        (["load", "--rate", "1", "--duration", "-1"], "duration of -1 s"),
        (["load", "--rate", "1", "--lengths", "many"], "'many'"),
        (["load", "--rate", "1", "--lengths", "0/5"], "median=0"),
        (["load", "--rate", "1", "--lengths", "nowhere.csv"], "the trace nowhere.csv cannot be read"),
        (["load", "--rate", "1", "--arrivals", "trace"], "need lengths from a .csv"),
        (["load", "--rate", "1", "--arrivals", "uniform"], "'uniform'"),
        (["load", "--rate", "1", "--slo", "tbt=100"], "has no unit"),
        (["load", "--rate", "1", "--slo", ""], "'' is not a latency target"),
        (["load", "--rate", "1", "--url", "localhost:8000"], "'localhost:8000' is not a server's URL"),
        (["load", "--rate", "1", "--url", "http://127.0.0.1:99999"], "not a server's URL"),
        (["load", "--rate", "1", "--url", "http://"], "not a server's URL"),
        (["load", "--rate", "1", "--url", NOBODY], f"no server answers at {NOBODY}"),
        (["load", "--rate", "1", "--url", "http://no-such-host.invalid"], "no server answers at"),
        (["load", "--rate", "1", "--timeout", "0"], "timeout of 0 s"),
        (["load", "--rate", "1", "--html", "nowhere/page.html"], "no folder nowhere"),
        (["compare", "saraty", "--rate", "1"], "did you mean 'sarathi'?"),
        (["compare", "slo:128", "--rate", "1"], "'slo' takes no token_budget"),
        (["compare", "sarathi:0", "--rate", "1"], "token_budget is 0"),
        (["compare", "http://127.0.0.1:8000", "--rate", "1"], "theirs=http://127.0.0.1:8000"),
        (["compare", "ours=", "--rate", "1"], "'ours='"),
        (["compare", "a=http://x", "a=http://y", "--rate", "1"], "'a' is named twice"),
        (["compare", "sarathi", "--rate", "1", "--serve", "'"], "--serve"),
        (["capacity", "--slo", "tbt"], "'tbt' is not a latency target"),
        (["capacity", "--slo", "tbt=1s", "--start", "0", "--url", NOBODY], "start at 0"),
        (["capacity", "--slo", "tbt=1s", "--requests", "-5", "--url", NOBODY], "-5 requests"),
        (["capacity", "--slo", "tbt=1s", "--shortest", "nan", "--url", NOBODY], "at least nan s"),
        (["capacity", "--slo", "tbt=1s", "--tolerance", "0", "--url", NOBODY], "tolerance of 0"),
        (["capacity", "--slo", "tbt=1s", "--trials", "2", "--url", NOBODY], "odd number"),
    ],
)
def test_a_mistake_is_named_in_one_line_before_anybody_is_asked(stallfree, arguments, says):
    code, out, err = stallfree("bench", *arguments)
    assert (1, "", 1) == (code, out, err.count("\n")), err
    assert says in err


def children() -> list[str]:
    """This process's children that are still there."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
