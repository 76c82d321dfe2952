"""The law of all parsers: how an answer was cut does not change its pieces, and no text is lost or raises an error."""

import itertools
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stallfree.parsers.formats import FORMATS
from stallfree.parsers.pieces import CallArguments, CallStart, Content, Parser, Reasoning, Verbatim, join
from stallfree.parsers.reasoning import ReasoningParser
from tests.parsers import test_hermes, test_llama_json, test_mistral, test_plain, test_pythonic
from tests.parsers.answers import NAMES, called, content, read

TABLES = {
    table.FORMAT.name: [text for text, _ in table.ROWS]
    for table in (test_hermes, test_llama_json, test_mistral, test_plain, test_pythonic)
}
MARKS = [mark for format in FORMATS.values() for mark in format.marks]
FRAGMENTS = [
    *MARKS, "<think>", "</think>", "<", "[", "]", "{", "}", "(", ")", '"', "'", "\\", "\\u", "d83e", "dd17", ",", ";", ":", "=",
    " ", "\n", "\r\n", "1", "-", ".", "a", "f", "g", "f(", "a=", '"name": "f"', '"name": "unknown"', '"arguments": ',
    '{"name": "f", "arguments": {', "null", "None", "```json", "```", "é", "🤗",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30).map("".join)
CUTS = st.lists(st.integers(0, 200), max_size=8)


def parser(name: str, names=NAMES) -> Parser:
    """The parser of a format, inside one for reasoning."""
    return ReasoningParser(FORMATS[name].parser(names), "<think>", "</think>", False)


def parts(text: str, cuts: list[int]) -> list[str]:
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def test_every_format_has_a_table():
    assert TABLES.keys() == FORMATS.keys()
    assert all(len(table) >= 12 for table in TABLES.values())


@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_random_cuts_change_nothing(name):
    chance = random.Random(0)
    expected = {text: read(parser(name), [text]) for text in TABLES[name]}
    for _ in range(10_000):
        text = chance.choice(TABLES[name])
        cuts = [chance.randint(0, len(text)) for _ in range(chance.randint(1, 8))]
        assert expected[text] == read(parser(name), parts(text, cuts)), (text, cuts)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_no_cut_changes_the_pieces_of_any_text(name, text, cuts):
    assert read(parser(name), [text]) == read(parser(name), parts(text, cuts)) == read(parser(name), text)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)
@given(text=TEXTS)
def test_without_a_call_the_content_is_the_text(name, text):
    assert text == content(read(FORMATS[name].parser(()), text))
    pieces = read(FORMATS[name].parser(NAMES), text)
    if not any(isinstance(piece, CallStart) for piece in pieces):
        assert text == content(pieces)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)
@given(text=TEXTS)
def test_content_is_text_of_the_answer_in_its_order(name, text):
    letters = iter(text)
    assert all(letter in letters for letter in content(read(FORMATS[name].parser(NAMES), text)))


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)
@given(text=TEXTS)
def test_calls_are_of_known_tools_and_counted(name, text):
    starts = [piece for piece in read(FORMATS[name].parser(NAMES), text) if isinstance(piece, CallStart)]
    assert list(range(len(starts))) == [start.index for start in starts]
    assert {start.name for start in starts} <= set(NAMES)


CALLS = {
    "hermes": '<tool_call>{{"name": "f", "arguments": {}}}</tool_call>',
    "llama_json": '{{"name": "f", "parameters": {}}}',
    "mistral": "[TOOL_CALLS]f[ARGS]{}",
    "pythonic": "[f(a={})]",
    "plain": '{{"name": "f", "arguments": {}}}',
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting_does_not_recurse(name, closed):
    depth = 10_000
    brackets = "[" * depth + "]" * (depth if closed else 0)
    if name == "pythonic":
        text, arguments = CALLS[name].format(brackets), f'{{"a": {brackets}' + ("}" if closed else ")]")
        expected = called(0, "f", arguments)
    else:
        value = f'{{"a": {brackets}' + ("}" if closed else "")
        text = CALLS[name].format(value) if closed else CALLS[name].split("{}")[0].replace("{{", "{") + value
        expected = called(0, "f", value)
    assert expected == read(parser(name), [text])
    assert expected == read(parser(name), text)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("unit", ["<tool_call>", "[TOOL_CALLS]", '{"name": ', '{"arguments": "', "[f(", "\\", '"', " ", "\n<", "x"])
def test_a_long_text_of_one_unit_is_read_to_its_end(name, unit):
    text = unit * (20_000 // len(unit))
    assert text == content(read(parser(name), text))


def test_neighbours_of_one_kind_are_joined():
    pieces = [
        Content("a"),
        Content("b"),
        Reasoning("c"),
        *called(0, "f", "{"),
        CallArguments(0, "}"),
        *called(1, "f", "{}"),
        Content("d"),
    ]
    assert [Content("ab"), Reasoning("c"), *called(0, "f", "{}"), *called(1, "f", "{}"), Content("d")] == join(pieces)
    assert [] == join([])


def test_an_answer_without_tools_is_content():
    assert [Content("a <tool_call>")] == read(Verbatim(), ["a ", "", "<tool_call>"])
