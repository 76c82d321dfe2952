"""`stallfree plan` as a user sees it."""

import json

import pytest

SMALL = ("plan", "--model", "llama2-7b", "--gpus", "2", "--lengths", "2000/30")


def kind(unit):
    if unit["name"].startswith(("taichi", "dynaserve", "elastic", "loongserve")):
        return "moving"
    return "pools" if " -> " in unit["name"] else "co-located"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    import contextlib
    import io

    from stallfree.cli import app

    page = tmp_path_factory.mktemp("plan") / "page.html"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app([*SMALL, "--slo", "ttft=1s@p90,tbt=50ms@p99", "--json", "--html", str(page)])
    return json.loads(out.getvalue()), page.read_text()


def test_units_are_ranked_and_the_best_of_both_kinds_are_run_on_all_devices(planned):
    answer, _ = planned
    rates = [unit["requests_per_s"] for unit in answer["units"]]
    assert rates == sorted(rates, reverse=True)
    kinds = {unit["name"].split()[0] for unit in answer["units"]}
    pure = {"slo", "sarathi:512", "sarathi:2048", "prefill-first", "distserve", "splitwise", "hybrid"}
    assert pure | {"taichi", "dynaserve", "elastic", "loongserve"} == kinds
    best, *others = (unit["capacity"] for unit in answer["all_gpus"])
    assert ["co-located", "pools"] == sorted(map(kind, answer["all_gpus"]))
    assert best >= max(others)
    assert min(others) > 0
    assert best / 2 == answer["all_gpus"][0]["goodput_per_gpu"]
    assert all(unit in answer["units"] for unit in answer["all_gpus"])


def test_the_best_of_each_kind_have_an_interval_from_several_draws_of_the_load(planned):
    for unit in planned[0]["all_gpus"]:
        least, most = unit["interval"]
        assert least <= unit["capacity"] <= most
        assert (3, True) == (len(unit["draws"]), unit["simulated_whole"])
        assert unit["capacity"] == sorted(unit["draws"])[1]
    verdict = planned[0]["verdict"]
    assert verdict["margins"][0] <= verdict["margin"] <= verdict["margins"][1]


def test_an_answer_says_how_much_of_it_is_known(planned):
    known = planned[0]["known"]
    assert "fit_roofline" in known["kernels, measured"]
    assert "drawn 3 times" in known["load"]
    assert "as one cluster" in known["simulated"]
    assert all(word in planned[1] for word in ("How much of this is known", "kernels, measured", "links between GPUs"))


def test_the_verdict_says_who_wins_and_by_how_much(planned):
    verdict = planned[0]["verdict"]
    best = {kind(unit): unit for unit in planned[0]["all_gpus"]}
    split, co_located = best["pools"]["capacity"], best["co-located"]["capacity"]
    assert split / co_located - 1 == pytest.approx(verdict["margin"])
    assert verdict["headline"].startswith("Disaggregate" if verdict["margin"] > 0.12 and verdict["sure"] else "Do not disaggregate")
    assert all(f"{rate:.3g} requests/s, " in verdict["headline"] for rate in (split, co_located))
    assert "simulated only, in the first draw: " in verdict["moved"]
    assert "misses" in verdict["binds"]
    assert 0 < verdict["dollars"] < 100
    assert verdict["commands"][0].startswith("stallfree ")


def test_attainments_fall_as_the_rate_rises(planned):
    for points in planned[0]["attainment"].values():
        shares = [point["goodput"]["share"] for point in points]
        assert 5 == len(shares)
        assert shares[0] > shares[-1]


def test_the_page_has_table_and_plot(planned):
    names = planned[0]["units"][0]["name"].replace(">", "&gt;")
    question = "llama2-7b on 2 x a100-80g, 1 node; 2000/30 tokens, poisson arrivals; ttft=1s@p90,tbt=50ms@p99"
    assert all(part in planned[1] for part in ("<svg", names, "isaggregate", "simulated only", question))


@pytest.mark.slow
def test_a_split_that_misses_the_target_by_itself_leaves_the_others(stallfree):
    """A request by itself takes 10.7 ms a token at TP 1, and 6.7 ms at TP 2."""
    code, out, err = stallfree(*SMALL, "--slo", "ttft=1s@p90,tbt=10ms@p99")
    assert 0 == code, err
    assert "slo TP2" in out
    assert "slo TP1" not in out


LONG = ("plan", "--model", "llama2-7b", "--gpus", "2", "--lengths", "3000/20", "--slo", "ttft=3s@p90,tbt=50ms@p99")
"""A load that one unit serves."""


@pytest.mark.slow
def test_rows_say_whether_they_were_simulated_on_all_devices(stallfree):
    code, out, err = stallfree(*LONG)
    assert 0 == code, err
    assert any(
        ("2 x slo TP1" in line or "2 x sarathi" in line or "2 x prefill-first" in line) and "1 GPU x 2" in line
        for line in out.splitlines()
    )
    assert "the others are the rate of one unit times the number of units" in out


@pytest.mark.slow
def test_under_bursts_no_unit_is_judged_by_itself(stallfree):
    code, out, err = stallfree(*LONG, "--arrivals", "gamma:cv=3")
    assert 0 == code, err
    assert " x 2 " not in out
    assert "Each row was simulated as one cluster" in out


def test_a_trace_is_taken_as_long_as_it_is(stallfree, tmp_path):
    def trace(number):
        rows = "".join(f"{0.5 * i * i},500,20\n" for i in range(number))
        file = tmp_path / f"{number}.csv"
        file.write_text("arrived_at,prompt_tokens,output_tokens\n" + rows)
        return "plan", "--model", "llama2-7b", "--gpus", "1", "--slo", "ttft=1s,tbt=50ms", "--trace", str(file)

    code, _, err = stallfree(*trace(20))
    assert 2 == code
    assert "has 20 requests that fit; a plan needs at least 64" in err
    code, _, err = stallfree(*trace(1))
    assert 2 == code
    assert "1.csv has 1 request that fits; a plan needs at least 64" in err
    code, out, err = stallfree(*trace(80))
    assert 0 == code, err
    assert f"80 requests of {tmp_path / '80.csv'}" in out
    assert "One GPU cannot be two pools" in out
    assert "- load: measured: 80 requests of the trace, stretched to each rate, so that bursts stay bursts" in out
    code, _, err = stallfree("plan", "--model", "llama2-7b", "--gpus", "1", "--slo", "ttft=1s,tbt=50ms", "--trace", "nowhere.csv")
    assert (2, True) == (code, "the trace nowhere.csv cannot be read" in err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slo", "tbt=50ms"], "add one: ttft=2s@p90,tbt=50ms"),
        (["--slo", "ttft=1s,tbt=1ms"], "with slo TP2, the fastest, tbt=1ms cannot be met: a lone request already takes"),
        (["--slo", "ttft=40ms,tbt=50ms"], "nothing here meets"),
        (["--slo", "ttft=1s,tbt=50ms", "--gpus", "0"], "0 GPUs are too few; give at least 1"),
        (["--slo", "ttft=1s,tbt=50ms", "--model", "llama9"], "error: unknown model 'llama9'"),
        (["--slo", "ttft=1s,tbt=50ms", "--trace", "nowhere.csv"], "--trace has arrivals and lengths of its own"),
        (["--slo", "ttft=1s,tbt=50ms", "--gpus", "3", "--nodes", "2"], "3 GPUs are not evenly on 2 nodes"),
        (["--slo", "ttft=1s,tbt=50ms", "--link", "eth-24g"], "did you mean 'eth-25g'"),
        (["--slo", "ttft=1s,tbt=50ms", "--model", "falcon-180b"], "no split of 2 GPUs holds the model"),
        (
            ["--slo", "ttft=1s,tbt=50ms", "--lengths", "5000/30"],
            "do not fit --max-total 4096; raise it, or draw shorter ones (without",
        ),
    ],
)
def test_mistakes_end_with_code_2_and_say_what_to_do(stallfree, arguments, says):
    code, _, err = stallfree(*SMALL, *arguments)
    assert 2 == code
    assert says in err
