"""Text in, token ids out, and back: a tokenizer with its chat template, and the two filters that every stream's text runs through.

`Detokenizer` never emits half a character; `StopStrings` never lets a part of a stop string out. It knows no request or engine.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.decoders import DecodeStream

# Pre-tokenizers of GGUF's byte-level BPE vocabularies: regular expressions as in the models' own tokenizer.json files.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2, "smollm": _GPT2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}  # fmt: skip


class TextError(ValueError):
    """A tokenizer or template that cannot be used, or messages that the template refuses."""


class Text:
    """A tokenizer, its special token ids and its chat template (None for a model without one)."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, eos_ids: Iterable[int], bos: str = "", eos: str = ""):
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self._bos, self._eos = bos, eos
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self._template = None if template is None else environment.from_string(template)
        except TemplateError as error:
            raise TextError(f"the model's chat template does not parse: {error}") from error

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Text":
        """From a GGUF file's metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""
        kind = metadata.get("tokenizer.ggml.model")
        tokens: list[str] = list(metadata.get("tokenizer.ggml.tokens", []))
        if not tokens:
            raise TextError("the GGUF file holds no tokenizer (tokenizer.ggml.tokens is missing)")
        ids = {token: i for i, token in enumerate(tokens)}
        if kind == "gpt2":
            tokenizer = _byte_level(ids, metadata.get("tokenizer.ggml.merges", []), metadata.get("tokenizer.ggml.pre", "default"))
        elif kind == "llama":
            tokenizer = _sentencepiece(ids, tokens, metadata)
        else:
            raise TextError(
                f"the GGUF tokenizer is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
            )
        types = metadata.get("tokenizer.ggml.token_type", [])
        special = [t for t, type_ in zip(tokens, types, strict=False) if type_ in (3, 4)]  # control and user-defined
        tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None:
            _prepend(tokenizer, tokens[bos], bos)
        eos_ids = {metadata[k] for k in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if k in metadata}
        eos = tokens[min(eos_ids)] if eos_ids else ""
        return cls(tokenizer, metadata.get("tokenizer.chat_template"), eos_ids, "" if bos is None else tokens[bos], eos)

    @classmethod
    def from_folder(cls, folder: Path) -> "Text":
        """From a Hugging Face folder: tokenizer.json, tokenizer_config.json, and the end tokens of (generation_)config.json."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TextError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there (save_pretrained)")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TextError(f"{file}: {error}") from error
        configs = [_json(folder / n) for n in ("tokenizer_config.json", "generation_config.json", "config.json")]
        template = configs[0].get("chat_template")
        if (alone := folder / "chat_template.jinja").is_file():
            template = alone.read_text()
        if isinstance(template, list):
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        bos, eos = (_content(configs[0].get(key)) for key in ("bos_token", "eos_token"))
        eos_ids: set[int] = set()
        for config in configs[1:]:
            ids = config.get("eos_token_id")
            eos_ids |= set(ids) if isinstance(ids, list) else {ids} if ids is not None else set()
        if (id := tokenizer.token_to_id(eos)) is not None:
            eos_ids.add(id)
        return cls(tokenizer, template, eos_ids, bos, eos)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (BOS). Special tokens written in it are recognised."""
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, id: int) -> str:
        """One token as text, for log-probabilities; half characters show as U+FFFD."""
        return self.tokenizer.decode([id], skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def chat(self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True, **extra: Any) -> list[int]:
        """Token ids of a conversation through the model's template. Raises TextError if there is none or it refuses."""
        if self._template is None:
            raise TextError("this model has no chat template; use completions with a prompt instead")
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=generation_prompt, bos_token=self._bos, eos_token=self._eos, **extra
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise TextError(f"the model's chat template refuses these messages: {error}") from error
        return self.encode(text, special=False)


class Detokenizer:
    """One stream's token ids into text, piece by piece. The pieces together are the decoding of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        text = self._stream.step(self._tokenizer, id)
        if text is None:
            self._held.append(id)
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is held back at the end of a stream, with U+FFFD for what never became a character."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=True) if held else ""


class StopStrings:
    """Text that may be the beginning of a stop string is held back until it is or is not one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may go out now, and the stop string if one has ended the stream (`include` lets it out, too)."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
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


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise TextError(f"{file} is not JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def _prepend(tokenizer: Tokenizer, bos: str, id: int) -> None:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, id)]
    )


def _byte_level(ids: dict[str, int], merges: Iterable[str], pre: str) -> Tokenizer:
    if pre not in _SPLITS:
        raise TextError(f"the GGUF pre-tokenizer is {pre!r}; supported are {', '.join(sorted(_SPLITS))}")
    pairs = [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, fuse_unk=False, byte_fallback=False))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[pre]), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(ids: dict[str, int], tokens: list[str], metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE keeps scores instead of merges: a merge is any split of a token into two others, best score first."""
    scores = metadata.get("tokenizer.ggml.scores", [])
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i] if i < len(scores) else 0.0)
    merges = [
        (token[:cut], token[cut:])
        for i in ranked
        for token in (tokens[i],)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer
