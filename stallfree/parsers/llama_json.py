"""The format of Llama 3.1, 3.2 and 3.3: the whole answer is `{"name": ..., "parameters": {...}}`, or several of them with `;`
between, after `<|python_tag|>` or without it.
"""

from collections.abc import Collection, Mapping, Sequence

from stallfree.parsers import grammars
from stallfree.parsers.calls import End, Held, calls
from stallfree.parsers.pieces import Parser, Tool
from stallfree.parsers.reading import SPACE, Out, Source, Steps, Streamed

TAG = "<|python_tag|>"
SHOWN = '"parameters": dictionary of argument name and its value'
"""What Meta's templates tell the model to write."""


class LlamaJson:
    name = "llama_json"
    marks = (TAG,)

    def suits(self, template: str) -> bool:
        return TAG in template or SHOWN in template.replace('\\"', '"')

    def parser(self, names: Collection[str]) -> Parser:
        known = frozenset(names)
        return Streamed(lambda source, out: _read(source, out, known))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: Mapping[str, int]) -> str:
        start = 'call ("; " call)*' if parallel else "call"
        return grammars.grammar(start, [grammars.member(tool, "parameters") for tool in tools])


def _read(source: Source, out: Out, names: frozenset[str]) -> Steps[None]:
    held = Held(out, names, (yield from source.whole(SPACE)))
    if (yield from source.starts(TAG)):
        held.keep(source.take(len(TAG)))
        held.keep((yield from source.whole(SPACE)))
    end = yield from calls(source, held, out, between=";")
    yield from source.rest(out.arguments if end is End.BROKEN else out.content)
