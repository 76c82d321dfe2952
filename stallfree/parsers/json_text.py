"""JSON read character by character: where a string, an array or an object ends, and what a string says. It is never read twice,
and nesting costs no recursion. It checks quotes and brackets, and no more: commas and numbers are the client's to check.
"""

import json
import re

from stallfree.parsers.reading import Sink, Source, Steps

INSIDE = re.compile(r'[^"\\]+')
"""Characters of a string that mean themselves. Line breaks are among them: RFC 8259 forbids them, but models write them."""
OUTSIDE = re.compile(r'[^"{}\[\]]+')
SCALAR = re.compile(r'[^ \t\r\n,:"{}\[\]]+')
"""Characters of a number or a word."""
ESCAPE = re.compile(r"\\(?:u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}|u[\da-fA-F]{4}|.)?", re.DOTALL)
HIGH = re.compile(r"\\u[dD][89abAB]")
"""The first half of a surrogate pair, which needs a second (RFC 8259, 7)."""
CLOSING = {"{": "}", "[": "]"}


def string(source: Source, raw: Sink, text: Sink) -> Steps[bool]:
    """Read a string from its opening quote on. `raw` gets it as written, with its quotes; `text` gets what it says. An escape that
    JSON does not know, or half of a surrogate pair, says what is written. Returns False if the answer ends inside it.
    """
    raw(source.take())
    while char := (yield from source.peek()):
        if char == '"':
            raw(source.take())
            return True
        if char == "\\":
            written = yield from _escape(source)
            raw(written)
            text(_meaning(written))
        else:
            part = source.run(INSIDE)
            raw(part)
            text(part)
    return False


def _escape(source: Source) -> Steps[str]:
    ahead = yield from source.ahead(2)
    if ahead == "\\u":
        ahead = yield from source.ahead(6)
        if HIGH.match(ahead):
            yield from source.ahead(12)
    return source.run(ESCAPE)


def _meaning(written: str) -> str:
    try:
        text: str = json.loads(f'"{written}"')
    except ValueError:
        return written
    return written if "\ud800" <= text <= "\udfff" else text


def nested(source: Source, raw: Sink) -> Steps[bool]:
    """Read an array or an object from its opening bracket on; `raw` gets it as written. Returns False after a bracket that closes
    no open one, or at the end of the answer.
    """
    awaited: list[str] = []
    while char := (yield from source.peek()):
        if char == '"':
            yield from string(source, raw, _nowhere)
            continue
        raw(source.run(OUTSIDE) or source.take())
        if char in CLOSING:
            awaited.append(CLOSING[char])
        elif char in "}]":
            if awaited.pop() != char:
                return False
            if not awaited:
                return True
    return False


def value(source: Source, raw: Sink) -> Steps[bool]:
    """Read any value; `raw` gets it as written. Returns False if there is none, or if it does not end."""
    char = yield from source.peek()
    if char == '"':
        return (yield from string(source, raw, _nowhere))
    if char in CLOSING:
        return (yield from nested(source, raw))
    word = yield from source.whole(SCALAR)
    raw(word)
    return bool(word)


def _nowhere(text: str) -> None:
    """Where a text goes that nobody needs."""
