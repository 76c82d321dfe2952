"""Tokens are counted correctly for every kind of event, however the bytes are cut."""

import json

import pytest

from stallfree.bench.events import Events
from tests.bench.conftest import chunk

DONE = "data: [DONE]\n\n"
ROLE = chunk("")


def fed(*texts: str, most: int = 99) -> tuple[list[int], Events]:
    """The times of the tokens, and the `Events`, if the texts come at the times 0, 1, 2, ..."""
    events = Events(most)
    for now, text in enumerate(texts):
        events.feed(text.encode(), now)
    events.end(len(texts))
    return events.times(), events


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": tokens}


def last(tokens: int) -> str:
    """A usage in an event of its own."""
    return f"data: {json.dumps({'choices': [], 'usage': usage(tokens)})}\n\n"


def delta(**fields: str | None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': fields, 'finish_reason': None}]})}\n\n"


def test_an_event_is_a_token_if_it_says_nothing_else():
    assert [0, 1, 2, 2] == fed(chunk("a"), chunk("b"), chunk("c") + chunk("d"))[0]


def test_a_piece_of_a_character_without_text_is_a_token_and_an_empty_end_is_none():
    assert [0, 1] == fed(chunk("a"), chunk(""), chunk("", "length"))[0]


def test_an_end_with_text_is_a_token():
    assert [0, 1] == fed(chunk("a"), chunk("b", "length"))[0]


def test_an_event_with_token_ids_is_as_many_tokens():
    assert [0, 0, 0] == fed(chunk("abc", token_ids=[1, 2, 3]), chunk("", "stop", token_ids=[]))[0]


def test_a_first_event_without_text_is_no_token():
    assert [1, 2] == fed(ROLE, chunk("a"), chunk("b"), chunk("", "length"))[0]


def test_an_event_without_text_is_no_token_if_there_would_be_more_than_were_asked_for():
    assert [0, 2] == fed(chunk("a"), chunk(""), chunk("b"), most=2)[0]
    assert [0, 1, 2] == fed(chunk("a"), chunk(""), chunk("b"), most=3)[0]


def test_usage_in_every_event_is_the_count():
    times, events = fed(chunk("a", usage=usage(1)), chunk("bc", usage=usage(3)), chunk("", "length", usage=usage(3)))
    assert ([0, 1, 1], "every") == (times, events.usage)


@pytest.mark.parametrize("first", [chunk("", usage=usage(0)), ROLE, chunk("", usage=None)])
def test_with_usage_in_every_event_a_first_one_without_text_is_a_token_only_if_it_says_so(first):
    assert [1, 2] == fed(first, chunk("a", usage=usage(1)), chunk("b", usage=usage(2)), chunk("", "length", usage=usage(2)))[0]
    assert [0, 1] == fed(chunk("", usage=usage(1)), chunk("a", usage=usage(2)))[0]


def test_text_that_comes_piece_by_piece_is_no_more_tokens_than_usage_in_every_event_says():
    assert [0, 2] == fed(chunk("a", usage=usage(1)), chunk("b", usage=usage(1)), chunk("c", usage=usage(2)))[0]


@pytest.mark.parametrize(
    ("events", "tokens", "expected"),
    [
        ([chunk("a"), chunk("b")], 2, [0, 1]),
        ([ROLE, chunk("a"), chunk("b")], 2, [1, 2]),
        ([ROLE, chunk("a"), chunk(""), chunk("b")], 2, [1, 3]),
        ([ROLE, chunk("a"), chunk(""), chunk("b")], 3, [1, 2, 3]),
        ([chunk("ab"), chunk("cd")], 4, [0, 0, 1, 1]),
        ([chunk("abc"), chunk("d")], 4, [0, 0, 0, 1]),
        ([ROLE, chunk("a" * 10), chunk("b" * 10), chunk("c" * 10, "length")], 30, [1] * 10 + [2] * 10 + [3] * 10),
        ([chunk("a"), chunk("b"), chunk("c"), chunk("d")], 2, [0, 2]),
        ([chunk("a", usage=usage(0)), chunk("b"), chunk("c")], 3, [0, 1, 2]),
        ([chunk("ab", token_ids=[1, 2]), chunk("c", token_ids=[3])], 3, [0, 0, 1]),
        ([delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="a")], 2, [1, 2]),
    ],
)
def test_usage_at_the_end_is_shared_by_the_events_that_brought_it(events, tokens, expected):
    times, reader = fed(*events, last(tokens), DONE)
    assert (expected, "end", 7) == (times, reader.usage, reader.prompt_tokens)


@pytest.mark.parametrize(("number", "expected"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 1, 2])])
def test_tokens_without_any_text_are_the_last_events(number, expected):
    assert expected == fed(ROLE, chunk(""), chunk(""), last(number))[0]


def test_usage_with_the_reason_of_the_end_counts_as_one_of_its_own():
    times, events = fed(ROLE, chunk("a"), chunk("b"), chunk("", "length", usage=usage(2)))
    assert ([1, 2], "end", True) == (times, events.usage, events.finished)


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
def test_text_may_be_in_a_delta_and_be_of_reasoning(name):
    assert [1, 2] == fed(delta(role="assistant", content=None), delta(**{name: "a"}), delta(**{name: "b"}))[0]


def test_what_keeps_a_connection_alive_is_no_event():
    pings = (": ping\n\n", "event: ping\n\n", "data:\n\n", "retry: 100\n\n", "\r\n")
    assert [5, 11] == fed(*pings, chunk("a"), *pings, chunk("b"))[0]


def test_bytes_may_be_cut_anywhere():
    text = (chunk("ä") + ": a comment\r\n\r\n" + chunk("b").replace("\n", "\r\n") + DONE).encode()
    events = Events(9)
    for i in range(len(text)):
        events.feed(text[i : i + 1], 0)
    assert ([0, 0], True) == (events.times(), events.finished)


@pytest.mark.parametrize(
    ("text", "finished"),
    [(DONE, True), ("data: [DONE]", True), (chunk("", "length"), True), (chunk("a", "stop").strip(), True), (last(1), True),
     (chunk("a"), False), (last(0), False)],
)  # fmt: skip
def test_a_stream_is_finished_by_a_reason_by_done_or_by_a_last_usage(text, finished):
    assert finished == fed(text)[1].finished


def test_an_error_in_the_stream_is_kept():
    assert "on fire" == fed('data: {"error": {"message": "on fire"}}\n\n')[1].error


@pytest.mark.parametrize("text", ["data: {\n", "data: []\n", 'data: {"object": "x"}\n', 'data: {"choices": [{}]}\n'])
def test_an_event_that_is_no_completions_is_shown(text):
    with pytest.raises(ValueError, match="not a completion's"):
        fed(text)
