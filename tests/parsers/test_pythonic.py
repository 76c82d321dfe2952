"""Answers with calls in Python, and their pieces."""

import ast
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from stallfree.parsers.pieces import CallArguments, Content
from stallfree.parsers.pythonic import Pythonic
from tests.parsers.answers import called, check, read

FORMAT = Pythonic()
ROWS = [
    ("Hello [f].", [Content("Hello [f].")]),
    ("[f]", [Content("[f]")]),
    ("[f()]", called(0, "f", "{}")),
    ('[f(a=1, b="x"), g()]', [*called(0, "f", '{"a": 1, "b": "x"}'), *called(1, "g", "{}")]),
    ("<|python_start|>[f(a=1)]<|python_end|>", called(0, "f", '{"a": 1}')),
    (
        " <|python_start|> [ f( a = 1 , ) , g( ) ] <|python_end|>.",
        [*called(0, "f", '{"a": 1}'), *called(1, "g", "{}"), Content(".")],
    ),
    (
        "[f(a=True, b=False, c=None, d=[1, -2.5e3, ['x']], e={'k': {}, \"l\": [],})]",
        called(0, "f", '{"a": true, "b": false, "c": null, "d": [1, -2.5e3, ["x"]], "e": {"k": {}, "l": []}}'),
    ),
    ("[f(a=.5, b=1_000, c=+5., d=007, e=0)]", called(0, "f", '{"a": 0.5, "b": 1000, "c": 5.0, "d": 7, "e": 0}')),
    (
        r"""[f(a='it\'s "é" 🤗', b="\x41\u00e9\U0001F917\n\\\d\101\0", c='\ud83e')]""",
        called(0, "f", r'{"a": "it' + r"'s \"é\" 🤗" + r'", "b": "Aé🤗\n\\\\dA\u0000", "c": "\ud83e"}'),
    ),
    ("[f(a='''x''y\n''', b='', c=\"\"\"\"\"\")]", called(0, "f", '{"a": "x\'\'y\\n", "b": "", "c": ""}')),
    ("[f(a=true, b=null)]", called(0, "f", '{"a": true, "b": null}')),
    ("[f(a='([{', b=\")]}\")]", called(0, "f", '{"a": "([{", "b": ")]}"}')),
    ("[unknown(a=1)]", [Content("[unknown(a=1)]")]),
    ("[f(a=1), h(b=2)] x", [*called(0, "f", '{"a": 1}'), Content(", h(b=2)] x")]),
    ("[f(1)]", [Content("[f(1)]")]),
    ("[f(a=g())] x", called(0, "f", '{"a": g())] x')),
    ("<|python_start|>[f(a=1, b=oops)]<|python_end|> x", [*called(0, "f", '{"a": 1, "b": oops)]'), Content(" x")]),
    ("[f(a=1, 2)]", called(0, "f", '{"a": 1, 2)]')),
    ("[f(a=1 b=2)]", called(0, "f", '{"a": 1 b=2)]')),
    ("[f(a={1: 2})]", called(0, "f", '{"a": {1: 2})]')),
    ("[f(a=1)", called(0, "f", '{"a": 1}')),
    ("[f(a='x", called(0, "f", '{"a": "x')),
    ("[f(a", [Content("[f(a")]),
    ("[f(a=1)\r\n,\r\ng(\r\nb=[\r\n])]\r\n", [*called(0, "f", '{"a": 1}'), *called(1, "g", '{"b": []}')]),
    ("Call [f(a=1)]", [Content("Call [f(a=1)]")]),
    ("<|python_start|>x<|python_end|>", [Content("<|python_start|>x<|python_end|>")]),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, expected):
    check(FORMAT, text, expected)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(VALUES)
def test_a_literal_means_in_json_what_it_means_in_python(value):
    text = repr(value)
    pieces = read(FORMAT.parser(["f"]), [f"[f(a={text})]"])
    assert isinstance(pieces[1], CallArguments)
    assert {"a": ast.literal_eval(text)} == json.loads(pieces[1].text)
