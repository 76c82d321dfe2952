"""Answers in the JSON format of Llama 3, and their pieces."""

import pytest

from stallfree.parsers.llama_json import LlamaJson
from stallfree.parsers.pieces import Content
from tests.parsers.answers import called, check

FORMAT = LlamaJson()
ONE = '{"name": "f", "parameters": {"a": 1}}'
ROWS = [
    ("Hello {name}.", [Content("Hello {name}.")]),
    (ONE, called(0, "f", '{"a": 1}')),
    (f"<|python_tag|>{ONE}", called(0, "f", '{"a": 1}')),
    (f"\n<|python_tag|> {ONE} \n", called(0, "f", '{"a": 1}')),
    (f'{ONE}; {{"name": "g", "parameters": {{}}}}', [*called(0, "f", '{"a": 1}'), *called(1, "g", "{}")]),
    (f'{ONE};{{"name": "h"}}; {ONE}', [*called(0, "f", '{"a": 1}'), Content(f';{{"name": "h"}}; {ONE}')]),
    (f"{ONE}; and", [*called(0, "f", '{"a": 1}'), Content("; and")]),
    (f"{ONE} and {ONE}", [*called(0, "f", '{"a": 1}'), Content(f" and {ONE}")]),
    (f"I call {ONE}", [Content(f"I call {ONE}")]),
    ('{"name": "f", "arguments": {"a": "é 🤗 {\\"}\\\\"}}', called(0, "f", '{"a": "é 🤗 {\\"}\\\\"}')),
    ('{"name": "unknown", "parameters": {}}', [Content('{"name": "unknown", "parameters": {}}')]),
    ('<|python_tag|>import math; print("{}")', [Content('<|python_tag|>import math; print("{}")')]),
    ('{"type": "function", "name": "f", "parameters": {}}', called(0, "f", "{}")),
    ('{"name": "f"}', called(0, "f", "{}")),
    ('{"parameters": "{\\"a\\": 1}", "name": "f"}', called(0, "f", '{"a": 1}')),
    ('{"name": "f", "parameters": {"a": ]}; rest', called(0, "f", '{"a": ]}; rest')),
    ('{"city": "Bonn"}', [Content('{"city": "Bonn"}')]),
    ('{\r\n"name": "f",\r\n"parameters": {}\r\n}\r\n', called(0, "f", "{}")),
    (f"a <|python_tag|>{ONE}", [Content(f"a <|python_tag|>{ONE}")]),
    ("<|python_tag|>", [Content("<|python_tag|>")]),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, expected):
    check(FORMAT, text, expected)
