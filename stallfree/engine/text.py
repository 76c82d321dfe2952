"""Text in, token ids out, and back: a tokenizer with its chat template, and the two filters that every stream's text runs through.

`Detokenizer` never emits half a character; `StopStrings` never lets a part of a stop string out. It knows no request or engine.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from stallfree.engine.gguf import SPECIALS, Vocabulary
from stallfree.engine.template import Template, TextError

__all__ = ["Detokenizer", "Pieces", "StopStrings", "Text", "TextError"]

MARK = "\ufdd0"
"""Parts a control token in a user's text, so that it is none. A noncharacter, which no text holds (Unicode 23.7)."""

KNOWN = 1 << 15
"""Tokens whose pieces are remembered: all that a text of usual words has."""

LOOK_BACK = 64
"""Tokens of a prompt that are looked through, from its end, for one that is visible."""

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_LEVEL = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
"""The letters with which byte-level BPE spells bytes (GPT-2's bytes_to_unicode)."""


class Text:
    """A tokenizer, what its special tokens are called in templates (`specials`), and its chat templates: one, or several by name
    ("default", "tool_use"), or None for a model without one. `vocab_size`: how many token ids the model has, which may be fewer
    than its tokenizer has, or more; None: as many. It can be pickled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str] | None,
        eos_ids: Iterable[int],
        specials: Mapping[str, str] | None = None,
        vocab_size: int | None = None,
    ):
        # What a tokenizer.json says of batches for training: a prompt is neither cut nor filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.pieces = Pieces(tokenizer)
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1) if vocab_size is None else vocab_size
        self.eos_ids = frozenset(id for id in eos_ids if 0 <= id < self.vocab_size)
        self._specials = dict(specials or {})
        templates = {"default": template} if isinstance(template, str) else template or {}
        self._templates = {name: Template(source) for name, source in templates.items()}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], vocab_size: int | None = None) -> "Text":
        """From a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""
        vocabulary = Vocabulary(metadata)
        prefix = "tokenizer.chat_template"
        templates = {k.removeprefix(f"{prefix}."): v for k, v in metadata.items() if k.startswith(f"{prefix}.")}
        if prefix in metadata:
            templates["default"] = metadata[prefix]
        return cls(vocabulary.tokenizer, templates, vocabulary.eos_ids, vocabulary.specials, vocab_size)

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int | None = None) -> "Text":
        """From a Hugging Face folder: tokenizer.json, what tokenizer_config.json (or special_tokens_map.json) says of it, the chat
        templates, and the end tokens of (generation_)config.json."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TextError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there (save_pretrained)")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TextError(f"{file}: {error}") from error
        own, *configs = [_json(folder / n) for n in ("tokenizer_config.json", "generation_config.json", "config.json")]
        named = _json(folder / "special_tokens_map.json") | own
        specials = {name: text for name in SPECIALS if (text := _content(named.get(name)))}
        eos_ids: set[int] = set()
        for config in configs:
            ids = config.get("eos_token_id")
            eos_ids |= {id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)}
        if (id := tokenizer.token_to_id(specials.get("eos_token", ""))) is not None:
            eos_ids.add(id)
        return cls(tokenizer, _templates(folder, own.get("chat_template")), eos_ids, specials, vocab_size)

    def encode(self, text: str, *, special: bool = True, control: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (BOS). Control tokens that are written in it are
        recognised, unless `control` is False: then they are text. Raises TextError for a text that has no tokens."""
        if control:
            return _encoded(self.tokenizer, text, special)
        return _encoded(self._unmarking, self._marked(text, self._parted()), special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, id: int) -> str:
        """One token as text, for log-probabilities, with the space that it begins with; half characters show as U+FFFD."""
        return self.pieces[id].decode(errors="replace")

    def lacks(self, ids: Sequence[int]) -> int | None:
        """The first of `ids` that the model does not have; None if it has all of them."""
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return None
        return next(id for id in ids if not 0 <= id < self.vocab_size)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool = True,
        control: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> list[int]:
        """Token ids of a conversation through the model's template; further values are the template's own (`enable_thinking`).
        Control tokens that are written in messages, tools and documents are recognised, unless `control` is False: then they are
        text. Raises TextError if there is no template, or if it refuses.
        """
        template = self._template(tools)
        # A key without a value is one that is not there: templates ask whether a message has tool calls.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given = {"messages": plain, "tools": tools, "documents": documents, **extra}
        if not control:
            given = self._marked(given, self._parted(template))
        text = template.render({**self._specials, "add_generation_prompt": generation_prompt, **given})
        return _encoded(self.tokenizer if control else self._unmarking, text, False)

    def _template(self, tools: object) -> Template:
        if not self._templates:
            raise TextError("this model has no chat template; use completions with a prompt instead")
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            names = ", ".join(sorted(self._templates))
            raise TextError(f"this model has several chat templates and none of them is 'default': {names}; name one so")
        return template

    def _parted(self, template: Template | None = None) -> re.Pattern[str]:
        """Where control tokens begin: special tokens, and those added tokens that the template writes itself."""
        tokens = [
            token.content
            for token in self.tokenizer.get_added_tokens_decoder().values()
            if token.special
            or (template is not None and not token.content.isspace() and any(token.content in t for t in template.texts))
        ]
        if not any(tokens):
            return re.compile("(?!)")
        # The set of first letters is a shortcut: most of a text begins no token, and there may be a thousand of them.
        first = "".join(sorted({re.escape(token[0]) for token in tokens if token}))
        return re.compile(f"(?=[{first}])(?={'|'.join(map(re.escape, filter(None, tokens)))})(.)", re.DOTALL)

    def _marked(self, value: Any, control: re.Pattern[str]) -> Any:
        """`value`, texts and what holds texts, with control tokens parted behind their first letter, wherever one begins."""
        if isinstance(value, str):
            return control.sub(rf"\1{MARK}", value)
        if isinstance(value, Mapping):
            return {key: self._marked(item, control) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, control) for item in value]
        return value

    @cached_property
    def _unmarking(self) -> Tokenizer:
        """The tokenizer, which here looks for added tokens first and takes marks out then."""
        values = json.loads(self.tokenizer.to_str())
        for token in values["added_tokens"]:
            token["normalized"] = False
        unmark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        own = values["normalizer"]
        values["normalizer"] = {"type": "Sequence", "normalizers": [unmark, *([own] if own else [])]}
        return Tokenizer.from_str(json.dumps(values))


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


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)
    except Exception as error:  # the library raises bare Exception, for a word that its vocabulary lacks
        raise TextError(f"the model's tokenizer refuses this text: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise TextError(f"{file} is not JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _templates(folder: Path, configured: Any) -> str | Mapping[str, str] | None:
    """A folder's chat templates: those in files of their own, or else what tokenizer_config.json has `configured`: one, or a list
    of objects with `name` and `template`."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if alone := {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}:
        return alone
    configured = configured or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(configured, list):
        configured = {t["name"]: t["template"] for t in configured if isinstance(t, dict) and {"name", "template"} <= t.keys()}
    return configured if isinstance(configured, str | Mapping) else None


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""
