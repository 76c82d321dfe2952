"""The parts that the grammars of all tool formats share, in llguidance's dialect of Lark (its docs/syntax.md, version 1.9). A
grammar allows calls of the given tools and nothing else. It does not know how a grammar becomes a mask.
"""

import json
from collections.abc import Mapping, Sequence

from stallfree.parsers.pieces import Tool

WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python's `json.dumps` writes it, and so as chat templates show it to a model. A model that may write any white space can
write it without end.
"""


def quoted(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def mark(text: str, special: Mapping[str, int]) -> str:
    """A mark: the id of its token if it is a special one, else its text. Lark can name `<tool_call>`, but not `[ARGS]`."""
    return f"<[{special[text]}]>" if text in special else quoted(text)


def value(schema: Mapping[str, object]) -> str:
    """A JSON value that has this schema."""
    return "%json " + json.dumps({**schema, "x-guidance": WHITE_SPACE}, ensure_ascii=False)


def arguments(tool: Tool) -> str:
    """A JSON object with the arguments of a tool."""
    return value({"type": "object", **tool.parameters}) if tool.parameters else quoted("{}")


def member(tool: Tool, key: str) -> str:
    """A call as a JSON object, with the arguments as its member `key`."""
    head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    return f"{quoted(head)} {arguments(tool)} {quoted('}')}"


def grammar(start: str, calls: Sequence[str], rules: Sequence[str] = ()) -> str:
    """A grammar whose `start` refers to `call`, which is one of `calls`, a call of each tool. `rules`: other rules that they refer
    to. Raises ValueError without any tool.
    """
    if not calls:
        raise ValueError("a grammar of tool calls needs a tool, and there is none; give one, or generate without a grammar")
    numbered = [f"call_{i}: {call}" for i, call in enumerate(calls)]
    return "\n".join([f"start: {start}", "call: " + " | ".join(f"call_{i}" for i in range(len(calls))), *numbered, *rules, ""])
