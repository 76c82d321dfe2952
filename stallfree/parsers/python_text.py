"""A Python literal as JSON, character by character: strings, numbers, True, False, None, lists and dicts. Nothing is evaluated, and
nesting costs no recursion. It does not know what the literal is for.
"""

import json
import re

from stallfree.parsers.json_text import CLOSING
from stallfree.parsers.reading import SPACE, Sink, Source, Steps

WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
"""Words and their JSON. Models confuse the two languages, and a grammar with JSON schemas makes them write JSON's words."""
WORD = re.compile(r"[\w.+-]+")
NUMBER = re.compile(r"([+-]?)([0-9][0-9_]*)?(\.(?:[0-9][0-9_]*)?)?([eE][+-]?[0-9]+)?")
INSIDE = {quote: re.compile(rf"[^{quote}\\]+") for quote in "'\""}
HEX = "[0-9a-fA-F]"
ESCAPE = re.compile(rf"\\(?:x{HEX}{{2}}|u{HEX}{{4}}|U{HEX}{{8}}|[0-7]{{1,3}}|.)?", re.DOTALL)
OCTAL = frozenset("01234567")
LENGTHS = {"x": 4, "u": 6, "U": 10} | dict.fromkeys(OCTAL, 4)
"""The most characters of an escape, by its second one (Python's reference, 2.4.1.1)."""
MEANINGS = dict(zip("abfnrtv\\'\"", "\a\b\f\n\r\t\v\\'\"", strict=True)) | {"\n": ""}


def literal(source: Source, sink: Sink) -> Steps[bool]:
    """Read a literal; `sink` gets its JSON. Returns False where the text is no literal, or at the end of the answer. What was read
    up to there has been handed on.
    """
    awaited: list[str] = []
    while True:
        yield from source.whole(SPACE)
        char = yield from source.peek()
        if char in CLOSING:
            sink(source.take())
            awaited.append(CLOSING[char])
            yield from source.whole(SPACE)
            if (yield from source.peek()) != awaited[-1]:
                if char == "{" and not (yield from _key(source, sink)):
                    return False
                continue
        elif not (yield from _atom(source, sink)):
            return False
        while awaited:
            yield from source.whole(SPACE)
            char = yield from source.peek()
            if char == awaited[-1]:
                sink(source.take())
                awaited.pop()
                continue
            if char != ",":
                return False
            source.take()
            yield from source.whole(SPACE)
            if (yield from source.peek()) != awaited[-1]:
                sink(", ")
                if awaited[-1] == "}" and not (yield from _key(source, sink)):
                    return False
                break
        else:
            return True


def _key(source: Source, sink: Sink) -> Steps[bool]:
    """Read a dict's key, which must be a string, and the colon after it."""
    if (yield from source.peek()) not in INSIDE or not (yield from _string(source, sink)):
        return False
    yield from source.whole(SPACE)
    if (yield from source.peek()) != ":":
        return False
    source.take()
    sink(": ")
    return True


def _atom(source: Source, sink: Sink) -> Steps[bool]:
    """Read a string, a number or a word."""
    if (yield from source.peek()) in INSIDE:
        return (yield from _string(source, sink))
    word = yield from source.whole(WORD)
    text = WORDS.get(word) or _number(word)
    sink(text or word)
    return bool(text)


def _number(word: str) -> str:
    """A number of Python as JSON writes it; empty if it is none."""
    match = NUMBER.fullmatch(word)
    if match is None or not (match[2] or len(match[3] or "") > 1):
        return ""
    sign, whole, fraction, exponent = (group or "" for group in match.groups())
    whole = whole.replace("_", "").lstrip("0") or "0"
    fraction = fraction.replace("_", "")
    return f"{sign.strip('+')}{whole}{fraction}{'0' if fraction == '.' else ''}{exponent}"


def _string(source: Source, sink: Sink) -> Steps[bool]:
    """Read a string from its opening quote on, also one in three quotes. Returns False if the answer ends inside it."""
    quote = source.take()
    closing = quote * 3 if (yield from source.starts(quote * 2)) else quote
    source.take(len(closing) - 1)
    sink('"')
    while char := (yield from source.peek()):
        if char == "\\":
            sink(_meaning((yield from _escape(source))))
        elif (yield from source.starts(closing)):
            source.take(len(closing))
            sink('"')
            return True
        else:
            sink(_json(source.run(INSIDE[quote]) or source.take()))
    return False


def _escape(source: Source) -> Steps[str]:
    ahead = yield from source.ahead(2)
    yield from source.ahead(LENGTHS.get(ahead[1:], 2))
    return source.run(ESCAPE)


def _meaning(written: str) -> str:
    """What an escape says, as part of a JSON string. One that Python does not know says what is written."""
    kind, digits = written[1:2], written[2:]
    if digits or kind in OCTAL:
        code = int(digits, 16) if kind in "xuU" else int(kind + digits, 8)
        return _json(chr(code)) if code <= 0x10FFFF else _json(written)
    return _json(MEANINGS.get(kind, written))


def _json(text: str) -> str:
    """A text as part of a JSON string. Half of a surrogate pair stays an escape."""
    return json.dumps(text, ensure_ascii="\ud800" <= text <= "\udfff")[1:-1]
