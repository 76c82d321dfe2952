"""What the tests of all formats share: the tools of the request, pieces in few words, and a check of one answer in every cut."""

from collections.abc import Iterable

from stallfree.parsers.pieces import CallArguments, CallStart, Content, Parser, Piece, join

NAMES = ("f", "g", "get_weather")


def called(index: int, name: str, arguments: str) -> list[Piece]:
    return [CallStart(index, name), CallArguments(index, arguments)]


def read(parser: Parser, parts: Iterable[str]) -> list[Piece]:
    """The joined pieces of an answer that comes in these parts."""
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.push(part)
    pieces += parser.end()
    assert all(isinstance(piece, CallStart) or piece.text for piece in pieces)
    return join(pieces)


def content(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def check(format, text: str, expected: list[Piece]) -> None:
    """The answer has these pieces, whole and character by character, and so has each beginning of it, whatever they are."""
    assert expected == read(format.parser(NAMES), [text])
    for end in range(len(text) + 1):
        assert read(format.parser(NAMES), [text[:end]]) == read(format.parser(NAMES), text[:end])
    assert text == content(read(format.parser(()), [text]))
