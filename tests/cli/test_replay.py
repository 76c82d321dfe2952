"""`stallfree replay` and `explain` as a user sees them, on files as `serve --record` writes them."""

import json

import pytest

from tests.sim.test_replay import record


@pytest.fixture(scope="module")
def lines() -> list[str]:
    run, records = record("slo", 2)
    return [run.to_json(), *(r.to_json() for r in records)]


@pytest.fixture
def file(lines, tmp_path) -> str:
    (tmp_path / "run.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / "run.jsonl")


def test_an_unchanged_policy_is_said_to_decide_the_same(stallfree, file, lines):
    code, out, _ = stallfree("replay", file)
    assert (0, f"{len(lines) - 1} iterations under policy slo: identical decisions in each\n") == (code, out)
    assert json.loads(stallfree("replay", file, "--json")[1])["identical"] is True


def test_a_decision_that_has_changed_is_named_with_exit_code_1(stallfree, file, lines):
    forged = [*lines[:5], lines[5].replace('"budget":', '"budget":1'), *lines[6:]]
    with open(file, "w") as out:
        out.writelines(f"{line}\n" for line in forged)
    code, _, err = stallfree("replay", file)
    assert 1 == code
    assert "step 4 differs in budget: recorded 1" in err


def test_what_if_shows_the_record_its_simulation_and_the_answer(stallfree, file):
    code, out, _ = stallfree("replay", file, "--policy", "sarathi", "--token-budget", "16", "--slo", "tbt=20ms")
    assert 0 == code
    assert "recorded the same, simulated what if" in " ".join(out.split())
    answer = json.loads(stallfree("replay", file, "--slo", "tbt=200ms", "--json")[1])
    assert ["recorded", "the same, simulated", "what if"] == list(answer["runs"])
    assert 1 == len({run["prompt_tokens"] for run in answer["runs"].values()})


@pytest.mark.parametrize("command", ["replay", "explain"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: [*lines[:10], lines[10][:50]], "run.jsonl: line 11: not a record, or one cut short"),
        (lambda lines: [*lines[:10], lines[10][:50]], "`head -n 10` keeps them"),
        (lambda lines: [lines[0], lines[1].replace('"version":3', '"version":1')], "not a record of version 3 but of 1"),
        (lambda lines: lines[1:], "a record file begins with a line that describes the run"),
        (lambda lines: lines[:1], "holds no iterations"),
        (lambda lines: [], "the file is empty"),
        (lambda lines: ["\x00\x01"], "line 1: not a record"),
    ],
)
def test_a_damaged_file_is_named_with_its_line_and_the_way_out(stallfree, file, lines, command, damage, says):
    with open(file, "w") as out:
        out.write("\n".join(damage(lines)))
    code, _, err = stallfree(command, file)
    assert 1 == code
    assert says in err
    assert 1 == len(err.splitlines())


def test_a_file_that_is_not_there_is_named_with_what_makes_one(stallfree):
    code, _, err = stallfree("explain", "nowhere.jsonl")
    assert (1, True) == (code, "nowhere.jsonl cannot be read: No such file" in err and "serve --record" in err)


def test_explain_says_the_whole_a_step_or_a_request(stallfree, file):
    assert "iterations in" in stallfree("explain", file)[1]
    assert stallfree("explain", file, "--step", "7")[1].startswith("Step 7, at ")
    assert stallfree("explain", file, "--request", "r12")[1].startswith("r12 arrived at ")
    assert stallfree("explain", file, "--request", "chatcmpl-r12")[1].startswith("r12 arrived at ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "99999"], "step 99999 is not in the record; it holds steps 0 to"),
        (["--request", "zzz"], "no request in the record begins with 'zzz'"),
        (["--step", "1", "--request", "r1"], "give one of them"),
    ],
)
def test_what_cannot_be_explained_is_said(stallfree, file, options, says):
    code, _, err = stallfree("explain", file, *options)
    assert (1, True) == (code, says in err)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--slo", "tbt=100"], "has no unit"),
        (["--policy", "saraty"], "did you mean 'sarathi'?"),
        (["--token-budget", "5"], "'slo' takes no token_budget"),
        (["--slo", "tbt=1us"], "cannot be met"),
    ],
)
def test_a_what_if_that_cannot_be_is_refused(stallfree, file, options, says):
    code, _, err = stallfree("replay", file, *options)
    assert (1, True) == (code, says in err)
