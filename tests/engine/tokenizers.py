"""Small tokenizers of the kinds that models have, each with special tokens, and gaps between its ids."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

BYTES = [f"<0x{b:02X}>" for b in range(256)]
WORDS = ["▁", "a", "b", "▁a", "ab", "▁ab", "▁Hello", "▁world", ".", "▁▁", "é", "�"]


def sentencepiece(decoder=None, prefix: bool = True) -> Tokenizer:
    """As in Llama 2, Mistral and TinyLlama: a space before each word, and bytes for what the vocabulary lacks."""
    ids = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    usual = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.decoder = decoder or usual
    return with_added(tokenizer)


def byte_level() -> Tokenizer:
    """As in GPT-2, Llama 3 and Qwen: letters that stand for bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: id for id, letter in enumerate([*letters, "ab", "Ġa", "ðŁ", "ðŁĺ"])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("a", "b"), ("Ġ", "a"), ("ð", "Ł"), ("ðŁ", "ĺ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer)


def words(decoder=None) -> Tokenizer:
    """Whole words: joined by spaces without a decoder."""
    ids = {word: id for id, word in enumerate(["[UNK]", "hello", "world", "##ing", "ing</w>", "a</w>", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        tokenizer.decoder = decoder
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


ALL = {
    "sentencepiece": sentencepiece(),
    "sentencepiece without a prefix": sentencepiece(prefix=False),
    "metaspace": sentencepiece(decoders.Metaspace()),
    "byte level": byte_level(),
    "byte level in a sequence": byte_level(),
    "words": words(),
    "word pieces": words(decoders.WordPiece(cleanup=False)),
    "word ends": words(decoders.BPEDecoder(suffix="</w>")),
}
ALL["byte level in a sequence"].decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
