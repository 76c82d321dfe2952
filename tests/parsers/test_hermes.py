"""Answers in the format of Hermes and Qwen, and their pieces."""

import pytest

from stallfree.parsers.hermes import Hermes
from stallfree.parsers.pieces import CallStart, Content
from tests.parsers.answers import called, check

FORMAT = Hermes()
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
ROWS = [
    ("Hello.", [Content("Hello.")]),
    (" \n", [Content(" \n")]),
    (ONE, called(0, "f", '{"a": 1}')),
    (
        f'{ONE}\n<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>\n',
        [*called(0, "f", '{"a": 1}'), *called(1, "g", "{}")],
    ),
    (f"I look.\n{ONE}\nDone.", [Content("I look.\n"), *called(0, "f", '{"a": 1}'), Content("\nDone.")]),
    (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich 🤗 \\u00e9 \\n \\""}}</tool_call>',
        called(0, "get_weather", '{"city": "Zürich 🤗 \\u00e9 \\n \\""}'),
    ),
    (
        '<tool_call>\n{"name": "f", "arguments": {"code": "if (a) { b[\\"}\\"] }"}}\n</tool_call>',
        called(0, "f", '{"code": "if (a) { b[\\"}\\"] }"}'),
    ),
    (ONE.replace('"f"', '"unknown"'), [Content(ONE.replace('"f"', '"unknown"'))]),
    ('<tool_call>\n{"name": f}\n</tool_call>', [Content('<tool_call>\n{"name": f}\n</tool_call>')]),
    ('<tool_call>{"name": 1, "arguments": {}}', [Content('<tool_call>{"name": 1, "arguments": {}}')]),
    (
        '<tool_call>\n{"name": "f", "arguments": {"a": [1}, "b": 2}}\n</tool_call> after',
        [*called(0, "f", '{"a": [1}, "b": 2}}\n'), Content(" after")],
    ),
    ('<tool_call>{"arguments": {"a": {"b": []}}, "name": "f"}</tool_call>', called(0, "f", '{"a": {"b": []}}')),
    (
        '<tool_call>{"arguments": {"a": {"b": []}}, "name": "h"}',
        [Content('<tool_call>{"arguments": {"a": {"b": []}}, "name": "h"}')],
    ),
    ('<tool_call>{"arguments": {"a": [}, "name": "f"}', [Content('<tool_call>{"arguments": {"a": [}, "name": "f"}')]),
    ('<tool_call>{"name": "f"}</tool_call>', called(0, "f", "{}")),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', called(0, "f", "{}")),
    ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', called(0, "f", "{}")),
    ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', called(0, "f", '{"a": 1}')),
    (
        '<tool_call>{"name": "f", "arguments":'
        ' " {\\"a\\": \\"\\u00e9 \\ud83e\\udd17 \\\\n\\", \\"b\\": \\"\\ud83e\\"}"}</tool_call>',
        called(0, "f", ' {"a": "é 🤗 \\n", "b": "\\ud83e"}'),
    ),
    ('<tool_call>{"name": "f", "arguments": "yes"}', [Content('<tool_call>{"name": "f", "arguments": "yes"}')]),
    ('<tool_call>{"name": "f", "arguments": [1]}', [Content('<tool_call>{"name": "f", "arguments": [1]}')]),
    ('<tool_call>\r\n{"name": "f",\r\n "arguments": {\r\n"a": 1}}\r\n</tool_call>\r\n', called(0, "f", '{\r\n"a": 1}')),
    ('<tool_call>{"id": [1, {"x": "}"}], "name": "\\u0066", "arguments": {}, "n": 1}</tool_call>', called(0, "f", "{}")),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>\n', called(0, "f", '{"a": 1}')),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', [*called(0, "f", '{"a": 1}'), Content("}\n")]),
    ('<tool_call>{"name": "f", "arguments": {}, oops</tool_call>.', [*called(0, "f", "{}"), Content(", oops.")]),
    ("a </tool_call> b <tool_call> c <tool_", [Content("a </tool_call> b <tool_call> c <tool_")]),
    (f"<tool_call>{ONE}", [Content("<tool_call>"), *called(0, "f", '{"a": 1}')]),
    (ONE[: -len("</tool_call>")] + ONE, [*called(0, "f", '{"a": 1}'), *called(1, "f", '{"a": 1}')]),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>',
        called(0, "f", '{"a": "</tool_call><tool_call>"}'),
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": "two\nlines"}}</tool_call>', called(0, "f", '{"a": "two\nlines"}')),
    ('<tool_call>{"name": "f", "arguments": {"a": "x', called(0, "f", '{"a": "x')),
    ('<tool_call>{"name": "f", "argu', [Content('<tool_call>{"name": "f", "argu')]),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, expected):
    check(FORMAT, text, expected)


def test_arguments_go_out_as_they_come():
    parser = FORMAT.parser(["f"])
    assert [] == parser.push('<tool_call>\n{"name": "f", "arguments": ')
    assert [CallStart(0, "f"), *called(0, "f", '{"a": "x')[1:]] == parser.push('{"a": "x')
    assert called(0, "f", "y")[1:] == parser.push("y")


def test_content_waits_only_while_it_may_be_a_mark():
    parser = FORMAT.parser(["f"])
    assert [Content("a ")] == parser.push("a <tool")
    assert [Content("<tools")] == parser.push("s")
