"""Answers in the two formats of Mistral, and their pieces."""

import pytest

from stallfree.parsers.mistral import Mistral
from stallfree.parsers.pieces import Content
from tests.parsers.answers import called, check

FORMAT = Mistral()
ROWS = [
    ("Hello [1].", [Content("Hello [1].")]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', called(0, "f", '{"a": 1}')),
    (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "x"}, {"name": "g", "arguments": {}}]\n',
        [*called(0, "f", '{"a": 1}'), *called(1, "g", "{}")],
    ),
    (
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "h"}] .',
        [*called(0, "f", "{}"), Content(', {"name": "h"}] .')],
    ),
    ("[TOOL_CALLS][]", [Content("[TOOL_CALLS][]")]),
    ('[TOOL_CALLS]f[ARGS]{"a": 1}', called(0, "f", '{"a": 1}')),
    (
        'Look: [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{} done',
        [Content("Look: "), *called(0, "f", '{"a": 1}'), *called(1, "g", "{}"), Content(" done")],
    ),
    ('[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"a": "é 🤗 \\"]}"}', called(0, "f", '{"a": "é 🤗 \\"]}"}')),
    ('[TOOL_CALLS]f[ARGS]"{\\"a\\": 1}"', called(0, "f", '{"a": 1}')),
    ("[TOOL_CALLS]unknown[ARGS]{}", [Content("[TOOL_CALLS]unknown[ARGS]{}")]),
    ("[TOOL_CALLS]f{}", [Content("[TOOL_CALLS]f{}")]),
    ("[TOOL_CALLS]f[ARGS] none", [Content("[TOOL_CALLS]f[ARGS] none")]),
    ("[TOOL_CALLS]f[ARGS][TOOL_CALLS]g[ARGS]{}", [Content("[TOOL_CALLS]f[ARGS]"), *called(0, "g", "{}")]),
    ("[TOOL_CALLS][TOOL_CALLS]g[ARGS]{}", [Content("[TOOL_CALLS]"), *called(0, "g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]{"a": ]}[TOOL_CALLS]g[ARGS]{}', [*called(0, "f", '{"a": ]}'), *called(1, "g", "{}")]),
    ('[TOOL_CALLS]f[ARGS]\r\n{\r\n"a": 1}\r\n', called(0, "f", '{\r\n"a": 1}')),
    ('[TOOL_CALLS][\r\n{"arguments": {"a": [[]]},\r\n"name": "f"}\r\n]', called(0, "f", '{"a": [[]]}')),
    ("[ARGS] and [CALL_ID] and [TOOL", [Content("[ARGS] and [CALL_ID] and [TOOL")]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"a": "[TOOL_CALLS]"}}', called(0, "f", '{"a": "[TOOL_CALLS]"}')),
    ('[TOOL_CALLS][{"name": f}]', [Content('[TOOL_CALLS][{"name": f}]')]),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, expected):
    check(FORMAT, text, expected)
