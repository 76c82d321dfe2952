"""Harmony, the form of gpt-oss's answers: messages, each with a header that names its channel, and a recipient if it is a call:

    <|channel|>analysis<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>

The prompt ends with `<|start|>assistant`, so the first header begins in the middle. It does not know what the text of the other
channels means: another parser gets it.
"""

import re
from collections.abc import Collection

from stallfree.parsers.pieces import CallArguments, CallStart, Parser
from stallfree.parsers.reading import Marks, Steps, Wrapping

START, CHANNEL, MESSAGE, END, CALL = "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"
MARKS = (START, CHANNEL, MESSAGE, END, CALL, "<|return|>", "<|constrain|>")
"""The texts of the special tokens of which headers are made, and with which messages end."""
BEGINNINGS = (CHANNEL, " to=", START)
"""What an answer in channels begins with. Any other answer is the text of one message, such as one that a grammar held."""
TO_MESSAGE, TO_END = Marks(MESSAGE), Marks(END, CALL, "<|return|>", START)
ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")
FUNCTION = re.compile(r"\bto=functions\.([^\s<]+)")


def suits(template: str) -> bool:
    """Whether a chat template, by its source text, has the model answer in channels."""
    return CHANNEL in template


class ChannelsParser(Wrapping):
    """Messages in the channel analysis are `Reasoning`, those to one of the functions `names` are calls, and `inner` gets the text
    of all others."""

    def __init__(self, inner: Parser, names: Collection[str]):
        self._names = frozenset(names)
        self._num_calls = 0
        super().__init__(inner)

    def _read(self) -> Steps[None]:
        source = self._source
        for beginning in BEGINNINGS:
            if (yield from source.starts(beginning)):
                break
        else:
            yield from source.rest(self._rest)
            return
        while (yield from source.peek()):
            header: list[str] = []
            if not (yield from TO_MESSAGE.find(source, header.append)):
                return  # cut short within a header
            text = "".join(header)
            function = FUNCTION.search(text)
            if function is not None and function[1] in self._names:
                self._pieces.append(CallStart(self._num_calls, function[1]))
                yield from TO_END.find(source, self._arguments)
                self._num_calls += 1
            else:
                yield from TO_END.find(source, self._reasoning if ANALYSIS.search(text) else self._rest)

    def _arguments(self, text: str) -> None:
        self._pieces.append(CallArguments(self._num_calls, text))
