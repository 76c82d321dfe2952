"""The command line: its output, and its messages for mistakes."""

import inspect
import json
import subprocess
import sys
from dataclasses import fields

import pytest
import typer

from stallfree import policies
from stallfree.cli import app, main
from stallfree.cli.deploy import deploy
from stallfree.cli.options import Served, memory
from stallfree.cli.serve import serve
from stallfree.engine.assemble import Options
from stallfree.sim.systems import SYSTEMS
from tests.waiting import PATIENCE_S


@pytest.fixture
def stallfree(tmp_path, monkeypatch):
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stallfree", *arguments]
        return subprocess.run(command, capture_output=True, text=True, input=input, timeout=PATIENCE_S, check=False)

    return run


def test_every_policy_is_listed_with_what_it_does(stallfree):
    rows = json.loads(stallfree("list", "policies", "--json").stdout)
    assert [*policies.names(), "elastic", "loongserve", *SYSTEMS] == [row["name"] for row in rows]
    assert all(len(row["what"]) > 20 for row in rows)


@pytest.mark.parametrize("command", [serve, deploy])
def test_servers_take_all_that_an_engine_is_made_of(command):
    made_of = {field.name for field in fields(Options)}
    assert made_of == {field.name for field in fields(Served)}
    assert made_of <= inspect.signature(command).parameters.keys()


def commands(group: object, *path: str):
    """The words of every command and group."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *path, name)


@pytest.mark.parametrize("words", [*commands(typer.main.get_command(app))], ids=" ".join)
def test_help_is_whole_at_80_columns(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["stallfree", *words, "--help"])
    with pytest.raises(SystemExit):
        main()
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Usage: ")]
    assert len(lines) > 5
    assert [] == [line for line in lines if len(line) > 80 or "…" in line or line.endswith("...")]


@pytest.mark.parametrize("words", [words for words in commands(typer.main.get_command(app)) if words], ids=" ".join)
def test_every_command_takes_a_file_of_options_and_names_its_model_alike(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stallfree", *words, "--help"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert ("--config" in out) == (words not in [("bench",), ("reproduce",), ("vllm",)])
    assert "[model]" not in out or "--model" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simulate", "--rate", "x"), "'--rate': Input should be a valid number, unable to parse string as a number, not 'x'"),
        (("serve", "--port", "99999"), "'--port': Input should be less than or equal to 65535, not '99999'"),
        (("bench", "load", "--rate", "x"), "not 'x'"),
        (("list", "nope"), "'nope' is not one of"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_named(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stallfree", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert 2 == end.value.code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("way", [("llama9",), ("--model", "llama9"), ("-m", "llama9"), ("llama9", "--model", "llama9")])
def test_a_model_may_be_named_as_argument_or_as_option(stallfree, way):
    assert "no model at 'llama9'" in stallfree("serve", "--port", "0", *way).stderr


def test_two_models_are_refused(stallfree):
    done = stallfree("serve", "one", "--model", "two", "--port", "0")
    assert (1, "error: one and --model two name two models; give one of them\n") == (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("words", "text", "says"),
    [
        (("serve",), 'model = "llama9"\nport = 0', "no model at 'llama9'"),
        (("serve",), 'policy = "saraty"\nport = 0', "did you mean 'sarathi'?"),
        (("serve",), 'kv-memory = "lots"', "'lots' is not an amount of memory"),
        (("serve",), "prefix-cache = 1", "prefix-cache is 1, expected true or false"),
        (("serve",), 'weights = "int3"', "'int3' is not one of"),
        (("serve",), "prot = 1", "unknown option 'prot' (did you mean 'port'?)"),
        (("serve",), "[configurations.a]\ntp = 2", "this command takes one configuration"),
        (("generate", "x"), 'model = "llama9"', "no model at 'llama9'"),
        (("bench", "load"), 'rate = 1\nurl = "localhost"', "'localhost' is not a server's URL"),
        (("bench", "load"), 'rate = "1"', "rate is '1', expected a number"),
        (("plan",), 'slo = "tbt"\nmodel = "llama2-7b"', "'tbt' is not a latency target"),
        (("compare", "slo"), 'model = "llama3-8b"\nrates = "2,x"', "are not different rates above 0"),
        (("perf",), 'model = "llama9"', "unknown model 'llama9'"),
        (("route",), 'decode = "nowhere"', "'nowhere' is not a server's URL"),
        (("reproduce", "sarathi"), "only = 3", "only is 3, expected a list of texts in quotes"),
        (("reproduce", "sarathi"), 'only = ["chunking"]\nengine = "fast"', "unknown engine 'fast'"),
    ],
)
def test_options_come_from_a_file_for_every_command(stallfree, tmp_path, words, text, says):
    (tmp_path / "options.toml").write_text(text)
    done = stallfree(*words, "--config", str(tmp_path / "options.toml"))
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_on_the_command_line_comes_before_the_file(stallfree, tmp_path):
    (tmp_path / "options.toml").write_text('model = "llama9"')
    assert (
        "no model at 'llama8'"
        in stallfree("serve", "--port", "0", "-m", "llama8", "--config", str(tmp_path / "options.toml")).stderr
    )


def test_no_model_is_cached_at_first(stallfree):
    assert "no model is cached" in stallfree("models").stdout
    assert [] == json.loads(stallfree("models", "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--max-token", "3"], "--max-tokens"),
        (["generat"], "'generate'"),
        (["serve", "--polcy", "orca"], "--policy"),
        (["list", "polices"], "'policies'"),
        (["generate", "x", "--weights", "int3"], "'int8'"),
        (["serve", "--kv-memory", "lots"], "not an amount of memory"),
    ],
)
def test_a_slip_in_the_usage_names_what_was_meant(stallfree, arguments, says):
    done = stallfree(*arguments)
    assert 2 == done.returncode
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--policy", "saraty", "--port", "0"], "did you mean 'sarathi'?"),
        (["serve", "--policy", "orca", "--token-budget", "5", "--port", "0"], "'orca' takes no token_budget"),
        (["serve", "--executor", "simulatd", "--port", "0"], "did you mean 'simulated'?"),
        (["serve", "--max-seqs", "0", "--port", "0"], "max_seqs (0)"),
        (["generate", "x", "--model", "nowhere.gguf"], "no model at 'nowhere.gguf'"),
        (["generate", "x", "--model", "smollm2-135m-instuct"], "did you mean 'smollm2-135m-instruct'?"),
        (["generate", "x", "--model", __file__], "GGUF"),
        (["generate", "x", "--adapter", "french"], "--adapter 'french' is not NAME=FOLDER"),
        (["chat", "--adapter", "french=nowhere"], "nowhere/adapter_config.json: missing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(stallfree, arguments, says):
    done = stallfree(*arguments)
    assert 1 == done.returncode
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "bytes"), [("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5g", 3 << 29), ("64kb", 64 << 10), ("1000", 1000)]
)
def test_amounts_of_memory(text, bytes):
    assert bytes == memory(text)


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "GiB", "1XB", "1e9"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(typer.BadParameter, match="not an amount"):
        memory(text)


def test_a_model_that_there_is_not_is_named_before_anything_is_deployed(stallfree):
    done = stallfree("deploy", "llama2-13b", "--executor", "torch")
    assert 1 == done.returncode
    assert done.stderr.startswith("error: no model at 'llama2-13b'")
