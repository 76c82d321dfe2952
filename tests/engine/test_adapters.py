"""Adapters come when requests want them, in a thread of their own. What cannot be loaded fails who asked for it, with the
reason."""

import shutil
from pathlib import Path

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.record import StepRecord
from stallfree.core.request import Refused, Request
from stallfree.engine import adapters as module
from stallfree.engine.adapters import BadName, Library, folders
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.executors.simulated import Linear, SimulatedExecutor
from stallfree.policies import load
from tests.adapters import made_adapter
from tests.adapting import Adapting
from tests.checkpoint.test_adapter import CONFIG

TEXT = bytes_as_text()
LETTERS = TEXT.encode("abcdefghijklmnopqrstuvwxyz", special=False)
FAST = Linear(0.0, 0.0, 0.0)


def engine(blocks: int = 64, kind: type[SimulatedExecutor] = Adapting, **options: object) -> Engine:
    return Engine(kind(Capacity(16, blocks, 512), LETTERS, FAST), TEXT, load("sarathi"), **options)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    for number, name in enumerate(("dutch", "french", "greek")):
        made_adapter(tmp_path / name, CONFIG, rank=8, seed=number)
    return tmp_path


def library(own: Engine, shelf: Path, *names: str) -> Library:
    made = Library(own.adapters, CONFIG)
    for name in names:
        made.add(name, made.open(name, shelf / name))
    return made


def ask(own: Engine, id: str, adapter: str = "", max_tokens: int = 3) -> None:
    own.submit(Request(id, TEXT.encode("Hello"), max_tokens, adapter=adapter))


def run(own: Engine) -> dict[str, tuple[str, str]]:
    """The text of each request and why it ended (or its error), once all have."""
    texts: dict[str, str] = {}
    ends: dict[str, str] = {}
    while own.busy:
        for output in own.step():
            texts[output.id] = texts.get(output.id, "") + output.text
            if output.finish_reason is not None:
                ends[output.id] = output.error or output.finish_reason
        if own.waits:
            own.adapters.join()
    own.scheduler.ledger.check()
    return {id: (texts[id], ends[id]) for id in ends}


def test_requests_of_several_adapters_and_of_none_share_iterations(shelf):
    own = engine()
    library(own, shelf, "dutch", "french")
    ask(own, "a", "dutch", max_tokens=40)
    ask(own, "b", "french", max_tokens=40)
    own.step()
    while own.adapters.under_way:
        own.adapters.join()
        own.adapters.start()
    ask(own, "c", max_tokens=40)
    ended = run(own)
    assert ("length",) * 3 == tuple(reason for _, reason in ended.values())
    assert len({text for text, _ in ended.values()}) == 3
    assert {"dutch", "french", ""} in own.executor.used
    own.close()


def test_who_has_no_adapter_does_not_wait_for_a_load(shelf):
    own = engine()
    library(own, shelf, "dutch")
    own.executor.gate.clear()
    ask(own, "waits", "dutch")
    ask(own, "plain")
    ended = []
    while "plain" not in ended:
        ended += [output.id for output in own.step() if output.finish_reason]
    assert own.adapters.under_way
    own.executor.gate.set()
    assert {"waits"} == run(own).keys()
    own.close()


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), RuntimeError("a bug")])
def test_a_load_that_fails_ends_its_requests_with_the_reason_and_the_next_one_tries_again(shelf, fault):
    own = engine()
    library(own, shelf, "dutch")
    own.executor.fault = fault
    ask(own, "a", "dutch")
    ask(own, "b", "dutch")
    ask(own, "plain")
    ended = run(own)
    for id in "ab":
        assert "adapter 'dutch' cannot be loaded" in ended[id][1]
        assert ("Input/output error" if isinstance(fault, OSError) else "a bug") in ended[id][1]
    assert "length" == ended["plain"][1]
    ask(own, "c", "dutch")
    assert "length" == run(own)["c"][1]
    own.close()


def test_a_file_that_changed_on_the_disk_fails_who_asked(shelf):
    own = engine()
    library(own, shelf, "dutch")
    made_adapter(shelf / "dutch", CONFIG, modules=("o_proj",), rank=4)
    ask(own, "a", "dutch")
    assert "changed after it was opened" in run(own)["a"][1]
    shutil.rmtree(shelf / "dutch")
    ask(own, "b", "dutch")
    assert "No such file" in run(own)["b"][1]
    own.close()


def test_an_adapter_that_leaves_serves_who_asked_before_and_then_goes(shelf):
    own = engine()
    shelved = library(own, shelf, "dutch")
    ask(own, "a", "dutch", max_tokens=20)
    own.step()
    shelved.remove("dutch")
    assert shelved.key("dutch") is None
    assert "length" == run(own)["a"][1]
    own.step()
    assert {} == own.scheduler.ledger.adapters.known
    assert {} == own.executor.loaded
    assert 64 == own.scheduler.ledger.pool.num_free
    with pytest.raises(Refused, match="adapter 'dutch' is not loaded"):
        ask(own, "b", "dutch")
    own.close()


def test_a_later_version_of_a_name_shares_no_prefix_with_the_first(shelf):
    records: list[StepRecord] = []
    own = engine(record=records.append)
    shelved = library(own, shelf, "dutch")
    first = shelved.key("dutch")
    long = TEXT.encode("x" * 100)
    own.submit(Request("a", long, 2, adapter=first))
    run(own)
    shelved.remove("dutch")
    shelved.add("dutch", shelved.open("dutch", shelf / "french"))
    second = shelved.key("dutch")
    assert first != second
    own.submit(Request("b", long, 2, adapter=second))
    run(own)
    assert [("a", 0), ("b", 0)] == [pair for record in records for pair in record.cached]
    assert [("a", first, 2, 8), ("b", second, 2, 8)] == [pair for record in records for pair in record.adapters]
    assert [first, second] == [row.key for record in records for row in record.loaded]
    own.close()


def test_more_adapters_than_room_are_served_one_after_another(shelf):
    own = engine(blocks=5)  # two blocks an adapter, and one for a request
    library(own, shelf, "dutch", "french", "greek")
    for number in range(4):
        for name in ("dutch", "french", "greek"):
            ask(own, f"{name} {number}", name)
    assert {"length"} == {reason for _, reason in run(own).values()}
    own.close()


def test_a_first_token_waits_for_the_loads_before_it_too(shelf):
    own = engine()
    library(own, shelf, "dutch", "french", "greek")
    new = {name: Request("new", [1], 1, adapter=name) for name in ("", "dutch", "french", "greek")}
    own.executor.gate.clear()
    ask(own, "a", "dutch")
    ask(own, "b", "french")
    own.step()
    once = own.adapters.wait_s(new["dutch"])
    assert once > 0
    assert [0.0, 2 * once, 3 * once] == pytest.approx([own.adapters.wait_s(new[name]) for name in ("", "french", "greek")])
    own.executor.gate.set()
    run(own)
    assert [0.0, 0.0] == [own.adapters.wait_s(new[name]) for name in ("dutch", "french")]
    assert own.adapters.wait_s(new["greek"]) > 0
    own.close()


def test_an_abort_while_its_adapter_is_loaded_disturbs_nobody(shelf):
    own = engine()
    library(own, shelf, "dutch")
    own.executor.gate.clear()
    ask(own, "a", "dutch")
    own.step()
    own.abort("a")
    own.executor.gate.set()
    own.adapters.join()
    own.step()
    assert "resident" == own.scheduler.ledger.adapters.state("dutch")
    own.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a name is 1 to 200"),
        ("a b", "a name is 1 to 200"),
        ("../x", "a name is 1 to 200"),
        ("x" * 201, "a name is 1 to 200"),
        ("a#2", "a name is 1 to 200"),
        ("dutch", "in use; remove that adapter first"),
        ("toy", "the model's own"),
    ],
)
def test_names_that_cannot_be_are_refused(shelf, name, message):
    shelved = library(engine(), shelf, "dutch")
    shelved.reserve(("toy",))
    with pytest.raises(BadName, match=message):
        shelved.open(name, shelf / "french")


def test_the_model_cannot_have_the_name_of_an_adapter(shelf):
    shelved = library(engine(), shelf, "dutch")
    with pytest.raises(ValueError, match="'dutch' is the model's own, and an adapter's"):
        shelved.reserve(("toy", "dutch"))


def test_an_executor_is_ready_for_all_modules_before_there_are_requests(shelf):
    own = engine()
    made_adapter(shelf / "wide", CONFIG, modules=("q_proj", "v_proj", "o_proj"))
    library(own, shelf, "dutch", "french", "wide")
    own.adapters.warm_up()
    assert {} == own.executor.loaded
    assert ["wide"] == own.executor.loads
    own.executor.fault = OSError(5, "Input/output error")
    with pytest.raises(ValueError, match="wide: cannot be read: Input/output error"):
        own.adapters.warm_up()


def test_an_executor_without_adapters_says_so(shelf):
    own = engine(kind=SimulatedExecutor)
    with pytest.raises(ValueError, match="runs no adapters; take --executor openvino or torch"):
        library(own, shelf, "dutch")


def test_an_adapter_larger_than_all_kv_is_refused(shelf):
    with pytest.raises(ValueError, match="takes 2 KV blocks, and there are 2; give more, --kv-memory"):
        library(engine(blocks=2), shelf, "dutch")


def test_there_is_a_limit_to_their_number(shelf, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    shelved = library(engine(), shelf, "dutch", "french")
    with pytest.raises(ValueError, match="there are 2 adapters already"):
        shelved.open("greek", shelf / "greek")
    assert shelved.open("dutch", shelf / "greek", replaces=True)
    with pytest.raises(ValueError, match="3 adapters, and at most 2 are served"):
        folders((), shelf)


def test_a_folder_of_adapters_is_read_by_the_names_of_its_folders(shelf):
    (shelf / "notes.txt").write_text("no adapter")
    (shelf / ".cache").mkdir()
    assert ["dutch", "french", "greek"] == list(folders((), shelf))
    assert {"x": Path("y=z")} == folders(["x=y=z"], None)


@pytest.mark.parametrize(
    ("given", "folder", "message"),
    [
        (["dutch"], None, "--adapter 'dutch' is not NAME=FOLDER"),
        (["=x"], None, "is not NAME=FOLDER"),
        (["x="], None, "is not NAME=FOLDER"),
        (["a=x", "a=y"], None, "--adapter a: the name is given twice"),
        (["dutch=x"], ".", "dutch is also given with --adapter"),
        ([], "nowhere", "nowhere: cannot be read: No such file"),
        ([], "dutch/adapter_config.json", "cannot be read: Not a directory"),
        ([], "dutch", "the folder has no sub-folders"),
    ],
)
def test_what_is_no_adapter_on_the_command_line_is_named(shelf, given, folder, message):
    with pytest.raises(ValueError, match=message):
        folders(given, None if folder is None else shelf / folder)


def test_a_name_that_is_not_there_has_a_hint(shelf):
    shelved = library(engine(), shelf, "dutch", "french")
    assert " (did you mean 'french'?)" == shelved.nearest("frenc")
    assert "" == shelved.nearest("zulu")


def test_another_engine_s_adapter_is_found_by_its_contents(shelf):
    own = engine()
    library(own, shelf, "dutch")
    contents = own.adapters.identity("dutch")
    other = engine()
    made_adapter(shelf / "copy" / "dutch", CONFIG, rank=8, seed=0)
    shelved = Library(other.adapters, CONFIG)
    shelved.add("dutch", shelved.open("dutch", shelf / "copy" / "dutch"))
    assert "dutch" == other.adapters.find("dutch", contents)
    assert other.adapters.find("french", contents) is None
    shelved.remove("dutch")
    shelved.add("dutch", shelved.open("dutch", shelf / "french"))
    other.step()
    assert other.adapters.find("dutch", contents) is None
