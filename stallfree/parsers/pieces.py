"""The parts of an answer, what a parser is, and what a tool is. It knows no format.

A whole answer is made from the same pieces as a streamed one, so the two cannot differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Reasoning(NamedTuple):
    """Text that the model writes to itself before it answers."""

    text: str


class Content(NamedTuple):
    """Text of the answer."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins. `index` counts the calls of an answer from 0."""

    index: int  # type: ignore[assignment]  # it hides a method of tuple
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments. All of them together are the text of a JSON object, if the model wrote one."""

    index: int  # type: ignore[assignment]  # it hides a method of tuple
    text: str


Piece = Reasoning | Content | CallStart | CallArguments


class Parser(Protocol):
    """Takes the text of one answer in parts of any size, and returns its pieces as soon as they are certain.

    Each part of the text is handled once, so the cost is linear in its length. No text raises an error, and no piece has an empty
    text. The pieces, after `join`, do not depend on how the text was cut.
    """

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain after more text. The list may be empty."""

    def end(self) -> list[Piece]:
        """The pieces that were held back. The answer ends here, complete or not. Call it once, last."""


class Verbatim:
    """A parser for an answer without tools: all of it is `Content`."""

    def push(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def end(self) -> list[Piece]:
        return []


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters`: the JSON schema of its arguments; an empty one allows no arguments."""

    name: str
    description: str
    parameters: Mapping[str, object]


def join(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, with neighbours of the same kind and the same call as one."""
    joined: list[Piece] = []
    texts: list[str] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, CallStart) or type(piece) is not type(last):
            joined.append(piece)
            _close(joined, texts, len(joined) - 2)
        if not isinstance(piece, CallStart):
            texts.append(piece.text)
    _close(joined, texts, len(joined) - 1)
    return joined


def _close(joined: list[Piece], texts: list[str], at: int) -> None:
    """Give the piece at `at` all of its `texts`."""
    if texts:
        piece = joined[at]
        if not isinstance(piece, CallStart):
            joined[at] = piece._replace(text="".join(texts))
        texts.clear()
