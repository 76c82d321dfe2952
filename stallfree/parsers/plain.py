"""The format for templates that name none: the answer is one JSON object with a name and arguments, or a list of them, also inside
a fence of Markdown.
"""

from collections.abc import Collection, Mapping, Sequence

from stallfree.parsers import grammars
from stallfree.parsers.calls import End, Held, calls
from stallfree.parsers.pieces import Parser, Tool
from stallfree.parsers.reading import SPACE, Marks, Out, Source, Steps, Streamed, end_mark

FENCE, CLOSE = "```json", "```"
END = Marks(CLOSE)


class Plain:
    name = "plain"
    marks: tuple[str, ...] = ()

    def suits(self, template: str) -> bool:
        return True

    def parser(self, names: Collection[str]) -> Parser:
        known = frozenset(names)
        return Streamed(lambda source, out: _read(source, out, known))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: Mapping[str, int]) -> str:
        start = 'call | "[" call (", " call)* "]"' if parallel else "call"
        return grammars.grammar(start, [grammars.member(tool, "arguments") for tool in tools])


def _read(source: Source, out: Out, names: frozenset[str]) -> Steps[None]:
    held = Held(out, names, (yield from source.whole(SPACE)))
    fenced = yield from source.starts(FENCE)
    if fenced:
        held.keep(source.take(len(FENCE)))
        held.keep((yield from source.whole(SPACE)))
    if (yield from source.peek()) == "[":
        held.keep(source.take())
        held.keep((yield from source.whole(SPACE)))
        end = yield from calls(source, held, out, between=",", close="]", bare=False)
    else:
        end = yield from calls(source, held, out, bare=False)
    if fenced and end is End.BROKEN:
        yield from END.find(source, out.arguments)
    elif end is End.BROKEN:
        yield from source.rest(out.arguments)
    elif fenced and out.num_calls:
        yield from end_mark(source, out, CLOSE)
    yield from source.rest(out.content)
