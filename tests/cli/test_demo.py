"""The demo on the simulated executor. Its time is virtual, so every run shows the same."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from stallfree.cli import main
from stallfree.cli.demo import PROMPTS, STREAM_TOKENS, STREAMS, Picture, burst
from stallfree.core.slo import Slo


@pytest.fixture
def stallfree(monkeypatch, capsys):
    """Runs a command in this process and gives what it prints."""
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stallfree", *arguments, "--executor", "simulated"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_the_slo_policy_keeps_the_streams_in_time_and_the_fixed_budget_does_not(stallfree):
    answer = json.loads(stallfree("demo", "--json"))
    fixed, slo = answer["fixed"]["all"], answer["slo"]["all"]
    assert (512, "tbt=100ms@p99") == (answer["token_budget"], answer["target"])
    assert [STREAMS + PROMPTS] * 2 == [fixed["completed"], slo["completed"]]
    assert STREAMS * STREAM_TOKENS < slo["output_tokens"] == fixed["output_tokens"]
    assert (False, True) == (fixed["slo_attainment"]["tbt"]["met"], slo["slo_attainment"]["tbt"]["met"])


def test_without_a_terminal_the_table_is_printed(stallfree):
    out = stallfree("demo", "--slo", "tbt=80ms@p95", "--token-budget", "256")
    assert all(
        part in out
        for part in (
            "fixed budget, 256",
            "slo, tbt=80ms@p95",
            "tokens late for tbt 80ms@p95",
            "TBT p99, ms",
            "TTFT p50 of the long",
        )
    )


@pytest.mark.parametrize(("slo", "says"), [("tbt=1ms", "cannot be met"), ("tbt=100", "has no unit")])
def test_a_target_that_cannot_be_is_said(monkeypatch, capsys, slo, says):
    monkeypatch.setattr(sys, "argv", ["stallfree", "demo", "--executor", "simulated", "--slo", slo])
    with pytest.raises(SystemExit):
        main()
    assert says in capsys.readouterr().err


def test_a_burst_is_the_same_every_time_and_in_order():
    first, second = burst(256), burst(256)
    assert [(r.id, r.arrival, r.prompt) for r in first] == [(r.id, r.arrival, r.prompt) for r in second]
    assert sorted(r.arrival for r in first) == [r.arrival for r in first]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (90, 24), (200, 50), (40, 20)])
def test_the_picture_fits_the_terminal(width, height):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    players = {name: SimpleNamespace(records=[]) for name in ("fixed", "slo")}
    picture = Picture(console, players, Slo.parse("tbt=100ms"))
    lines = console.render_lines(picture.now(), pad=False)
    assert len(lines) <= height
    assert {"fixed", "slo"} <= {word for line in lines for segment in line for word in segment.text.split()}
