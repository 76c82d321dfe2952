"""Text to token ids and back: a tokenizer with its chat templates, from a folder or a GGUF file.

`detokenizer` does the text of streams. This module knows no request or engine. A `Text` can be sent to another process.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from stallfree.engine.detokenizer import Detokenizer, Pieces, StopStrings
from stallfree.engine.errors import TextError
from stallfree.engine.gguf import SPECIALS, Vocabulary

if TYPE_CHECKING:
    from stallfree.engine.template import Template

__all__ = ["Detokenizer", "Pieces", "StopStrings", "Text", "TextError"]

MARK = "\ufdd0"
"""Splits a control token in a user's text, so that it is plain text. A noncharacter, which no text holds (Unicode 23.7)."""

COMPOSED = 3
"""Composed characters have at most this many times fewer bytes: three jamo of 3 bytes make a syllable of 3 (Unicode 3.12)."""


class Text:
    """A tokenizer with its chat templates. `specials`: the special tokens by their names in templates. `template`: one template,
    several by name ("default", "tool_use"), or None. `vocab_size`: the number of token ids of the model, which may differ from the
    tokenizer's; None: the same. It can be pickled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str] | None,
        eos_ids: Iterable[int],
        specials: Mapping[str, str] | None = None,
        vocab_size: int | None = None,
    ):
        # A tokenizer.json may say this for training batches, but a prompt is neither cut nor padded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.pieces = Pieces(tokenizer)
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1) if vocab_size is None else vocab_size
        self.eos_ids = frozenset(id for id in eos_ids if 0 <= id < self.vocab_size)
        self._specials = dict(specials or {})
        templates = {"default": template} if isinstance(template, str) else template or {}
        self._templates = _compiled(templates)

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
        """From a Hugging Face folder: tokenizer.json, the special tokens of tokenizer_config.json (or special_tokens_map.json), the
        chat templates, and the end tokens of (generation_)config.json."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TextError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there (save_pretrained)")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TextError(f"{file}: {error}") from error
        tokenizer_config, *configs = [_json(folder / n) for n in ("tokenizer_config.json", "generation_config.json", "config.json")]
        named = _json(folder / "special_tokens_map.json") | tokenizer_config
        specials = {name: text for name in SPECIALS if (text := _content(named.get(name)))}
        eos_ids: set[int] = set()
        for config in configs:
            ids = config.get("eos_token_id")
            eos_ids |= {id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)}
        if (id := tokenizer.token_to_id(specials.get("eos_token", ""))) is not None:
            eos_ids.add(id)
        return cls(tokenizer, _templates(folder, tokenizer_config.get("chat_template")), eos_ids, specials, vocab_size)

    def encode(self, text: str, *, special: bool = True, control: bool = True) -> list[int]:
        """Token ids of `text`. `special` adds the tokens that the tokenizer puts around a text (BOS). Control tokens in the text
        are recognised; without `control`, they are plain text. Raises TextError if the text cannot be encoded."""
        if control:
            return _encoded(self.tokenizer, text, special)
        return _encoded(self._unmarking, self._marked(text, self._control_tokens()), special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, id: int) -> str:
        """One token as text, for log-probabilities, with its leading space. Half a character shows as U+FFFD."""
        return self.pieces[id].decode(errors="replace")

    def lacks(self, ids: Sequence[int]) -> int | None:
        """The first of `ids` that the model does not have; None if it has them all."""
        if not ids or (min(ids) >= 0 and max(ids) < self.vocab_size):
            return None
        return next(id for id in ids if not 0 <= id < self.vocab_size)

    def template_source(self, tools: bool) -> str:
        """The template of a conversation with or without `tools`, as written. Raises TextError if there is none."""
        return self._template(() if tools else None).source

    def own_tokens(self, texts: Iterable[str]) -> dict[str, int]:
        """The ids of those of `texts` that are tokens of their own: special ones, and others that were added to the vocabulary."""
        ids = {text: self.tokenizer.token_to_id(text) for text in texts}
        return {text: id for text, id in ids.items() if id in self.added}

    @cached_property
    def added(self) -> frozenset[int]:
        """The ids of tokens that were added to the vocabulary. No other tokens make up their text."""
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    def chat(self, messages: Sequence[Mapping[str, Any]], *, control: bool = True, **more: Any) -> list[int]:
        """Token ids of a conversation; see `render`."""
        return self.encode_rendered(self.render(messages, control=control, **more), control=control)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool = True,
        control: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the model's template writes it, for `encode_rendered`. `extra`: further values for the template
        (`enable_thinking`). Control tokens in messages, tools and documents are recognised; without `control`, they are plain text.
        Raises TextError if there is no template, or if it refuses.
        """
        template = self._template(tools)
        # Keys without a value are dropped, because templates test whether a message has tool calls.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = {**(extra or {}), "messages": plain, "tools": tools, "documents": documents}
        if not control:
            values = self._marked(values, self._control_tokens(template))
        return template.render({**self._specials, "add_generation_prompt": generation_prompt, **values})

    def encode_rendered(self, text: str, *, control: bool = True) -> list[int]:
        """Token ids of a text that `render` returned for the same `control`."""
        return _encoded(self.tokenizer if control else self._unmarking, text, False)

    def least_tokens(self, text: str) -> int:
        """The least number of tokens that `text` can have, without encoding it; 0 if unknown."""
        return -(-(len(text.encode()) - len(MARK.encode()) * text.count(MARK)) // self._longest) if self._longest else 0

    @cached_property
    def _longest(self) -> int:
        """The most bytes of text that one token can stand for. 0 if there is no bound: the tokenizer drops or joins characters."""
        values = json.loads(self.tokenizer.to_str())
        steps = [*_steps(values["normalizer"]), *_steps(values["pre_tokenizer"])]
        kept = self.pieces.byte_level or values["model"].get("byte_fallback")
        strips = any(token["lstrip"] or token["rstrip"] for token in values["added_tokens"])
        if not kept or strips or not all(map(_keeps_bytes, steps)):
            return 0
        composes = any(step["type"] == "NFC" for step in steps)
        return max(len(token.encode()) for token in self.tokenizer.get_vocab()) * (COMPOSED if composes else 1)

    def _template(self, tools: object) -> "Template":
        if not self._templates:
            raise TextError("this model has no chat template; use completions with a prompt instead")
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            names = ", ".join(sorted(self._templates))
            raise TextError(f"this model has several chat templates and none of them is 'default': {names}; name one 'default'")
        return template

    def _control_tokens(self, template: "Template | None" = None) -> re.Pattern[str]:
        """Matches where control tokens begin: special tokens, and added tokens that the template itself writes."""
        tokens = [
            token.content
            for token in self.tokenizer.get_added_tokens_decoder().values()
            if token.special
            or (template is not None and not token.content.isspace() and any(token.content in t for t in template.texts))
        ]
        if not any(tokens):
            return re.compile("(?!)(.)")
        # The first letters are for speed: few places in a text begin a token, and there may be a thousand tokens.
        first = "".join(sorted({re.escape(token[0]) for token in tokens if token}))
        return re.compile(f"(?=[{first}])(?={'|'.join(map(re.escape, filter(None, tokens)))})(.)", re.DOTALL)

    def _marked(self, value: Any, control: re.Pattern[str]) -> Any:
        """`value`, a text or nested texts, with a mark after the first letter of each control token."""
        if isinstance(value, str):
            return control.sub(rf"\1{MARK}", value)
        if isinstance(value, Mapping):
            return {self._marked(key, control): self._marked(item, control) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, control) for item in value]
        return value

    @cached_property
    def _unmarking(self) -> Tokenizer:
        """The tokenizer, changed so that it first looks for added tokens and then removes marks."""
        values = json.loads(self.tokenizer.to_str())
        for token in values["added_tokens"]:
            token["normalized"] = False
        unmark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        own = values["normalizer"]
        values["normalizer"] = {"type": "Sequence", "normalizers": [unmark, *([own] if own else [])]}
        return Tokenizer.from_str(json.dumps(values))


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: itself, or its parts if it is a sequence."""
    if part is None:
        return []
    return [step for inner in part.get("normalizers") or part.get("pretokenizers") or () for step in _steps(inner)] or [part]


def _keeps_bytes(step: Mapping[str, Any]) -> bool:
    """Whether a step of tokenisation keeps every byte of a text, except that it may compose characters."""
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"])
    keeping = ("NFC", "Prepend", "ByteLevel", "Split", "Digits", "Metaspace")
    return step["type"] in keeping and step.get("behavior") != "Removed"


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception for an unknown word; a panic is only a BaseException
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
    """A folder's chat templates: those in their own files, or else `configured` from tokenizer_config.json, which is a template or
    a list of objects with `name` and `template`."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if templates := {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}:
        return templates
    configured = configured or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(configured, list):
        configured = {t["name"]: t["template"] for t in configured if isinstance(t, dict) and {"name", "template"} <= t.keys()}
    return configured if isinstance(configured, str | Mapping) else None


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def _compiled(templates: Mapping[str, str]) -> "dict[str, Template]":
    """The templates, compiled. Jinja is imported only if there are any."""
    if not templates:
        return {}
    from stallfree.engine.template import Template

    return {name: Template(source) for name, source in templates.items()}
