"""The formats of Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` up to 2024, then `[TOOL_CALLS]name[ARGS]{...}` for
each call, also with `[CALL_ID]` and an id before the arguments. Ids are left out.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from stallfree.parsers import grammars
from stallfree.parsers.calls import End, Held, arguments, calls
from stallfree.parsers.pieces import Parser, Tool
from stallfree.parsers.reading import SPACE, Marks, Out, Source, Steps, Streamed

CALLS, ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
MARKS = Marks(CALLS)
WORD = re.compile(r"[^\s\[\]{}]+")


class Mistral:
    name = "mistral"
    marks = (CALLS, ID, ARGS)

    def suits(self, template: str) -> bool:
        return CALLS in template

    def parser(self, names: Collection[str]) -> Parser:
        known = frozenset(names)
        return Streamed(lambda source, out: _read(source, out, known))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: Mapping[str, int]) -> str:
        """The newer format if the tokenizer has `[ARGS]` as a special token, else the older one."""
        opening = grammars.mark(CALLS, special)
        if ARGS in special:
            args = grammars.mark(ARGS, special)
            newer = [f"{opening} {grammars.quoted(tool.name)} {args} {grammars.arguments(tool)}" for tool in tools]
            return grammars.grammar("call+" if parallel else "call", newer)
        start = f'{opening} "[" call (", " call)* "]"' if parallel else f'{opening} "[" call "]"'
        return grammars.grammar(start, [grammars.member(tool, "arguments") for tool in tools])


def _read(source: Source, out: Out, names: frozenset[str]) -> Steps[None]:
    sink = out.content
    while mark := (yield from MARKS.find(source, sink)):
        held = Held(out, names, mark)
        held.keep((yield from source.whole(SPACE)))
        if (yield from source.starts(CALLS)):
            end = held.release()
        elif (yield from source.peek()) == "[":
            held.keep(source.take())
            held.keep((yield from source.whole(SPACE)))
            end = yield from calls(source, held, out, between=",", close="]")
        else:
            end = yield from _named(source, held)
        sink = out.arguments if end is End.BROKEN else out.content


def _named(source: Source, held: Held) -> Steps[End]:
    """Read a call in the newer format, from its name on."""
    name = yield from source.whole(WORD)
    held.keep(name)
    held.keep((yield from source.whole(SPACE)))
    if not held.known(name):
        return held.release()
    if (yield from source.starts(ID)):
        held.keep(source.take(len(ID)))
        for part in (SPACE, WORD, SPACE):
            held.keep((yield from source.whole(part)))
    if not (yield from source.starts(ARGS)):
        return held.release()
    held.keep(source.take(len(ARGS)))
    held.keep((yield from source.whole(SPACE)))
    if (yield from arguments(source, held)):
        return End.CALL
    return End.BROKEN if held.began else held.release()
