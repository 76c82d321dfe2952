"""The page in a browser: charts, widths, names and keys. Its conversation is in test_conversation.py."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlparse

import httpx
import pytest

from stallfree.core.request import Request
from stallfree.core.slo import Slo
from tests.adapters import made_adapter
from tests.adapting import Adapting
from tests.browser import beyond, driver, needs_browser, size
from tests.checkpoint.test_adapter import CONFIG
from tests.server.conftest import Linear, Server, quiet
from tests.waiting import PATIENCE_S, until

from selenium import webdriver  # isort: skip
from selenium.webdriver.common.by import By  # isort: skip
from selenium.webdriver.common.keys import Keys  # isort: skip

__all__ = ["driver"]  # a fixture
pytestmark = needs_browser

COST = Linear(iteration_s=0.004, token_s=0.0004, context_s=0.0)
PAINTED = """
return [...document.querySelectorAll('[data-chart]')].map((figure) => {
  const canvas = figure.querySelector('canvas');
  const pixels = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return [figure.dataset.chart, new Set(pixels).size];
});
"""


@pytest.fixture
def page(driver) -> Iterator[webdriver.Chrome]:
    """A browser at its usual size. By the end of a test its page must have logged no error and asked no other host."""
    driver.get_log("browser")
    driver.get_log("performance")
    yield driver
    # Chromium logs every answer of 400 and more, and every missing one.
    routes = ("/live?since=", "/v1/models", "/v1/chat/completions")
    complaints = [entry for entry in driver.get_log("browser") if not any(route in entry["message"] for route in routes)]
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.get("about:blank")
    assert [] == complaints
    assert {"127.0.0.1"} == {
        urlparse(url).hostname for url in urls if not url.startswith(("chrome:", "chrome-untrusted:", "about:", "data:"))
    }


@pytest.fixture(scope="module")
def loaded() -> Iterator[Server]:
    """A server with a stream that goes on and on, and a long prompt every now and then, which makes a token late."""
    over = threading.Event()

    def streams(url: str) -> None:
        while not over.is_set():
            httpx.post(f"{url}/v1/completions", json={"prompt": "a" * 40, "max_tokens": 400}, timeout=PATIENCE_S)

    def prompts(url: str) -> None:
        number = 0
        while not over.wait(0.3):
            number += 1
            httpx.post(f"{url}/v1/completions", json={"prompt": f"{number} " * 150, "max_tokens": 2}, timeout=PATIENCE_S)

    with Server(COST, slo=Slo.parse("ttft=2s,tbt=20ms")) as server:
        threads = [threading.Thread(target=target, args=(server.url,)) for target in (streams, streams, prompts)]
        for thread in threads:
            thread.start()
        yield server
        over.set()
        for thread in threads:
            thread.join()


def text(page: webdriver.Chrome, id: str) -> str:
    return page.find_element(By.ID, id).text


def ask(page: webdriver.Chrome, question: str) -> None:
    """Send `question` by the keyboard, and wait until the page shows it."""
    turns = len(page.find_elements(By.CLASS_NAME, "turn"))
    page.find_element(By.ID, "prompt").send_keys(question, Keys.ENTER)
    until(lambda: len(page.find_elements(By.CLASS_NAME, "turn")) == turns + 1)


def last(page: webdriver.Chrome, part: str) -> str:
    """The text of a part of the last turn: its "question", "thoughts", "text", "trouble" or "note"."""
    return page.execute_script(f"return document.querySelector('.turn:last-child .{part}').textContent")


def answered(page: webdriver.Chrome) -> None:
    until(lambda: page.find_element(By.ID, "send").is_displayed() and last(page, "note"))


def focus(page: webdriver.Chrome) -> str:
    return page.execute_script("return document.activeElement.id || document.activeElement.className")


def test_every_chart_is_drawn_with_data(page, loaded):
    page.get(loaded.url)
    until(lambda: page.execute_script("return document.querySelectorAll('#stalls li').length"))
    painted = dict(page.execute_script(PAINTED))
    assert {"tokens", "time", "budget", "requests", "memory"} == set(painted)
    assert all(colours > 10 for colours in painted.values()), painted
    labels = {figure.get_attribute("data-chart"): figure.text for figure in page.find_elements(By.CSS_SELECTOR, "[data-chart]")}
    assert "SLO 20 ms" in labels["time"].replace("\n", " ")
    assert "budget 64 tokens" in labels["budget"].replace("\n", " ")


def test_header_latencies_and_stalls_say_what_the_server_does(page, loaded):
    page.get(loaded.url)
    until(lambda: "late" in text(page, "stalls"))
    assert ("toy", "sarathi", "ttft=2s@p90, tbt=20ms@p99") == tuple(text(page, id) for id in ("model", "policy", "slo"))
    assert "prefill tokens of" in text(page, "stalls")
    assert text(page, "tbt").startswith("TBT")
    assert "ms" in text(page, "tbt")
    assert "live" == text(page, "status")


@pytest.mark.parametrize("width", [360, 1400])
def test_tenants_have_a_table_once_there_are_two(page, width):
    with Server() as server:
        size(page, width, 900)
        page.get(server.url)
        until(lambda: text(page, "status") in ("live", "idle"))
        assert not page.find_element(By.ID, "tenants").is_displayed()
        server.live.refuse("acme", server.engine.clock())
        for name, weight in (("acme", 3.0), ("a-crawler-with-a-long-name-that-goes-on", 1.0)):
            request = Request(name, list(range(20)), 2, arrival=server.engine.clock(), tenant=name, weight=weight)
            server.engine_thread.call(partial(server.engine.submit, request))
        until(lambda: page.find_element(By.ID, "tenants").is_displayed())
        cells = (
            "return [...document.querySelectorAll('#tenants-rows tr')].map((row) => [...row.cells].map(({textContent: t}) => t))"
        )
        expected = {("acme", "3", "–", "0", "1"), ("a-crawler-with-a-long-name-that-goes-on", "1", "–", "0", "0")}
        until(lambda: expected == {(name, *others) for name, _, *others in page.execute_script(cells)})
        assert (width, 0) == beyond(page)


@pytest.mark.parametrize("width", [360, 1400])
def test_adapters_have_a_table_where_the_server_has_any(page, tmp_path, width):
    with Server(executor=Adapting, model=CONFIG) as server:
        size(page, width, 900)
        page.get(server.url)
        until(lambda: text(page, "status") in ("live", "idle"))
        assert not page.find_element(By.ID, "adapters").is_displayed()
        for name in ("dutch", "an-adapter-with-a-name-that-goes-on-and-on-and-on"):
            server.library.add(name, server.library.open(name, made_adapter(tmp_path / name, CONFIG)))
        server.engine_thread.call(partial(server.engine.submit, Request("a", list(range(20)), 2, adapter="dutch")))
        until(lambda: page.find_element(By.ID, "adapters").is_displayed())
        cells = (
            "return [...document.querySelectorAll('#adapters-rows tr')].map((row) => [...row.cells].map(({textContent: t}) => t))"
        )
        expected = [["dutch", "resident", "8", "0"], ["an-adapter-with-a-name-that-goes-on-and-on-and-on", "away", "8", "0"]]
        until(lambda: expected == page.execute_script(cells))
        assert text(page, "adapters-note").startswith("1 resident in 0.2 % of the KV blocks, 0 loading, 1 on the disk.")
        assert (width, 0) == beyond(page)


@pytest.mark.parametrize("width", [360, 390, 768, 1400])
def test_nothing_runs_over_the_edge(page, loaded, width):
    size(page, width, 740)
    page.get(loaded.url)
    until(lambda: page.execute_script("return document.querySelectorAll('#stalls li').length"))
    ask(page, "Why?")
    until(lambda: last(page, "text"))
    page.find_element(By.CSS_SELECTOR, "#settings summary").click()
    assert (width, 0) == beyond(page)


def test_long_names_and_words_fit_a_phone(page):
    with Server(COST, slo=Slo.parse("ttft=2500ms@p99.9,tbt=1250.5ms@p99.95")) as server:
        size(page, 390, 800)
        page.get(server.url)
        until(lambda: "idle" == text(page, "status"))
        names = "for (const id of ['model', 'policy', 'context']) document.getElementById(id).textContent = id.repeat(40)"
        ask(page, "x" * 1000)
        until(lambda: last(page, "text"))
        page.execute_script(names)
        assert (390, 0) == beyond(page)


def test_every_field_and_picture_has_a_name(page, loaded):
    page.get(loaded.url)
    until(lambda: "live" == text(page, "status"))
    ask(page, "Why?")
    nameless = """
    const fields = [...document.querySelectorAll('input, textarea')].filter((field) => !field.labels.length);
    const buttons = [...document.querySelectorAll('button, summary')].filter((button) => !button.textContent.trim());
    const pictures = [...document.querySelectorAll('[role=img]')].filter((picture) => !picture.ariaLabel);
    return [...fields, ...buttons, ...pictures].map((element) => element.outerHTML);
    """
    assert [] == page.execute_script(nameless)
    picture = page.find_element(By.CSS_SELECTOR, "[data-chart=tokens] [role=img]")
    assert "Tokens per iteration, last 30 seconds: decode " in picture.get_attribute("aria-label")


def test_with_a_key_the_page_asks_for_it_and_sends_it_in_no_address(page):
    with Server(api_key="sesame") as server, quiet():
        page.get(server.url)
        until(lambda: page.find_element(By.ID, "key").is_displayed())
        for key, says in (("wrong", "the key is wrong"), ("sesame", "idle")):
            page.find_element(By.ID, "key").send_keys(key)
            page.find_element(By.CSS_SELECTOR, "#key-form button").click()
            until(lambda says=says: says == text(page, "status"))
        assert not page.find_element(By.ID, "key").is_displayed()
        ask(page, "Why?")
        until(lambda: "tokens/s" in last(page, "note"))
        assert "" == page.execute_script("return JSON.stringify(localStorage) + JSON.stringify(sessionStorage)").replace("{}", "")
        assert "sesame" not in page.page_source
        urls = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert not [url for url in urls if "sesame" in url]


def test_without_a_key_the_conversation_says_so(page):
    with Server(api_key="sesame") as server, quiet():
        page.get(server.url)
        until(lambda: "key" == focus(page))
        ask(page, "2 + 2?")
        answered(page)
        assert "wants an API key" in last(page, "trouble")
        page.find_element(By.ID, "key").send_keys("sesame", Keys.ENTER)
        until(lambda: "idle" == text(page, "status"))
        assert "prompt" == focus(page)
        page.execute_script("document.getElementById('max-tokens').value = 5")
        page.find_element(By.CLASS_NAME, "again").click()
        until(lambda: "5 tokens" in last(page, "note"))


def test_a_server_that_goes_away_is_noticed(page):
    with Server() as server:
        page.get(server.url)
        until(lambda: "idle" == text(page, "status"))
    until(lambda: "does not answer" in text(page, "status"))
