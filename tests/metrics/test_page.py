"""The page contains everything that it shows."""

import re
import sys

import pytest

from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.metrics.page import page
from stallfree.metrics.report import report
from stallfree.metrics.timeline import Timeline

SLO = Slo.parse("ttft=2s,tbt=100ms")


def page_of(*names: str, lines=None) -> str:
    lines = lines or [
        Timeline(str(i), i, 10, tokens=[i + 0.5, i + 0.6, i + 0.9], finished=i + 1, reason="length") for i in range(5)
    ]
    return page("a <run>", ["rate 2"], ["client & late"], {name: (report(lines, SLO), lines) for name in names}, SLO)


def test_a_page_fetches_nothing():
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page_of("a", "b"))
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)|@import', text)
    assert [] == [link for link in links if not (link[0] or link[1]).startswith(("#", "data:"))]
    assert "<script" not in text


def test_a_page_shows_every_run_the_table_and_what_is_wrong():
    text = page_of("ours", "theirs")
    assert all(
        part in text for part in ("a &lt;run&gt;", "client &amp; late", "<th>ours</th><th>theirs</th>", "TBT p99, ms", "rate 2")
    )


@pytest.mark.parametrize("lines", [[Timeline("a", 0, 1)], [Timeline("a", 0, 1, tokens=[1.0], finished=1, reason="length")]])
def test_a_page_can_be_made_of_runs_with_nothing_in_them(lines):
    assert "<svg" in page_of("a", lines=lines)


def test_without_matplotlib_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[plot\]' in the checkout"):
        plot.require()


def test_the_target_drawn_is_that_of_the_tokens_shown():
    slo = Slo.parse("ttft=2s@p90,tpot=50ms@p95")
    lines = [Timeline("a", 0, 10, tokens=[0.5, 0.6, 0.9], finished=1, reason="length")]
    text = plot.attainment({"ours": [(2.0, report(lines, slo))]}, slo)
    assert all(part in text for part in ("tokens within tpot, %", str(slo.tpot), str(slo.ttft)))
