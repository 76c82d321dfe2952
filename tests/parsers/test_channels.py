"""Answers in channels, and their pieces."""

import pytest

from stallfree.parsers.channels import ChannelsParser, suits
from stallfree.parsers.pieces import Content, Reasoning, Verbatim
from tests.parsers.answers import called, read

HM, SAY = "<|channel|>analysis<|message|>Hm.<|end|>", "<|start|>assistant<|channel|>final<|message|>"
LOOK = ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>'
ROWS = [
    (f"{HM}{SAY}Yes.", [Reasoning("Hm."), Content("Yes.")]),
    (f"{HM}{SAY}Yes.<|return|>", [Reasoning("Hm."), Content("Yes.")]),
    ("<|channel|>final<|message|>Yes <|.", [Content("Yes <|.")]),
    (f"{HM}<|start|>assistant{LOOK}", [Reasoning("Hm."), *called(0, "f", '{"a": 1}')]),
    (f"{LOOK}<|start|>assistant{LOOK}", [*called(0, "f", '{"a": 1}'), *called(1, "f", '{"a": 1}')]),
    ('<|channel|>commentary to=functions.f json<|message|>{"a": 1}', called(0, "f", '{"a": 1}')),
    (
        "<|channel|>commentary<|message|>I look.<|end|>" + f"<|start|>assistant{LOOK}",
        [Content("I look."), *called(0, "f", '{"a": 1}')],
    ),
    (" to=functions.unknown<|channel|>commentary<|message|>{}<|call|>", [Content("{}")]),
    ("<|channel|>analysis<|message|>never closed 🤗", [Reasoning("never closed 🤗")]),
    (f"{HM}<|start|>assistant<|chan", [Reasoning("Hm.")]),
    (f"{HM}{SAY}", [Reasoning("Hm.")]),
    ('{"a": "<|channel|>"}', [Content('{"a": "<|channel|>"}')]),
    (" Yes.", [Content(" Yes.")]),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), ROWS)
def test_an_answer_has_these_pieces(text, expected):
    def parser() -> ChannelsParser:
        return ChannelsParser(Verbatim(), ["f"])

    assert expected == read(parser(), [text])
    for end in range(len(text) + 1):
        assert read(parser(), [text[:end]]) == read(parser(), text[:end])


def test_text_goes_out_as_it_comes():
    parser = ChannelsParser(Verbatim(), ["f"])
    assert [Reasoning("One")] == parser.push("<|channel|>analysis<|message|>One")
    assert [Reasoning(" two ")] == parser.push(" two <")
    assert [] == parser.push("|end|><|start|>assistant<|channel|>fin")
    assert [Content("Yes")] == parser.push("al<|message|>Yes")
    assert [] == parser.end()


@pytest.mark.parametrize(
    ("template", "expected"), [("{{ '<|start|>assistant<|channel|>final<|message|>' }}", True), ("<|im_start|>", False)]
)
def test_a_template_says_whether_its_model_answers_in_channels(template, expected):
    assert expected == suits(template)
