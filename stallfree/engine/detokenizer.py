"""The two filters from token ids to the text of a stream.

`Detokenizer` never emits half a character. `StopStrings` never lets part of a stop string out. They know no request, no engine, and
of reasoning only where it ends.
"""

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from tokenizers import Tokenizer

KNOWN = 1 << 15
"""The most tokens whose pieces are remembered: enough for all common words."""

LOOK_BACK = 64
"""How many tokens at the end of a prompt are searched for a visible one."""

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_LEVEL = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
"""The letters with which byte-level BPE spells bytes (GPT-2's bytes_to_unicode)."""


class Pieces:
    """What each token id adds to a text, in bytes, because a token may be half a character. An id that the tokenizer lacks adds
    nothing. Byte-level BPE and byte tokens ("<0xE2>", SentencePiece's byte fallback) are read here. The library decodes every other
    token after a known one, because only there it may begin with a space. The cost of a piece does not depend on the text.
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
        """The token as the vocabulary spells it; empty for an id that the tokenizer lacks."""
        return self._known(id)[0]

    def special(self, id: int) -> bool:
        """Whether the token is left out of texts."""
        return self._known(id)[1]

    def __getitem__(self, id: int) -> bytes:
        """What `id` adds inside a text."""
        return self._known(id)[2]

    def after(self, before: int | None, id: int) -> bytes:
        """What `id` adds to a text that ends in the token `before` (None: the text is empty)."""
        token, _, inside = self._known(id)
        if not token or self.byte_level:
            return inside
        if before is None:
            return inside if inside >= b"\x80" and self._byte(token) else self._decoded(id).encode()
        return inside if self._byte_fallback else self._piece_after(before, id)

    def _look_up(self, id: int) -> tuple[str, bool, bytes]:
        token: str = (self._tokenizer.id_to_token(id) or "") if 0 <= id < 2**32 else ""
        if not token:
            return "", False, b""
        special = not self._decoded(id, skip=True) and bool(self._decoded(id))
        if not self.byte_level:  # after itself: any token will do
            return token, special, self._byte(token) or self._piece_after(id, id)
        letters = [_BYTE_LEVEL.get(letter) for letter in token]
        return token, special, token.encode() if None in letters else bytes(byte for byte in letters if byte is not None)

    def _byte(self, token: str) -> bytes:
        """The byte of a byte token; empty for any other token."""
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return b"" if match is None else bytes.fromhex(match[1])

    def _piece_after(self, before: int, id: int) -> bytes:
        return self._decoded(before, id)[len(self._decoded(before)) :].encode()

    def _decoded(self, *ids: int, skip: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """U+FFFD for each byte that is part of no character, as the library writes byte tokens."""
    broken = cast(UnicodeDecodeError, error)
    return "\ufffd" * (broken.end - broken.start), broken.end


codecs.register_error("stallfree-each-byte", _each_byte)


class Detokenizer:
    """Turns the token ids of one stream into text, piece by piece. The pieces together are the decoding of all ids, except in one
    case: characters of byte tokens go out at once, while the library drops them if the next byte tokens are not characters.

    The text continues that of the token ids `before`. This decides about the first space: a tokenizer that puts a space before each
    word omits it at the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer | Pieces, before: Sequence[int] = ()):
        self._pieces = pieces = tokenizer if isinstance(tokenizer, Pieces) else Pieces(tokenizer)
        last = (id for id in reversed(before[-LOOK_BACK:]) if pieces.token(id) and not pieces.special(id))
        self._before: int | None = next(last, None)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace" if pieces.byte_level else "stallfree-each-byte")

    def push(self, id: int, *, special: bool = False) -> str:
        """The text that is certain now; empty while a character is incomplete. Special tokens have text only with `special`."""
        if not self._pieces.token(id) or (not special and self._pieces.special(id)):
            return ""
        before, self._before = self._before, id
        return self._characters.decode(self._pieces.after(before, id))

    def flush(self) -> str:
        """The text held back at the end of a stream, with U+FFFD for an incomplete character."""
        text = self._characters.decode(b"", final=True)
        self._characters.reset()
        return text


class Section:
    """The reasoning section with which an answer may begin: text between the marks `open` and `close`. `inside`: the prompt already
    ends within it. It separates this section from the rest of the answer as the text comes."""

    def __init__(self, open: str, close: str, *, inside: bool):
        self._open, self._close = open, close
        self._inside = inside
        self._seen = ""
        self.over = False
        """Whether all further text belongs to the rest of the answer."""

    def push(self, text: str) -> tuple[str, str]:
        """The new text of the section, and that of the rest. Text that may be the opening mark is held back."""
        if self.over:
            return "", text
        if not self._inside:
            text, self._seen = self._seen + text, ""
            beginning = text.lstrip()[: len(self._open)]
            if beginning != self._open:
                if self._open.startswith(beginning):
                    self._seen = text
                    return "", ""
                self.over = True
                return "", text
            self._inside = True
        tail = self._seen + text
        at = tail.find(self._close)
        if at < 0:
            self._seen = tail[max(0, len(tail) - len(self._close) + 1) :]
            return text, ""
        self.over = True
        end = at + len(self._close) - len(self._seen)
        return text[:end], text[end:]

    def flush(self) -> str:
        """The text held back at the end."""
        return "" if self._inside or self.over else self._seen


class StopStrings:
    """Holds text back while it may be the beginning of a stop string. In a `section` no stop string counts."""

    def __init__(self, stops: Sequence[str], *, include: bool = False, section: Section | None = None):
        self._stops = stops
        self._include = include
        self._section = section
        self._held = ""

    def push(self, text: str, *, ends: bool = True) -> tuple[str, str | None]:
        """The text that may go out now, and the stop string that has ended the stream, if any (with `include`, it goes out, too).
        Without `ends`, no stop string ends the stream yet, but its beginning counts later."""
        if not self._stops:
            return text, None
        reasoning = ""
        if self._section is not None:
            reasoning, text = self._section.push(text)
        self._held += text
        matches = [(at + len(stop), at, stop) for stop in self._stops if ends and (at := self._held.find(stop)) >= 0]
        if matches:
            _, at, stop = min(matches)  # the first to be complete, so that the result does not depend on how the text was cut
            out = self._held[: at + len(stop) * self._include]
            self._held = ""
            return reasoning + out, stop
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return reasoning + out, None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held if self._section is None else self._section.flush() + held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
