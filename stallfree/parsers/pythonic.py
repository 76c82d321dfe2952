"""The format of Llama 3.2 and 4 when the template asks for it: the whole answer is a list of calls in Python,
`[f(a=1, b="x"), g()]`, between `<|python_start|>` and `<|python_end|>` or without them. Arguments become JSON.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence

from stallfree.parsers import grammars
from stallfree.parsers.calls import End, Held
from stallfree.parsers.pieces import Parser, Tool
from stallfree.parsers.python_text import literal
from stallfree.parsers.reading import SPACE, Marks, Out, Source, Steps, Streamed, end_mark

START, CLOSE = "<|python_start|>", "<|python_end|>"
END = Marks(CLOSE)
SHOWN = "func_name1(params_name1=params_value1"
"""What Meta's prompt tells the model to write."""
NAME = re.compile(r"[\w.-]+")


class Pythonic:
    name = "pythonic"
    marks = (START, CLOSE)

    def suits(self, template: str) -> bool:
        return SHOWN in template

    def parser(self, names: Collection[str]) -> Parser:
        known = frozenset(names)
        return Streamed(lambda source, out: _read(source, out, known))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: Mapping[str, int]) -> str:
        """Values are written as JSON, which the parser reads too. Required arguments come first; properties that the schema does
        not name are not allowed.
        """
        start = '"[" call (", " call)* "]"' if parallel else '"[" call "]"'
        calls, rules = [], []
        for i, tool in enumerate(tools):
            arguments, values = _arguments(tool, f"value_{i}")
            calls.append(f'{grammars.quoted(tool.name + "(")} {arguments} ")"')
            rules += values
        return grammars.grammar(start, calls, rules)


MOST_ARGUMENTS = 64
"""Arguments of one tool: the grammar's size grows with their square, because any of the optional ones may be the first."""


def _arguments(tool: Tool, rule: str) -> tuple[str, list[str]]:
    """The arguments of a call in the grammar, and the rules of their values, whose names begin with `rule`."""
    properties, required = tool.parameters.get("properties"), tool.parameters.get("required")
    schemas = properties if isinstance(properties, Mapping) else {}
    if len(schemas) > MOST_ARGUMENTS:
        raise ValueError(
            f"{tool.name} has {len(schemas)} arguments; in this format at most {MOST_ARGUMENTS} can be held to a schema"
        )
    definitions = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    needed: list[str] = []
    optional: list[str] = []
    rules: list[str] = []
    for i, (key, schema) in enumerate(schemas.items()):
        argument = f"{grammars.quoted(key + '=')} {rule}_{i}"
        (needed if isinstance(required, Sequence) and key in required else optional).append(argument)
        rules.append(f"{rule}_{i}: {grammars.value({**(schema if isinstance(schema, Mapping) else {}), **definitions})}")
    if needed:
        return ' ", " '.join(needed) + "".join(f' (", " {argument})?' for argument in optional), rules
    firsts = [argument + "".join(f' (", " {later})?' for later in optional[i + 1 :]) for i, argument in enumerate(optional)]
    return f"({' | '.join(firsts)})?" if firsts else "", rules


def _read(source: Source, out: Out, names: frozenset[str]) -> Steps[None]:
    held = Held(out, names, (yield from source.whole(SPACE)))
    if (yield from source.starts(START)):
        held.keep(source.take(len(START)))
        held.keep((yield from source.whole(SPACE)))
    if (yield from source.peek()) == "[":
        held.keep(source.take())
        end = yield from _list(source, held, out)
    else:
        end = held.release()
    if end is End.BROKEN:
        yield from END.find(source, out.arguments)
    elif end is End.CALL:
        yield from end_mark(source, out, CLOSE)
    yield from source.rest(out.content)


def _list(source: Source, held: Held, out: Out) -> Steps[End]:
    """Read calls up to the closing bracket."""
    while True:
        held.keep((yield from source.whole(SPACE)))
        end = yield from _call(source, held)
        if end is not End.CALL:
            return end
        held = Held(out, held.names)
        held.keep((yield from source.whole(SPACE)))
        char = yield from source.peek()
        if char == "]":
            source.take()
            return end
        if char != ",":
            return held.release()
        held.keep(source.take())


def _call(source: Source, held: Held) -> Steps[End]:
    """Read a call from its name on. It begins with its first argument, or with its closing parenthesis if it has none."""
    name = yield from source.whole(NAME)
    held.keep(name)
    if (yield from source.peek()) != "(" or not held.known(name):
        return held.release()
    held.keep(source.take())
    written = yield from source.whole(SPACE)
    before = "{"
    while (yield from source.peek()) != ")":
        key = yield from source.whole(NAME)
        written += key + (yield from source.whole(SPACE))
        if not key or (yield from source.peek()) != "=":
            return held.fail(written)
        source.take()
        held.argue(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        if not (yield from literal(source, held.argue)):
            return End.BROKEN
        written = yield from source.whole(SPACE)
        if (yield from source.peek()) == ",":
            written += source.take() + (yield from source.whole(SPACE))
        elif (yield from source.peek()) != ")":
            return held.fail(written)
        before = ", "
    source.take()
    held.argue("}" if held.began else "{}")
    return End.CALL
