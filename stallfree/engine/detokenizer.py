"""From token ids to the text of a stream: the two filters that it runs through.

`Detokenizer` never emits half a character; `StopStrings` never lets a part of a stop string out. It knows no request or engine.
"""

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from tokenizers import Tokenizer

KNOWN = 1 << 15
"""Tokens whose pieces are remembered: all that a text of usual words has."""

LOOK_BACK = 64
"""Tokens of a prompt that are looked through, from its end, for one that is visible."""

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_LEVEL = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
"""The letters with which byte-level BPE spells bytes (GPT-2's bytes_to_unicode)."""


class Pieces:
    """What each token id adds to a text, in bytes: half a character is a token, too. An id that the tokenizer lacks adds nothing.

    Byte-level BPE and byte tokens ("<0xE2>", SentencePiece's byte fallback) are read here; every other token is decoded by the
    library behind one that is known, for it may begin with a space only there. The cost of a piece does not depend on the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        decoder: dict[str, Any] = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        steps = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
        self.byte_level, self._byte_fallback = "ByteLevel" in steps, "ByteFallback" in steps
        self._known = lru_cache(KNOWN)(self._look_up)

    def __reduce__(self) -> tuple[type["Pieces"], tuple[Tokenizer]]:
        return Pieces, (self._tokenizer,)

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it; empty for an id that there is not."""
        return self._known(id)[0]

    def special(self, id: int) -> bool:
        """Whether the token is left out of texts."""
        return self._known(id)[1]

    def __getitem__(self, id: int) -> bytes:
        """What `id` adds inside a text."""
        return self._known(id)[2]

    def after(self, before: int | None, id: int) -> bytes:
        """What `id` adds to a text that ends in the token `before`; None: to an empty text."""
        token, _, inside = self._known(id)
        if not token or self.byte_level:
            return inside
        if before is None:
            return inside if inside >= b"\x80" and self._byte(token) else self._decoded(id).encode()
        return inside if self._byte_fallback else self._behind(before, id)

    def _look_up(self, id: int) -> tuple[str, bool, bytes]:
        token: str = (self._tokenizer.id_to_token(id) or "") if 0 <= id < 2**32 else ""
        if not token:
            return "", False, b""
        special = not self._decoded(id, skip=True) and bool(self._decoded(id))
        if not self.byte_level:  # behind itself, as good a token as any
            return token, special, self._byte(token) or self._behind(id, id)
        letters = [_BYTE_LEVEL.get(letter) for letter in token]
        return token, special, token.encode() if None in letters else bytes(byte for byte in letters if byte is not None)

    def _byte(self, token: str) -> bytes:
        """The byte that a byte token is."""
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return b"" if match is None else bytes.fromhex(match[1])

    def _behind(self, before: int, id: int) -> bytes:
        return self._decoded(before, id)[len(self._decoded(before)) :].encode()

    def _decoded(self, *ids: int, skip: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is part of no character, as the library writes byte tokens."""
    broken = cast(UnicodeDecodeError, error)
    return "\ufffd" * (broken.end - broken.start), broken.end


codecs.register_error("stallfree-each-byte", _each_byte)


class Detokenizer:
    """One stream's token ids into text, piece by piece, whatever they are. The pieces together are the decoding of all ids; but
    characters of byte tokens go out at once, while the library takes them back if the byte tokens behind them are no characters.

    The text continues that of the token ids `before`: a tokenizer that puts a space before each word leaves that of a text's first
    word out, and this is not the first.
    """

    def __init__(self, tokenizer: Tokenizer | Pieces, before: Sequence[int] = ()):
        self._pieces = pieces = tokenizer if isinstance(tokenizer, Pieces) else Pieces(tokenizer)
        last = (id for id in reversed(before[-LOOK_BACK:]) if pieces.token(id) and not pieces.special(id))
        self._before: int | None = next(last, None)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace" if pieces.byte_level else "stallfree-each-byte")

    def push(self, id: int, *, special: bool = False) -> str:
        """The text that is certain now; empty while a character is incomplete. A special token has none, unless `special`."""
        if not self._pieces.token(id) or (not special and self._pieces.special(id)):
            return ""
        before, self._before = self._before, id
        return self._characters.decode(self._pieces.after(before, id))

    def flush(self) -> str:
        """What is held back at the end of a stream, with U+FFFD for what never became a character."""
        text = self._characters.decode(b"", final=True)
        self._characters.reset()
        return text


class StopStrings:
    """Text that may be the beginning of a stop string is held back until it is or is not one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str, *, ends: bool = True) -> tuple[str, str | None]:
        """The text that may go out now, and the stop string if one has ended the stream (`include` lets it out, too). Without
        `ends` none does, but the beginning of one counts later."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if ends and (at := self._held.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)  # the one complete first, so that the outcome does not depend on how the text was cut
            out = self._held[: at + len(stop) * self._include]
            self._held = ""
            return out, stop
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
