"""Grammars hold a tool call: its parser reads all that a grammar allows, and llguidance compiles it."""

import json
from collections.abc import Sequence
from functools import cache

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from stallfree.engine.assemble import bytes_as_text
from stallfree.parsers.formats import FORMATS
from stallfree.parsers.pieces import Tool
from tests.parsers.answers import called, read

TOOLS = [
    Tool(
        "f",
        "Looks things up.",
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "string", "enum": ["é", 'q"\\']},
                "c": {"$ref": "#/$defs/list"},
            },
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"list": {"type": "array", "items": {"type": "boolean"}}},
        },
    ),
    Tool("get.weather-2", "", {"properties": {"x": {"type": "number"}, "y": {"type": "null"}}, "additionalProperties": False}),
    Tool("now", "", {}),
]
NAMES = [tool.name for tool in TOOLS]
F, W = '{"a": 1, "b": "é", "c": [true, false]}', '{"y": null}'
ONE = {
    "hermes": f'<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>',
    "llama_json": f'{{"name": "f", "parameters": {F}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "f", "arguments": {F}}}]',
    "pythonic": '[f(a=1, b="é", c=[true, false])]',
    "plain": f'{{"name": "f", "arguments": {F}}}',
}
TWO = {
    "hermes": ONE["hermes"] + f'\n<tool_call>\n{{"name": "get.weather-2", "arguments": {W}}}\n</tool_call>',
    "llama_json": ONE["llama_json"] + f'; {{"name": "get.weather-2", "parameters": {W}}}',
    "mistral": ONE["mistral"][:-1] + f', {{"name": "get.weather-2", "arguments": {W}}}]',
    "pythonic": ONE["pythonic"][:-1] + ", get.weather-2(y=null)]",
    "plain": "[" + ONE["plain"] + f', {{"name": "get.weather-2", "arguments": {W}}}]',
}
WRONG = [
    ('"f"', '"h"'),
    ("f(", "h("),
    ('"a": 1', '"a": "1"'),
    ("a=1", "a='1'"),
    ('"a": 1, ', ""),
    ("a=1, ", ""),
    ("é", "e"),
    ("true", "1"),
]


def grammar(name: str, parallel: bool = False, special: dict[str, int] | None = None) -> str:
    return FORMATS[name].grammar(TOOLS, parallel=parallel, special=special or {})


@cache
def guide(*special: str) -> tuple[LLTokenizer, Tokenizer]:
    """A tokenizer with these special tokens, as llguidance sees it and as it is."""
    tokenizer = Tokenizer.from_str(bytes_as_text().tokenizer.to_str())
    tokenizer.add_special_tokens(list(special))
    return LLTokenizer(tokenizer.to_str()), tokenizer


def allows(grammar: str, text: str, special: Sequence[str] = ()) -> bool:
    """Whether the grammar allows exactly this text."""
    guided, tokenizer = guide(*special)
    matcher = LLMatcher(guided, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("name", FORMATS)
def test_the_parser_reads_what_the_grammar_is_for(name):
    parser = FORMATS[name].parser
    assert called(0, "f", F) == read(parser(NAMES), [ONE[name]])
    assert [*called(0, "f", F), *called(1, "get.weather-2", W)] == read(parser(NAMES), [TWO[name]])


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_compiles_and_allows_a_call(name):
    assert allows(grammar(name), ONE[name])
    assert not allows(grammar(name), TWO[name])
    assert not allows(grammar(name), ONE[name] + " ")
    assert not allows(grammar(name), "Hello.")


@pytest.mark.parametrize("name", FORMATS)
def test_a_parallel_grammar_allows_one_call_or_more(name):
    assert allows(grammar(name, parallel=True), ONE[name])
    assert allows(grammar(name, parallel=True), TWO[name])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_a_grammar_holds_names_and_schemas(name, right, wrong):
    text = ONE[name].replace(right, wrong)
    assert text == ONE[name] or not allows(grammar(name, parallel=True), text)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("f(a=1)", True), ("f(a=1, c=[])", True), ("f()", False), ("f(c=[], a=1)", False), ("now()", True), ("now(a=1)", False)]
    + [(f"get.weather-2({arguments})", True) for arguments in ("", "x=1.5", "y=null", "x=1, y=null")]
    + [("get.weather-2(y=null, x=1)", False)],
)
def test_a_pythonic_grammar_orders_arguments(text, allowed):
    assert allowed == allows(grammar("pythonic"), f"[{text}]")


@pytest.mark.parametrize("name", FORMATS)
def test_marks_that_are_special_tokens_are_named_by_their_ids(name):
    marks = FORMATS[name].marks
    text = grammar(name, special={mark: 1000 + i for i, mark in enumerate(marks)})
    named = [mark for i, mark in enumerate(marks) if f"<[{1000 + i}]>" in text]
    assert {"hermes": ["<tool_call>", "</tool_call>"], "mistral": ["[TOOL_CALLS]", "[ARGS]"]}.get(name, []) == named
    assert not any(json.dumps(mark) in text for mark in named)


@pytest.mark.parametrize("text", [f"[TOOL_CALLS]f[ARGS]{F}", f"[TOOL_CALLS]f[ARGS]{F}[TOOL_CALLS]now[ARGS]{{}}"])
def test_the_newer_grammar_of_mistral_is_for_tokenizers_with_its_mark(text):
    marks = ("[TOOL_CALLS]", "[ARGS]")
    _, tokenizer = guide(*marks)
    special = {mark: tokenizer.token_to_id(mark) for mark in marks}
    assert allows(grammar("mistral", parallel=True, special=special), text, marks)
    assert not allows(grammar("mistral", parallel=True, special=special), text.replace('"a": 1, ', ""), marks)
    assert not allows(grammar("mistral", parallel=True), text)


def test_marks_of_special_tokens_are_allowed_as_those_tokens():
    marks = FORMATS["hermes"].marks
    _, tokenizer = guide(*marks)
    special = {mark: tokenizer.token_to_id(mark) for mark in marks}
    assert allows(grammar("hermes", parallel=True, special=special), TWO["hermes"], marks)
    assert not allows(grammar("hermes", parallel=True), TWO["hermes"], marks)


@pytest.mark.parametrize("name", FORMATS)
def test_names_of_any_letters_are_quoted(name):
    tool = Tool('né"\\', "", {"type": "object", "properties": {'q "é': {"type": "string"}}, "required": ['q "é']})
    assert not allows(FORMATS[name].grammar([tool], parallel=True, special={}), ONE[name])


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_of_no_tools_is_refused(name):
    with pytest.raises(ValueError, match="needs a tool"):
        FORMATS[name].grammar([], parallel=False, special={})
