"""Tokenizers as GGUF files describe them: a list of tokens with types, and merges or scores. Read as llama.cpp reads them
(src/llama-vocab.cpp), built for the `tokenizers` library. It knows no model and no chat template.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from stallfree.engine.errors import TextError

KEY = "tokenizer.ggml."

# Pre-tokenizers of byte-level BPE vocabularies: regular expressions as in the models' own tokenizer.json files.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2, "smollm": _GPT2, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "gpt-4o": _O200K,
}  # fmt: skip
"""The supported values of `tokenizer.ggml.pre`."""

WHOLE = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""The values with which a word that is a token needs no merges, and a text begins with BOS unless the file says otherwise."""

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Token types. Control tokens are not text; user-defined tokens are text that is never split."""

SPECIALS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id", "cls_token": "cls_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
"""The special tokens: their names in templates, and in GGUF (its spelling)."""

CHANNELS = frozenset({"<|return|>", "<|call|>", "<|end|>"})
"""Tokens of gpt-oss. Each of the first two ends an answer, though files name only the first; the third ends a message in it."""


class Vocabulary:
    """The tokenizer in a GGUF file's `metadata`, its special tokens by their names in templates, and the ids that end a reply.
    Raises TextError, which names the key, if the tokenizer is damaged or not supported.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self._tokens = self._list("tokens", str)
        if not self._tokens:
            raise TextError(f"the GGUF file holds no tokenizer ({KEY}tokens is missing); take another file of this model")
        kind, pre = metadata.get(f"{KEY}model"), metadata.get(f"{KEY}pre", "default")
        self._ids = {token: id for id, token in enumerate(self._tokens)}
        if kind == "gpt2":
            self.tokenizer, begins, usual = self._byte_level(pre), pre in WHOLE, {}
        elif kind == "llama":
            # The ids that llama.cpp assumes for SentencePiece if the file does not name them.
            usual = {name: id for id, name in enumerate(("unknown_token_id", "bos_token_id", "eos_token_id"))}
            self.tokenizer, begins = self._sentencepiece(), True
        else:
            raise TextError(
                f"the GGUF tokenizer is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
            )
        types = self._list("token_type", int, len(self._tokens))
        for special, wanted in ((True, (UNKNOWN, CONTROL)), (False, (USER_DEFINED,))):
            added = [t for t, type_ in zip(self._tokens, types, strict=False) if type_ in wanted and t]
            self.tokenizer.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added])
        ids = {name: self._id(key, usual.get(key)) for name, key in SPECIALS.items()}
        self.specials = {name: self._tokens[id] for name, id in ids.items() if id is not None}
        ends = (ids["eos_token"], self._id("eot_token_id", None), self._id("eom_token_id", None))
        self.eos_ids = frozenset(id for id in ends if id is not None)
        if CHANNELS <= self._ids.keys():
            self.eos_ids = self.eos_ids - {self._ids["<|end|>"]} | {self._ids["<|call|>"]}
        if metadata.get(f"{KEY}add_bos_token", begins):
            self._prepend(ids["bos_token"])

    def _list(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        values = self._metadata.get(KEY + name, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise TextError(f"{KEY}{name} is not a list of {kind.__name__}; the file is damaged, fetch it again")
        if length is not None and values and len(values) != length:
            raise TextError(f"{KEY}{name} has {len(values)} entries for {length} tokens; the file is damaged, fetch it again")
        return values

    def _id(self, name: str, usual: int | None) -> int | None:
        id, size = self._metadata.get(KEY + name), len(self._tokens)
        if id is None:
            return usual if usual is not None and usual < size else None
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < size:
            raise TextError(f"{KEY}{name} is {id!r}, expected a token id from 0 to {size - 1}; {mend(name)}")
        return id

    def _prepend(self, id: int | None) -> None:
        if id is None:
            raise TextError(f"texts must begin with BOS, and {KEY}bos_token_id is missing; {mend('bos_token_id')}")
        # The name "bos" instead of the token: the library splits templates at spaces and colons, which a token may hold.
        bos: Any = {"id": "bos", "ids": [id], "tokens": [self._tokens[id]]}
        self.tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="bos $A", pair="bos $A $B", special_tokens=[bos]
        )

    def _byte_level(self, pre: object) -> Tokenizer:
        if not isinstance(pre, str) or pre not in SPLITS:
            raise TextError(f"the GGUF pre-tokenizer is {pre!r}; supported are {', '.join(sorted(SPLITS))}")
        merges = []
        for number, merge in enumerate(self._list("merges", str)):
            at = merge.find(" ", 1)
            left, right = merge[:at], merge[at + 1 :]
            if at < 0 or not right:
                message = f"{KEY}merges[{number}] is {merge!r}, expected two tokens with a space between them"
                raise TextError(f"{message}; the file is damaged, fetch it again")
            if missing := [part for part in (left, right, left + right) if part not in self._ids]:
                message = f"{KEY}merges[{number}] is {merge!r}, and {missing[0]!r} is not a token"
                raise TextError(f"{message}; the file is damaged, fetch it again")
            merges.append((left, right))
        model = models.BPE(vocab=self._ids, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=pre in WHOLE)
        tokenizer = Tokenizer(model)
        if SPLITS[pre] is _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
        steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        split = pre_tokenizers.Split(tokenizers.Regex(SPLITS[pre]), behavior="isolated", invert=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*steps, split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        """SentencePiece's BPE has scores, not merges. A merge is any split of a token into two others, best score first."""
        tokens, ids = self._tokens, self._ids
        scores = self._list("scores", float, len(tokens))
        if not scores:
            raise TextError(f"{KEY}scores is missing, so no text can be split into tokens; fetch the file again")
        ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
        merges = [
            (token[:cut], token[cut:])
            for i in ranked
            for token in (tokens[i],)
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        unknown = self._id("unknown_token_id", 0) or 0
        model = models.BPE(vocab=ids, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        prefix = [normalizers.Prepend("▁")] if self._metadata.get(f"{KEY}add_space_prefix", True) else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(content=" ", left=1)] if prefix else []
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        return tokenizer


def mend(name: str) -> str:
    """The way out if a token id in the metadata is wrong."""
    return f"correct the file (gguf-set-metadata FILE {KEY}{name} ID), or take another file"
