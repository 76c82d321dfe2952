"""The page's conversation in a browser: what is sent, what is shown, and where the focus is."""

import json
import math
from collections.abc import Iterator

import pytest

from stallfree.executors.sampling import Sampling
from tests.browser import driver, needs_browser, size
from tests.server.conftest import Server, quiet
from tests.server.models import THINKING, Scripted, chat_text
from tests.server.test_browser import COST, answered, ask, focus, last, page, text
from tests.waiting import until

from selenium import webdriver  # isort: skip
from selenium.webdriver.common.by import By  # isort: skip
from selenium.webdriver.common.keys import Keys  # isort: skip

__all__ = ["driver", "page"]  # fixtures
pytestmark = needs_browser

SPY = """
const fetching = window.fetch;
window.bodies = [];
window.fetch = (url, options) => {
  if (url.includes("chat/completions")) window.bodies.push(options.body);
  return fetching(url, options);
};
"""
BLOCKS = "return [...document.querySelector('.turn .text').children].map((block) => block.childNodes.length)"
ABOVE = "const turns = document.getElementById('turns'); return turns.scrollHeight - turns.scrollTop - turns.clientHeight"
WATCH = "window.said = 0; new MutationObserver(() => ++said).observe(document.getElementById('said'), {childList: true});"


class Pausing(Scripted):
    """Shuts its gate after `pause_after` more iterations."""

    pause_after = math.inf

    def collect(self):
        result = super().collect()
        self.pause_after -= 1
        if self.pause_after == 0:
            self.gate.clear()
        return result


@pytest.fixture(scope="module")
def scripted() -> Iterator[Server]:
    with Server(text=chat_text(), executor=Pausing, max_model_len=4096, sampling=Sampling(temperature=0.25, top_p=0.75)) as server:
        yield server
        server.settled()


@pytest.fixture
def talk(page, scripted) -> webdriver.Chrome:
    """The page of a model that answers "Four.", with its requests' bodies in `bodies`."""
    scripted.executor.script = "Four."
    scripted.executor.pause_after = math.inf
    scripted.executor.gate.set()
    page.get(scripted.url)
    page.execute_script(SPY)
    until(lambda: "idle" == text(page, "status"))
    return page


def bodies(page: webdriver.Chrome) -> list[dict]:
    return [json.loads(body) for body in page.execute_script("return bodies")]


def click(page: webdriver.Chrome, selector: str) -> None:
    page.find_element(By.CSS_SELECTOR, selector).click()


def test_each_question_is_sent_with_the_turns_before_it(talk):
    for question in ("2 + 2?", "Sure?"):
        ask(talk, question)
        answered(talk)
        assert "Four." == last(talk, "text")
    roles = [(message["role"], message["content"]) for message in bodies(talk)[-1]["messages"]]
    assert [("user", "2 + 2?"), ("assistant", "Four."), ("user", "Sure?")] == roles


def test_an_answer_has_its_tokens_ttft_and_rate(page):
    with Server(COST) as server:
        page.get(server.url)
        page.execute_script("document.getElementById('max-tokens').value = 200")
        ask(page, "Go on.")
        answered(page)
        note = last(page, "note")
        assert note.startswith("ended at the limit of tokens · 200 tokens · TTFT ")
        assert " tokens/s · longest gap " in note
        assert 200 == len(last(page, "text"))


def test_shift_and_enter_break_the_line(talk):
    prompt = talk.find_element(By.ID, "prompt")
    prompt.send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert "one\ntwo" == prompt.get_property("value")
    ask(talk, "")
    assert "one\ntwo" == last(talk, "question")
    assert "" == prompt.get_property("value")
    answered(talk)


def test_a_blank_message_is_not_sent(talk):
    talk.find_element(By.ID, "prompt").send_keys("  ", Keys.ENTER)
    assert [] == bodies(talk)


def test_what_the_reader_sets_is_sent_and_empty_fields_are_not(talk):
    ask(talk, "2 + 2?")
    answered(talk)
    talk.find_element(By.CSS_SELECTOR, "#settings summary").send_keys(Keys.ENTER)
    for id, value in (("system", "Be brief."), ("temperature", "0.5"), ("top-p", "0.9"), ("max-tokens", "7")):
        talk.find_element(By.ID, id).send_keys(value)
    click(talk, ".again")
    until(lambda: len(bodies(talk)) == 2)
    answered(talk)
    empty, full = bodies(talk)
    assert {"messages", "stream", "stream_options"} == set(empty)
    assert {"role": "system", "content": "Be brief."} == full["messages"][0]
    assert (0.5, 0.9, 7) == (full["temperature"], full["top_p"], full["max_tokens"])


def test_empty_fields_show_the_servers_values(talk):
    def shown() -> list[str]:
        return [talk.find_element(By.ID, id).get_property("placeholder") for id in ("temperature", "top-p")]

    until(lambda: shown() == ["0.25", "0.75"], shown)


def test_a_wrong_value_is_shown_and_nothing_is_sent(talk):
    talk.execute_script("document.getElementById('temperature').value = 3")
    talk.find_element(By.ID, "prompt").send_keys("2 + 2?", Keys.ENTER)
    until(lambda: talk.find_element(By.ID, "temperature").is_displayed())
    assert "temperature" == focus(talk)
    assert [] == bodies(talk)


def test_regenerate_asks_for_the_last_answer_only(talk, scripted):
    for question in ("2 + 2?", "Sure?"):
        ask(talk, question)
        answered(talk)
    shown = [button for button in talk.find_elements(By.CLASS_NAME, "again") if button.is_displayed()]
    assert ["Regenerate"] == [button.text for button in shown]
    scripted.executor.script = "Yes, four."
    shown[0].send_keys(Keys.ENTER)
    until(lambda: "Yes, four." == last(talk, "text"))
    answered(talk)
    assert bodies(talk)[1] == bodies(talk)[2]
    assert ["Four.", "Yes, four."] == [answer.text for answer in talk.find_elements(By.CSS_SELECTOR, ".turn .text")]
    assert "again plain" == focus(talk)


@pytest.mark.parametrize(("way", "then"), [("key", "prompt"), ("button", "send")])
def test_an_answer_can_be_stopped(talk, scripted, way, then):
    scripted.executor.script = "Four. " * 50
    scripted.executor.pause_after = 20
    ask(talk, "2 + 2?")
    until(lambda: last(talk, "text"))
    if way == "key":
        talk.switch_to.active_element.send_keys(Keys.ESCAPE)
    else:
        click(talk, "#stop")
    answered(talk)
    assert last(talk, "note").startswith("stopped · ")
    assert " tokens · TTFT " in last(talk, "note")
    assert then == focus(talk)
    scripted.executor.gate.set()
    ask(talk, "Sure?")
    answered(talk)
    assert "assistant" == bodies(talk)[-1]["messages"][1]["role"]


def test_a_new_conversation_stops_and_forgets_the_old_one(talk, scripted):
    scripted.executor.script = "Four. " * 50
    scripted.executor.pause_after = 20
    ask(talk, "2 + 2?")
    until(lambda: last(talk, "text"))
    click(talk, "#new")
    assert [] == talk.find_elements(By.CLASS_NAME, "turn")
    assert "prompt" == focus(talk)
    scripted.executor.gate.set()
    until(lambda: talk.find_element(By.ID, "send").is_displayed())
    ask(talk, "Sure?")
    answered(talk)
    assert [{"role": "user", "content": "Sure?"}] == bodies(talk)[-1]["messages"]


def test_reasoning_is_open_while_it_comes_and_closed_after(page):
    with Server(text=chat_text(THINKING), executor=Pausing) as server:
        server.executor.script = "Two and two are, hm, surely four.\n</think>\n\nFour."
        server.executor.pause_after = 15
        page.get(server.url)
        ask(page, "2 + 2?")
        until(lambda: last(page, "thoughts"))
        details = page.find_element(By.CLASS_NAME, "reasoning")
        assert details.get_property("open")
        server.executor.gate.set()
        answered(page)
        assert not details.get_property("open")
        assert ("Two and two are, hm, surely four.", "Four.") == (last(page, "thoughts"), last(page, "text"))


def test_an_error_is_told_in_words_and_can_be_tried_again(talk, scripted):
    ask(talk, "2 + 2?")
    answered(talk)
    scripted.executor.fault = RuntimeError("broken")
    with quiet():
        ask(talk, "Sure?")
        answered(talk)
    assert last(talk, "trouble")
    assert "no answer" in last(talk, "note")
    assert "Try again" == last(talk, "again")
    click(talk, ".turn:last-child .again")
    until(lambda: "Four." == last(talk, "text"))
    answered(talk)
    assert ("", "Regenerate") == (last(talk, "trouble"), last(talk, "again"))


def test_a_turn_without_an_answer_is_left_out(talk):
    ask(talk, "x" * 6000)
    answered(talk)
    assert "at most 4095 fit" in last(talk, "trouble")
    ask(talk, "2 + 2?")
    answered(talk)
    assert [{"role": "user", "content": "2 + 2?"}] == bodies(talk)[-1]["messages"]


def test_what_a_model_writes_is_text(talk, scripted):
    scripted.executor.script = "<img src=x onerror=alert(1)><b>bold</b>"
    ask(talk, "<i>2 + 2?</i>")
    answered(talk)
    assert (scripted.executor.script, "<i>2 + 2?</i>") == (last(talk, "text"), last(talk, "question"))
    assert [] == talk.find_elements(By.CSS_SELECTOR, ".turn img, .turn b, .turn i")


def test_a_long_answer_is_in_few_nodes_and_few_announcements(talk, scripted):
    scripted.executor.script = "and the sea and the sky\n" * 100
    talk.execute_script(WATCH)
    ask(talk, "Go on.")
    answered(talk)
    assert scripted.executor.script == last(talk, "text")
    assert [1, 1] == talk.execute_script(BLOCKS)
    until(lambda: "sky" in talk.execute_script("return document.getElementById('said').textContent"))
    assert talk.execute_script("return said") < len(scripted.executor.script) / 10


def test_the_page_follows_an_answer_only_while_the_reader_is_at_its_end(talk, scripted):
    def above() -> int:
        return talk.execute_script(ABOVE)

    def go_on(iterations: float) -> None:
        length = len(last(talk, "text"))
        scripted.executor.pause_after = iterations
        scripted.executor.gate.set()
        until(lambda: len(last(talk, "text")) > length)

    size(talk, 360, 740)
    scripted.executor.script = "sea\n" * 200
    scripted.executor.pause_after = 300
    ask(talk, "Go on.")
    until(lambda: len(last(talk, "text")) > 250)
    until(lambda: above() < 24, above)
    talk.execute_script("document.getElementById('turns').scrollTop = 0")
    go_on(100)
    assert 0 == talk.execute_script("return document.getElementById('turns').scrollTop")
    talk.execute_script("const t = document.getElementById('turns'); t.scrollTop = t.scrollHeight")
    go_on(math.inf)
    answered(talk)
    assert above() < 24


def test_a_key_press_shows_where_the_focus_is(talk):
    for _ in range(2):
        talk.switch_to.active_element.send_keys(Keys.TAB)
        outline = talk.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert "solid" == outline, focus(talk)
