"""Tokens are counted whatever a server's events are like, and however its bytes are cut."""

import pytest

from stallfree.bench.events import Events
from tests.bench.conftest import chunk

DONE = "data: [DONE]\n\n"


def fed(*texts: str) -> tuple[list[int], Events]:
    events = Events()
    return [events.feed(text.encode()) for text in texts], events


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": tokens}


def test_an_event_is_a_token_if_it_says_nothing_else():
    assert [1, 1, 2] == fed(chunk("a"), chunk("b"), chunk("c") + chunk("d"))[0]


def test_a_piece_of_a_character_without_text_is_a_token_and_an_empty_end_is_none():
    assert [1, 1, 0] == fed(chunk("a"), chunk(""), chunk("", "length"))[0]


def test_an_end_with_text_is_a_token():
    assert [1, 1] == fed(chunk("a"), chunk("b", "length"))[0]


def test_an_event_with_token_ids_is_as_many_tokens():
    assert [3, 0] == fed(chunk("abc", token_ids=[1, 2, 3]), chunk("", "stop", token_ids=[]))[0]


def test_usage_in_every_event_is_the_count():
    assert [1, 2, 0] == fed(chunk("a", usage=usage(1)), chunk("bc", usage=usage(3)), chunk("", "length", usage=usage(3)))[0]


def test_usage_at_the_end_brings_what_was_not_counted():
    counts, events = fed(
        chunk("ab"), chunk("", "length"), 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
    )
    assert [1, 0, 2] == counts
    assert 7 == events.prompt_tokens


def test_bytes_may_be_cut_anywhere():
    text = (chunk("ä") + ": a comment\r\n\r\n" + chunk("b").replace("\n", "\r\n") + DONE).encode()
    events = Events()
    assert 2 == sum(events.feed(text[i : i + 1]) for i in range(len(text)))
    assert events.finished


@pytest.mark.parametrize(("text", "finished"), [(DONE, True), (chunk("", "length"), True), (chunk("a"), False)])
def test_a_stream_is_finished_by_a_reason_or_by_done(text, finished):
    assert finished == fed(text)[1].finished


def test_an_error_in_the_stream_is_kept():
    assert "on fire" == fed('data: {"error": {"message": "on fire"}}\n\n')[1].error


@pytest.mark.parametrize("text", ["data: {\n", "data: []\n", 'data: {"object": "x"}\n', 'data: {"choices": [{}]}\n'])
def test_an_event_that_is_no_completions_is_shown(text):
    with pytest.raises(ValueError, match="not a completion's"):
        fed(text)
