"""The pages that commands write, on a phone: a wide table scrolls in its own box, and the page does not."""

import pytest
from matplotlib.backends import backend_svg  # noqa: F401  (skips early where there is no matplotlib)

from stallfree.core.slo import Slo
from stallfree.metrics.page import loads_page, page, plan_page
from stallfree.metrics.report import report
from stallfree.metrics.timeline import Timeline
from tests.browser import beyond, driver, needs_browser, size

__all__ = ["driver"]  # a fixture
pytestmark = needs_browser

SLO = Slo.parse("ttft=2s@p90,tbt=100ms@p99")
LINES = [Timeline(str(i), i, 10, tokens=[i + 0.5, i + 0.6, i + 0.9], finished=i + 1, reason="length") for i in range(5)]
NAMES = ["http://a-server-with-a-long-name.example:8000/v1", *(f"2 x sarathi:{2**i} TP4 PP2, fp8 weights" for i in range(6, 12))]
FACTS = [f"model: /a/folder/{'with-a-long-name' * 8}/model.gguf", "rate 2", " ".join(["--an-option", "value"] * 40)]
ROWS = [["", *NAMES], *([["TBT p99, ms", *["123.4"] * len(NAMES)]] * 12)]
REPORT = report(LINES, SLO)
PAGES = {
    "runs": lambda: page("stallfree bench compare", FACTS, ["x" * 200], dict.fromkeys(NAMES, (REPORT, LINES)), SLO),
    "loads": lambda: loads_page("stallfree compare", FACTS, ROWS, {(name, rate): REPORT for name in NAMES for rate in (1.0, 2.0)}),
    "plan": lambda: plan_page("stallfree plan", FACTS, ROWS, {name: [(1.0, REPORT), (2.0, REPORT)] for name in NAMES}, SLO),
}


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("kind", PAGES)
def test_nothing_runs_over_the_edge_and_pictures_are_large_enough_to_read(driver, tmp_path, kind, width):
    file = tmp_path / "page.html"
    file.write_text(PAGES[kind]())
    size(driver, width, 800)
    driver.get(file.as_uri())
    assert (width, 0) == beyond(driver)
    pictures = "[...document.querySelectorAll('svg')]"
    boxes = driver.execute_script(f"return {pictures}.map((svg) => svg.getBoundingClientRect())")
    assert boxes
    assert all(0 <= box["left"] and box["right"] <= width for box in boxes)
    # Letters of 10 pt are at least 6 pt large: a point is 4/3 px, and a picture has its own size in points.
    scales = driver.execute_script(f"return {pictures}.map((svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)")
    assert min(scales) * 3 / 4 > 0.6
