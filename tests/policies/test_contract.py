"""Every policy in the folder serves everybody, keeps its promise, plans the same again, and reproduces its golden record."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from stallfree import policies
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import Setup
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.perf.fitted import Fitted
from stallfree.policies import load, names
from stallfree.policies.sarathi import Sarathi
from tests.virtual import answer, run

GOLDEN = Path(__file__).parent.parent / "golden"
CAPACITY = Capacity(block_size=16, num_blocks=120, max_model_len=1024)


def load_of_a_busy_minute() -> list[Request]:
    """60 requests, bursty, 4 to 600 prompt tokens; KV for about five of the long ones."""
    rng = random.Random(7)
    now, requests = 0.0, []
    for i in range(60):
        now += rng.choice([0, 0, 0.02, 0.3])
        length = rng.choice([4, 30, 120, 600])
        requests.append(Request(f"r{i}", range(10_000 * i, 10_000 * i + length), rng.randint(1, 60), arrival=now))
    return requests


@pytest.fixture(params=names())
def name(request) -> str:
    return request.param


def test_everybody_is_served_and_gets_their_own_tokens(name):
    requests = load_of_a_busy_minute()
    run(load(name), requests, CAPACITY)
    assert {("length", r.max_tokens) for r in requests} == {(r.finish_reason, len(r.output)) for r in requests}
    assert [list(range(len(r.prompt), len(r.prompt) + r.max_tokens)) for r in requests] == [r.output for r in requests]


def test_a_stall_free_policy_stalls_nobody_while_kv_lasts(name):
    roomy = Capacity(block_size=16, num_blocks=5000, max_model_len=1024)
    stalls = sum(len(r.stalled) for r in run(load(name), load_of_a_busy_minute(), roomy))
    assert load(name).stall_free == (stalls == 0)


def test_a_prompt_longer_than_the_token_limit_is_served(name):
    requests = [Request(str(i), range(1000 * i, 1000 * i + 300), 4, arrival=float(i)) for i in range(3)]
    run(load(name), requests, CAPACITY, Limits(max_seqs=4, max_tokens=64))
    assert [4, 4, 4] == [len(r.output) for r in requests]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_same_input_gives_the_same_records(name, depth):
    capacity = Capacity(16, 120, 1024, depth)
    first, again = (run(load(name), load_of_a_busy_minute(), capacity) for _ in range(2))
    assert first == again


def test_golden_records(name):
    golden = GOLDEN / f"{name}.jsonl"
    lines = [r.to_json() for r in run(load(name), load_of_a_busy_minute()[:20], CAPACITY)]
    assert golden.read_text().splitlines() == lines, f"decisions changed; if that is meant, delete {golden} and run {__file__}"


def test_records_survive_the_journey_through_json(name):
    records = run(load(name), load_of_a_busy_minute()[:20], CAPACITY)
    assert records == [StepRecord.from_json(r.to_json()) for r in records]


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'sarathi'"):
        load("sarathy")


def test_an_option_that_a_policy_does_not_take_is_refused():
    with pytest.raises(ValueError, match="'orca' takes no token_budget"):
        load("orca", token_budget=3)


def test_a_policy_from_outside_is_loaded_by_its_path():
    assert 9 == load("stallfree.policies.sarathi:Sarathi", token_budget=9).token_budget


@pytest.mark.parametrize("path", ["no.such.module:X", "stallfree.policies.orca:Nothing", "json:dumps", ":"])
def test_a_policy_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(ValueError, match="policy"):
        load(path)


POLICY = """
class Mine:
    reserve, stall_free = "chunk", True

    def __init__(self, token_budget=7):
        self.token_budget = token_budget

    def plan(self, draft):
        for r in draft.decoding:
            draft.decode(r)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A new current folder; modules that are imported from it are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["mypolicy:Mine", "./mypolicy.py:Mine", "mypolicy.py:Mine", "{folder}/mypolicy.py:Mine"])
def test_a_policy_in_a_file_of_the_current_folder_is_found(folder, name):
    (folder / "mypolicy.py").write_text(POLICY)
    assert 9 == load(name.format(folder=folder), token_budget=9).token_budget


def test_a_policy_in_a_package_of_the_current_folder_is_found(folder):
    (folder / "ours").mkdir()
    (folder / "ours" / "mypolicy.py").write_text(POLICY)
    assert 7 == load("ours.mypolicy:Mine").token_budget


def test_two_files_of_one_name_are_two_policies(folder):
    for name, budget in (("one", 11), ("two", 22)):
        (folder / name).mkdir()
        (folder / name / "mypolicy.py").write_text(POLICY.replace("=7", f"={budget}"))
    assert [11, 22, 11] == [load(f"{name}/mypolicy.py:Mine").token_budget for name in ("one", "two", "one")]


def test_a_file_is_not_taken_for_a_library(folder):
    (folder / "json.py").write_text(POLICY)
    with pytest.raises(ValueError, match="json/__init__.py has no 'Mine'"):
        load("json:Mine")
    assert 7 == load("./json.py:Mine").token_budget


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (None, "./nowhere.py:Mine", "there is no file ./nowhere.py"),
        (None, "./mypolicies.py:Mine", "there is no file ./mypolicies.py (did you mean 'mypolicy.py'?)"),
        (None, "nowhere:Mine", "there is no module nowhere, and no nowhere.py in {folder}"),
        (None, "./mypolicy.py:Yours", "{folder}/mypolicy.py has no 'Yours'; it has Mine"),
        (None, "./mypolicy.py:Mien", "mypolicy.py has no 'Mien' (did you mean 'Mine'?)"),
        (None, "mypolicy:Yours", "{folder}/mypolicy.py has no 'Yours'; it has Mine"),
        (None, "./mypolicy.py", "is a file; name the class in it: ./mypolicy.py:Class"),
        (POLICY.replace("plan", "plans"), "./mypolicy.py:Mine", "Mine in {folder}/mypolicy.py is not a class with a method `plan`"),
        (POLICY.replace("reserve, ", "other, "), "mypolicy:Mine", "Mine in {folder}/mypolicy.py has no reserve"),
        ("def Mine(): pass", "mypolicy:Mine", "Mine in {folder}/mypolicy.py is not a class"),
        ("\nraise KeyError('x')", "./mypolicy.py:Mine", "{folder}/mypolicy.py, line 2: KeyError: 'x'"),
        ("\nraise KeyError('x')", "mypolicy:Mine", "{folder}/mypolicy.py, line 2: KeyError: 'x'"),
        ("import sys\nsys.exit(3)", "./mypolicy.py:Mine", "{folder}/mypolicy.py, line 2: SystemExit: 3"),
        (
            "import no_such_library",
            "mypolicy:Mine",
            "{folder}/mypolicy.py, line 1: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("class Mine:\n  x = = 1", "./mypolicy.py:Mine", "{folder}/mypolicy.py, line 2: invalid syntax"),
        (POLICY.replace("=7", ""), "./mypolicy.py:Mine", "needs token_budget, which was not given"),
    ],
)
def test_a_file_that_holds_no_policy_is_named_with_what_is_wrong(folder, text, name, says):
    (folder / "mypolicy.py").write_text(POLICY if text is None else text)
    with pytest.raises(ValueError, match="policy") as error:
        load(name)
    assert says.format(folder=folder) in str(error.value)


TUNED = """
class Mine:
    reserve, stall_free = "prompt", True
    slo, options = None, {}

    def __init__(self, setup, depth, share, eager, name):
        self.setup, self.values = setup, (depth, share, eager, name)

    @classmethod
    def of(cls, setup, *, depth: int = 1, share: float | None = None, eager: bool = False, name="x"):
        return cls(setup, depth, share, eager, name)

    def plan(self, draft): ...
"""


def test_a_policy_with_of_gets_its_setup_and_its_own_options_by_their_types(folder):
    (folder / "mypolicy.py").write_text(TUNED)
    setup = Setup(Fitted())
    options = policies.options("mypolicy:Mine", None, ["depth=3", "share=0.5", "eager=true", "name = y"])
    policy = load("mypolicy:Mine", setup, **options)
    assert (setup, (3, 0.5, True, "y")) == (policy.setup, policy.values)
    assert (1, None, False, "x") == load("mypolicy:Mine", setup).values
    assert policies.wants_setup("mypolicy:Mine")
    assert not policies.wants_setup("sarathi")


def test_an_option_of_a_policy_without_a_setup(folder):
    (folder / "mypolicy.py").write_text(POLICY)
    assert 9 == load("mypolicy:Mine", **policies.options("mypolicy:Mine", None, ["token-budget=9"])).token_budget
    assert {"token_budget": 5} == policies.options("sarathi", 5, None)


@pytest.mark.parametrize(
    ("name", "budget", "texts", "says"),
    [
        ("sarathi", None, ["token_budget"], "'token_budget' is not NAME=VALUE"),
        ("sarathi", None, ["token_budget=x"], "token_budget is 'x', expected int"),
        ("sarathi", None, ["token_budge=5"], "takes no token_budge (did you mean 'token_budget'?); it takes token_budget"),
        ("sarathi", 5, ["token_budget=5"], "token_budget is given twice"),
        ("slo", None, ["follow=perhaps"], "follow is 'perhaps', expected true or false"),
        ("slo", 5, None, "takes no token_budget: it finds its own"),
        ("orca", None, ["depth=1"], "takes no depth; it takes no options"),
    ],
)
def test_an_option_that_a_policy_does_not_take_is_named(name, budget, texts, says):
    with pytest.raises(ValueError, match="policy") as error:
        policies.options(name, budget, texts)
    assert says in str(error.value)


@pytest.mark.parametrize("line", ['reserve, stall_free = "banana", True', 'reserve, stall_free = "chunk", "yes"'])
def test_what_a_policy_reserves_and_promises_is_checked(folder, line):
    (folder / "mypolicy.py").write_text(POLICY.replace('reserve, stall_free = "chunk", True', line))
    with pytest.raises(ValueError, match="its (reserve is 'banana'|stall_free is 'yes'), expected"):
        load("mypolicy:Mine")


def test_a_policy_may_order_requests():
    """The request of the tenant that has had the least goes first, whoever came first."""

    class Fair(Sarathi):
        def __init__(self):
            super().__init__(8)
            self.had = Counter()

        def key(self, request):
            self.had[request.tenant] += len(request.prompt)
            return (self.had[request.tenant],)

    s = Scheduler(Fair(), Capacity(16, 100, 256), Limits(1))
    for id, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        s.submit(Request(id, range(8), 1, tenant=tenant))
    order = []
    while s.ledger.requests:
        plan = s.schedule(0)
        order += [work.id for work in plan.work]
        s.complete(plan, answer(plan), 0)
    assert ["a1", "b1", "a2"] == order


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_token_is_refused(budget):
    with pytest.raises(ValueError, match="at least 1 token"):
        load("sarathi", token_budget=budget)


def write_golden() -> None:
    for name in names():
        golden = GOLDEN / f"{name}.jsonl"
        if not golden.exists():
            lines = [r.to_json() for r in run(load(name), load_of_a_busy_minute()[:20], CAPACITY)]
            golden.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_golden()
