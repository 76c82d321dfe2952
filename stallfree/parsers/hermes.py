"""The format of Hermes, Qwen 2.5, Qwen 3 and SmolLM3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each
call, with text before and between.
"""

from collections.abc import Collection, Mapping, Sequence

from stallfree.parsers import grammars
from stallfree.parsers.calls import End, Held, call
from stallfree.parsers.pieces import Parser, Tool
from stallfree.parsers.reading import SPACE, Marks, Out, Source, Steps, Streamed

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS, END = Marks(OPEN, CLOSE), Marks(CLOSE)
OTHERS = ("<function=", "<arg_key>")
"""Marks inside `<tool_call>` that are not JSON: the formats of Qwen3-Coder and of GLM 4.5."""


class Hermes:
    name = "hermes"
    marks = (OPEN, CLOSE)

    def suits(self, template: str) -> bool:
        return OPEN in template and not any(other in template for other in OTHERS)

    def parser(self, names: Collection[str]) -> Parser:
        known = frozenset(names)
        return Streamed(lambda source, out: _read(source, out, known))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: Mapping[str, int]) -> str:
        opening, closing = grammars.mark(OPEN, special), grammars.mark(CLOSE, special)
        calls = [rf'{opening} "\n" {grammars.member(tool, "arguments")} "\n" {closing}' for tool in tools]
        return grammars.grammar(r'call ("\n" call)*' if parallel else "call", calls)


def _read(source: Source, out: Out, names: frozenset[str]) -> Steps[None]:
    unclosed = False
    while mark := (yield from MARKS.find(source, out.content)):
        if mark == CLOSE:
            if unclosed:
                out.closed()
            else:
                out.content(mark)
            unclosed = False
            continue
        held = Held(out, names, mark)
        held.keep((yield from source.whole(SPACE)))
        if (yield from source.peek()) != "{":
            held.release()
            continue
        end = yield from call(source, held)
        unclosed = end is End.CALL
        if end is End.BROKEN:
            yield from END.find(source, out.arguments)
