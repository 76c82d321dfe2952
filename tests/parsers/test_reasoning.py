"""Answers of models that reason first, and their pieces."""

import pytest

from stallfree.parsers.hermes import Hermes
from stallfree.parsers.pieces import Content, Reasoning, Verbatim
from stallfree.parsers.reasoning import ReasoningParser, marks
from tests.parsers.answers import called, read

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
ROWS = [
    ("<think>\nWell.\n</think>\n\nYes.", False, [Reasoning("Well."), Content("Yes.")]),
    ("\n<think>Well.</think>Yes.\n", False, [Reasoning("Well."), Content("Yes.\n")]),
    ("Well.\n</think>\n\nYes.", True, [Reasoning("Well."), Content("Yes.")]),
    ("\nWell.\n</think>\nYes.", True, [Reasoning("Well."), Content("Yes.")]),
    ("<think>\n\n</think>\n\nYes.", False, [Content("Yes.")]),
    ("<think></think>", False, []),
    ("<think>\r\nWell.\r\n\r\n</think>\r\n\r\n Yes.", False, [Reasoning("Well.\r\n"), Content(" Yes.")]),
    ("Yes.", False, [Content("Yes.")]),
    (" Yes. <think>Well.</think>", False, [Content(" Yes. <think>Well.</think>")]),
    ("<think>a < b\n</thin\n", False, [Reasoning("a < b\n</thin\n")]),
    ("<think>a</think>b<think>c</think>", False, [Reasoning("a"), Content("b<think>c</think>")]),
    ("<thin", False, [Content("<thin")]),
    (" \n", False, [Content(" \n")]),
    ("never closed 🤗", True, [Reasoning("never closed 🤗")]),
    (f"<think>\nI call {CALL}\n</think>\n\n{CALL}", False, [Reasoning(f"I call {CALL}"), *called(0, "f", "{}")]),
    (f"{CALL}\n", False, called(0, "f", "{}")),
    ("</think>\n\n", True, []),
]


@pytest.mark.parametrize(("text", "inside", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, inside, expected):
    def parser() -> ReasoningParser:
        return ReasoningParser(Hermes().parser(["f"]), "<think>", "</think>", inside)

    assert expected == read(parser(), [text])
    for end in range(len(text) + 1):
        assert read(parser(), [text[:end]]) == read(parser(), text[:end])


def test_reasoning_goes_out_as_it_comes():
    parser = ReasoningParser(Verbatim(), "<think>", "</think>", True)
    assert [Reasoning("One")] == parser.push("One\n")
    assert [Reasoning("\ntwo ")] == parser.push("two <")
    assert [Content("Yes")] == parser.push("/think>\n\nYes")
    assert [] == parser.end()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{%- if '</think>' in content %}{{ '<think>\\n' }}{% endif %}", ("<think>", "</think>")),
        ("{{ message['content'].split('</think>')[-1] }}<｜Assistant｜>", ("<think>", "</think>")),
        ("{{ '[THINK]' + block['thinking'] + '[/THINK]' }}", ("[THINK]", "[/THINK]")),
        ("{{ message['content'] }}<|im_end|>", None),
    ],
)
def test_a_templates_marks_are_found(template, expected):
    assert expected == marks(template)


def test_the_marks_of_magistral_work_alike():
    parser = ReasoningParser(Verbatim(), "[THINK]", "[/THINK]", False)
    assert [Reasoning("a [/THIN"), Content("b")] == read(parser, "[THINK]a [/THIN[/THINK]\n\nb")
