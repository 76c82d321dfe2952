"""Parsers written as generators: a reader waits wherever the text ends for now, and goes on when more comes. So a parser is
written as if the whole answer were there, and how the text was cut cannot change its pieces. It knows no format.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from stallfree.parsers.pieces import CallArguments, CallStart, Content, Parser, Piece, Reasoning, join

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A reader. It yields while it lacks text, and returns what it has read."""
Sink = Callable[[str], None]
"""Takes a text as it comes."""

BLANK = " \t\r\n"
SPACE = re.compile(f"[{BLANK}]+")
"""White space, as JSON knows it (RFC 8259, 2)."""
ALL = re.compile(".+", re.DOTALL)


class Source:
    """The text of an answer that has come and is not read yet."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False

    def more(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self._ended = True

    def peek(self) -> Steps[str]:
        """The next character, which stays; empty at the end of the answer."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def ahead(self, count: int) -> Steps[str]:
        """The next `count` characters, which stay; fewer at the end of the answer."""
        while len(self._text) - self._at < count and not self._ended:
            yield
        return self._text[self._at : self._at + count]

    def starts(self, mark: str) -> Steps[bool]:
        """Whether `mark` comes next. It stays. This waits only while the text so far is a beginning of the mark."""
        while True:
            text = self._text[self._at : self._at + len(mark)]
            if text == mark or self._ended or not mark.startswith(text):
                return text == mark
            yield

    def take(self, count: int = 1) -> str:
        """The next `count` characters of those seen by `peek`, `ahead` or `starts`."""
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        return text

    def run(self, pattern: re.Pattern[str]) -> str:
        """What `pattern` matches of the text that has come. More of it may follow."""
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def whole(self, pattern: re.Pattern[str]) -> Steps[str]:
        """All that `pattern` matches here, however it comes. `pattern` must match each of its characters alone, too."""
        parts = []
        while (yield from self.peek()) and (part := self.run(pattern)):
            parts.append(part)
        return "".join(parts)

    def rest(self, sink: Sink) -> Steps[None]:
        """Hand on all the text up to the end of the answer."""
        while (yield from self.peek()):
            sink(self.run(ALL))


class Marks:
    """Finds the first of some marks in a text. No mark may begin with another one."""

    def __init__(self, *marks: str):
        self._marks = marks
        first = {mark[0] for mark in marks}
        self._others = re.compile(f"[^{re.escape(''.join(sorted(first)))}]+")

    def find(self, source: Source, sink: Sink) -> Steps[str]:
        """Hand on the text before the first mark, and take the mark. Returns the mark, empty if the answer ends before one."""
        while (yield from source.peek()):
            if text := source.run(self._others):
                sink(text)
                continue
            for mark in self._marks:
                if (yield from source.starts(mark)):
                    return source.take(len(mark))
            sink(source.take())
        return ""


class Out:
    """The pieces of an answer, as a reader writes them. White space before the first call, between calls and after the last one is
    left out; with any other text next to it, it is content.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._pieces: list[Piece] = []
        self._blank: list[str] | None = []

    def content(self, text: str) -> None:
        if self._blank is not None:
            self._blank.append(text)
            if not text.strip(BLANK):
                return
            text, self._blank = "".join(self._blank), None
        if text:
            self._pieces.append(Content(text))

    def call(self, name: str) -> None:
        self._pieces.append(CallStart(self.num_calls, name))
        self.num_calls += 1
        self._blank = []

    def arguments(self, text: str) -> None:
        """More arguments of the last call."""
        if text:
            self._pieces.append(CallArguments(self.num_calls - 1, text))

    def closed(self) -> None:
        """The end mark of the last call was read. White space before it is left out, too."""
        if self._blank is not None:
            self._blank.clear()

    def end(self) -> None:
        """Without any call, white space alone is the answer."""
        if not self.num_calls and self._blank and (text := "".join(self._blank)):
            self._pieces.append(Content(text))

    def taken(self) -> list[Piece]:
        """The pieces since the last time."""
        pieces, self._pieces = self._pieces, []
        return join(pieces)


def end_mark(source: Source, out: Out, mark: str) -> Steps[None]:
    """Read white space and then `mark`, if it comes: it closes the calls before it, and is no content."""
    out.content((yield from source.whole(SPACE)))
    if (yield from source.starts(mark)):
        source.take(len(mark))
        out.closed()


class Streamed:
    """The `Parser` of a reader. The reader must read up to the end of the answer."""

    def __init__(self, read: Callable[[Source, Out], Steps[None]]):
        self._source, self._out = Source(), Out()
        self._steps = read(self._source, self._out)
        next(self._steps)

    def push(self, text: str) -> list[Piece]:
        self._source.more(text)
        next(self._steps)
        return self._out.taken()

    def end(self) -> list[Piece]:
        self._source.end()
        next(self._steps, None)
        self._out.end()
        return self._out.taken()


class Wrapping:
    """A `Parser` whose `_read` reads some parts of the answer itself, and gives the text of the others to another parser,
    `inner`."""

    def __init__(self, inner: Parser):
        self._inner = inner
        self._source = Source()
        self._pieces: list[Piece] = []
        self._steps = self._read()
        next(self._steps)

    def _read(self) -> Steps[None]:
        raise NotImplementedError

    def push(self, text: str) -> list[Piece]:
        self._source.more(text)
        next(self._steps)
        return self._taken()

    def end(self) -> list[Piece]:
        self._source.end()
        next(self._steps, None)
        self._pieces += self._inner.end()
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return join(pieces)

    def _reasoning(self, text: str) -> None:
        self._pieces.append(Reasoning(text))

    def _rest(self, text: str) -> None:
        self._pieces += self._inner.push(text)
