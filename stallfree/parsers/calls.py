"""A call as a JSON object, `{"name": ..., "arguments": {...}}`, which most formats share, and several of them in a row. It does not
know what stands around them.

A call begins when its name is known, and its arguments begin or its object ends. Until then its text is held, because it may be no
call. From then on its arguments go out as they come.
"""

from collections.abc import Collection
from enum import Enum

from stallfree.parsers.json_text import nested, string, value
from stallfree.parsers.reading import BLANK, SPACE, Out, Source, Steps

ARGUMENTS = ("arguments", "parameters")


class End(Enum):
    """How the reading of a call ended. CALL: the call is complete. TEXT: it was none, and its text has been written as content.
    BROKEN: the call began, but its arguments are not JSON, and the text goes on inside them.
    """

    CALL = "call"
    TEXT = "text"
    BROKEN = "broken"


class Held:
    """The text of what may become a call, and its arguments, while they are held. `text`: what was read before the call itself,
    such as its mark; it is content if there is no call. `names`: the tools of the request.
    """

    def __init__(self, out: Out, names: Collection[str], text: str = ""):
        self.names = names
        self.began = False
        self.name: str | None = None
        self._out = out
        self._text = [text]
        self._arguments: list[str] = []

    def keep(self, text: str) -> None:
        """Text as written. After the call began, only the text after its arguments is kept."""
        self._text.append(text)

    def written(self, text: str) -> None:
        """Arguments as written. They are kept until the call begins."""
        if not self.began:
            self._text.append(text)

    def argue(self, text: str) -> None:
        """More arguments. They begin the call if its name is known."""
        self._arguments.append(text)
        if self.name is not None:
            self.begin(self.name)

    def verbatim(self, text: str) -> None:
        """More arguments, which are passed on as written."""
        self.written(text)
        self.argue(text)

    def begin(self, name: str) -> None:
        """The call is one: send its name and the arguments so far."""
        if not self.began:
            self.began = True
            self._text.clear()
            self._out.call(name)
        self._out.arguments("".join(self._arguments))
        self._arguments.clear()

    def known(self, name: str) -> bool:
        """Take the call's name. Returns False if no tool has it. Arguments that came before it begin the call."""
        if name not in self.names:
            return False
        self.name = name
        if self._arguments:
            self.begin(name)
        return True

    def release(self) -> End:
        """Write the text that is no part of a call as content."""
        text = "".join(self._text)
        self._text.clear()
        if not self.began or text.strip(BLANK):
            self._out.content(text)
        return End.CALL if self.began else End.TEXT

    def fail(self, text: str) -> End:
        """`text` came where it cannot. After the call began, it belongs to the arguments."""
        if not self.began:
            self.keep(text)
            return self.release()
        self.argue(text)
        return End.BROKEN

    def close(self, *, bare: bool) -> End:
        """The object has ended. Without arguments it is a call only if `bare`: then they are `{}`."""
        if not self.began:
            if self.name is None or not bare:
                return self.release()
            self.argue("{}")
        self._text.clear()
        return End.CALL


def call(source: Source, held: Held, *, bare: bool = True) -> Steps[End]:
    """Read a call from its brace on. `bare`: whether a call may lack arguments. An object that goes wrong after the arguments is a
    call, and what does not belong to it stays unread.
    """
    argued = False
    held.keep(source.take())
    while True:
        yield from _space(source, held)
        char = yield from source.peek()
        if char == "}":
            held.keep(source.take())
            return held.close(bare=bare)
        key: list[str] = []
        if char != '"' or not (yield from string(source, held.keep, key.append)):
            return held.release()
        yield from _space(source, held)
        if (yield from source.peek()) != ":":
            return held.release()
        held.keep(source.take())
        yield from _space(source, held)
        member = "".join(key)
        if member in ARGUMENTS and not argued:
            argued = True
            if not (yield from arguments(source, held)):
                return End.BROKEN if held.began and (yield from source.peek()) else held.release()
        elif not (yield from _other(source, held, member)):
            return held.release()
        yield from _space(source, held)
        char = yield from source.peek()
        if char == ",":
            held.keep(source.take())
        elif char != "}":
            return held.release()


def _other(source: Source, held: Held, member: str) -> Steps[bool]:
    """Read a member that is not the arguments. Returns False if no call can have it."""
    if member != "name" or held.name is not None:
        return (yield from value(source, held.keep))
    if (yield from source.peek()) != '"':
        return False
    name: list[str] = []
    return (yield from string(source, held.keep, name.append)) and held.known("".join(name))


def arguments(source: Source, held: Held) -> Steps[bool]:
    """Read the value of the arguments: an object, a string that holds one, or null, which is `{}`. Returns False if it is another
    value, or if it does not end.
    """
    char = yield from source.peek()
    if char == "{":
        return (yield from nested(source, held.verbatim))
    if char == '"':
        return (yield from _inner(source, held))
    if (yield from source.starts("null")):
        held.written(source.take(4))
        held.argue("{}")
        return True
    return False


def _inner(source: Source, held: Held) -> Steps[bool]:
    """Read arguments inside a string. They are passed on decoded."""
    blank: list[str] = []
    begun = False
    fits = True

    def text(part: str) -> None:
        nonlocal begun, fits
        if not begun:
            blank.append(part)
            if not part.strip(BLANK):
                return
            begun, part = True, "".join(blank)
            fits = part.lstrip(BLANK).startswith("{")
        if fits:
            held.argue(part)

    ended = yield from string(source, held.written, text)
    if ended and not begun:
        held.argue("{}")
    return ended and fits


def calls(source: Source, held: Held, out: Out, *, between: str = "", close: str = "", bare: bool = True) -> Steps[End]:
    """Read calls in a row, with the mark `between` them (empty: one call), up to the mark `close` (empty: none). The first must
    begin here.
    """
    while (yield from source.peek()) == "{":
        end = yield from call(source, held, bare=bare)
        if end is not End.CALL:
            return end
        held = Held(out, held.names)
        yield from _space(source, held)
        char = yield from source.peek()
        if close and char == close:
            source.take()
            return End.CALL
        if not between or char != between:
            break
        held.keep(source.take())
        yield from _space(source, held)
    return held.release()


def _space(source: Source, held: Held) -> Steps[None]:
    held.keep((yield from source.whole(SPACE)))
