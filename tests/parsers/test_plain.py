"""Answers for templates that name no format, and their pieces."""

import pytest

from stallfree.parsers.pieces import Content
from stallfree.parsers.plain import Plain
from tests.parsers.answers import called, check

FORMAT = Plain()
ONE = '{"name": "f", "arguments": {"a": 1}}'
ROWS = [
    ("Hello.", [Content("Hello.")]),
    (ONE, called(0, "f", '{"a": 1}')),
    (f" {ONE}\n", called(0, "f", '{"a": 1}')),
    (f'[{ONE}, {{"name": "g", "parameters": {{}}}}]', [*called(0, "f", '{"a": 1}'), *called(1, "g", "{}")]),
    (f"```json\n{ONE}\n```\n", called(0, "f", '{"a": 1}')),
    (f"```json\n[\n{ONE}\n]\n```", called(0, "f", '{"a": 1}')),
    (f"```json\n{ONE}\n``` and", [*called(0, "f", '{"a": 1}'), Content(" and")]),
    (f"```\n{ONE}\n```", [Content(f"```\n{ONE}\n```")]),
    ('```json\n{"a": 1}\n```', [Content('```json\n{"a": 1}\n```')]),
    ('{"name": "f"}', [Content('{"name": "f"}')]),
    ('{"name": "unknown", "arguments": {}}', [Content('{"name": "unknown", "arguments": {}}')]),
    (f"Look: {ONE}", [Content(f"Look: {ONE}")]),
    (f"{ONE} {ONE}", [*called(0, "f", '{"a": 1}'), Content(f" {ONE}")]),
    ("[1, 2]", [Content("[1, 2]")]),
    ("[]", [Content("[]")]),
    (f"[{ONE}, 2]", [*called(0, "f", '{"a": 1}'), Content(", 2]")]),
    ('{"arguments": {"q": "é 🤗 }\\" \\\\"}, "name": "f"}', called(0, "f", '{"q": "é 🤗 }\\" \\\\"}')),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', called(0, "f", '{"a": 1}')),
    ('```json\n{"name": "f", "arguments": {"a": ]}}\n``` x', [*called(0, "f", '{"a": ]}}\n'), Content(" x")]),
    ('{"name": "f", "arguments": {"a": ]}} x', called(0, "f", '{"a": ]}} x')),
    ('{\r\n"name": "f",\r\n"arguments": {}\r\n}\r\n', called(0, "f", "{}")),
    ('{"name": "f", "arguments": {"a', called(0, "f", '{"a')),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, expected):
    check(FORMAT, text, expected)
