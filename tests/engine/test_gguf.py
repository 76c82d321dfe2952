"""Tokenizers of GGUF files are read as llama.cpp reads them; a damaged one is refused with the key at fault."""

import pytest
from tokenizers import pre_tokenizers

from stallfree.engine.detokenizer import Detokenizer, StopStrings
from stallfree.engine.gguf import SPLITS
from stallfree.engine.text import Text, TextError
from tests.engine.tokenizers import BYTES

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
KEY = "tokenizer.ggml."


def byte_level(tokens=("ab", "abc", "Ġa"), merges=("a b", "ab c", "Ġ a"), special=("<s>", "</s>"), user=("<think>",), **extra):
    """Metadata of a byte-level vocabulary; `extra` are keys after "tokenizer.ggml.", None leaves one out."""
    vocabulary = [*LETTERS, *tokens, *special, *user]
    usual = {
        "model": "gpt2", "pre": "gpt-2", "tokens": vocabulary, "merges": list(merges),
        "token_type": [*[1] * (256 + len(tokens)), *[3] * len(special), *[4] * len(user)],
        "bos_token_id": vocabulary.index("<s>"), "eos_token_id": vocabulary.index("</s>"),
    }  # fmt: skip
    return {KEY + name: value for name, value in (usual | extra).items() if value is not None}


def sentencepiece(**extra):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "▁a", "ab", "▁ab", "<think>", "<|im_end|>"]
    usual = {
        "model": "llama", "tokens": tokens, "scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -3.0, -2.0, 0.0, 0.0],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * 6, 4, 3],
    }  # fmt: skip
    return {KEY + name: value for name, value in (usual | extra).items() if value is not None}


def damaged(metadata, changes):
    changed = metadata | {KEY + name: value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece}


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_defined_token_is_text_and_is_never_split(kind):
    text = Text.from_gguf(KINDS[kind]())
    ids = text.encode("ab<think>ab", special=False)
    think = text.tokenizer.token_to_id("<think>")
    assert 1 == ids.count(think)
    assert "ab<think>ab" == text.decode(ids).replace(" ", "")
    detokenizer, stops = Detokenizer(text.tokenizer), StopStrings(["<think>"])
    assert "<think>" in [stops.push(detokenizer.push(id))[1] for id in ids]


@pytest.mark.parametrize(("kind", "control"), [("byte level", "</s>"), ("sentencepiece", "</s>"), ("sentencepiece", "<|im_end|>")])
def test_a_control_token_is_no_text(kind, control):
    text = Text.from_gguf(KINDS[kind]())
    ids = text.encode(f"ab{control}ab", special=False)
    assert text.tokenizer.token_to_id(control) in ids
    assert "abab" == text.decode(ids).replace(" ", "")
    assert control in text.decode(ids, skip_special=False)


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"])
def test_a_word_that_is_a_token_is_taken_whole_and_a_text_begins_with_bos(pre):
    metadata = byte_level(tokens=("ab", "bc", "abc"), merges=("b c", "a b"), pre=pre)
    text = Text.from_gguf(metadata)
    assert [text.tokenizer.token_to_id("<s>"), text.tokenizer.token_to_id("abc")] == text.encode("abc")
    assert text.encode("abc")[1:] == Text.from_gguf(metadata | {KEY + "add_bos_token": False}).encode("abc")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "default", "deepseek-r1-qwen", "gpt-4o"])
def test_others_follow_their_merges_and_begin_with_bos_only_if_the_file_says_so(pre):
    metadata = byte_level(tokens=("ab", "bc", "abc"), merges=("b c", "a b"), pre=pre)
    assert ["a", "bc"] == [Text.from_gguf(metadata).piece(id) for id in Text.from_gguf(metadata).encode("abc")]
    begun = Text.from_gguf(metadata | {KEY + "add_bos_token": True})
    assert ["<s>", "a", "bc"] == [begun.piece(id) for id in begun.encode("abc")]


def test_a_file_without_a_pre_tokenizer_is_of_the_default_kind():
    assert Text.from_gguf(byte_level(pre=None)).encode("ab a") == Text.from_gguf(byte_level(pre="default")).encode("ab a")


SENTENCE = "HelloWorld isn't 12345 über\n\n  x/y //\n"
CUT = {
    "llama-bpe": ["HelloWorld", " isn", "'t", " ", "123", "45", " über", "\n\n", " ", " x", "/y", " //\n"],
    "llama-v3": ["HelloWorld", " isn", "'t", " ", "123", "45", " über", "\n\n", " ", " x", "/y", " //\n"],
    "qwen2": ["HelloWorld", " isn", "'t", " ", "1", "2", "3", "4", "5", " über", "\n\n", " ", " x", "/y", " //\n"],
    "deepseek-r1-qwen": ["HelloWorld", " isn", "'t", " ", "1", "2", "3", "4", "5", " über", "\n\n", " ", " x", "/y", " //\n"],
    "tekken": ["Hello", "World", " isn", "'t", " ", "1", "2", "3", "4", "5", " über", "\n\n", " ", " x", "/y", " //\n"],
    "gpt-4o": ["Hello", "World", " isn't", " ", "123", "45", " über", "\n\n", " ", " x", "/y", " //\n"],
    "gpt-2": ["HelloWorld", " isn", "'t", " 12345", " über", "\n\n ", " x", "/", "y", " //", "\n"],
    "smollm": ["HelloWorld", " isn", "'t", " ", "1", "2", "3", "4", "5", " über", "\n\n ", " x", "/", "y", " //", "\n"],
}


@pytest.mark.parametrize("pre", CUT)
def test_a_text_is_cut_into_words_as_the_model_s_own_tokenizer_cuts_it(pre):
    cut = Text.from_gguf(byte_level(pre=pre)).tokenizer.pre_tokenizer.pre_tokenize_str(SENTENCE)
    assert CUT[pre] == [SENTENCE[begin:end] for _, (begin, end) in cut]


@pytest.mark.parametrize("pre", SPLITS)
def test_qwen_composes_characters_and_no_other_does(pre):
    text = Text.from_gguf(byte_level(pre=pre))
    composed = pre in ("qwen2", "deepseek-r1-qwen")
    assert ("é" if composed else "e\u0301") == text.decode(text.encode("e\u0301"))


def test_sentencepiece_has_its_usual_special_tokens_where_the_file_does_not_say():
    text = Text.from_gguf(sentencepiece())
    assert [1, text.tokenizer.token_to_id("▁ab")] == text.encode("ab")
    assert frozenset({2}) == text.eos_ids


def test_special_tokens_have_their_names_in_templates():
    extra = {"padding_token_id": 3, "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"}
    metadata = byte_level(**extra, eot_token_id=4)
    text = Text.from_gguf(metadata | {"tokenizer.chat_template": extra["chat_template"]})
    assert f"<s></s>{LETTERS[3]}False" == text.decode(text.chat([]), skip_special=False)
    assert frozenset({4, metadata[KEY + "eos_token_id"]}) == text.eos_ids


def test_named_templates_are_found():
    named = {"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t", "tokenizer.chat_templates": ["tool_use"]}
    text = Text.from_gguf(byte_level() | named)
    assert [text.encode("d"), text.encode("t")] == [text.chat([]), text.chat([], tools=[])]


def test_a_bos_token_with_spaces_and_colons_is_put_before_a_text():
    metadata = byte_level(special=("<s>", "</s>", "<|a: b|>"), add_bos_token=True)
    metadata[KEY + "bos_token_id"] = metadata[KEY + "tokens"].index("<|a: b|>")
    assert "<|a: b|>" == Text.from_gguf(metadata).piece(Text.from_gguf(metadata).encode("a")[0])


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"eos_token_id": 9999}, r"tokenizer\.ggml\.eos_token_id is 9999, expected a token id from 0 to 261; correct the file"),
        ({"eos_token_id": -1}, r"eos_token_id is -1"),
        ({"eot_token_id": 262}, r"eot_token_id is 262"),
        ({"bos_token_id": 2**32 - 1}, r"bos_token_id is 4294967295"),
        ({"bos_token_id": "1"}, r"bos_token_id is '1'"),
        ({"padding_token_id": 1.5}, r"padding_token_id is 1\.5"),
        ({"bos_token_id": None, "add_bos_token": True}, r"begin with BOS, and tokenizer\.ggml\.bos_token_id is missing; correct"),
        ({"bos_token_id": None, "pre": "llama-bpe"}, r"bos_token_id is missing"),
        ({"merges": ["a b", "ab"]}, r"tokenizer\.ggml\.merges\[1\] is 'ab', expected two tokens"),
        ({"merges": ["a "]}, r"merges\[0\] is 'a ', expected two tokens"),
        ({"merges": ["a zz"]}, r"merges\[0\] is 'a zz', and 'zz' is not a token"),
        ({"merges": ["b a"]}, r"merges\[0\] is 'b a', and 'ba' is not a token"),
        ({"merges": [7]}, r"tokenizer\.ggml\.merges is not a list of str"),
        ({"merges": 7}, r"tokenizer\.ggml\.merges is not a list of str"),
        ({"tokens": ["a", 1]}, r"tokenizer\.ggml\.tokens is not a list of str"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"token_type": [1, 1]}, r"tokenizer\.ggml\.token_type has 2 entries for 262 tokens"),
        ({"token_type": ["x"] * 262}, r"tokenizer\.ggml\.token_type is not a list of int"),
        ({"pre": "klingon"}, r"'klingon'; supported are .*deepseek-r1-qwen, .*llama-bpe, .*llama-v3, .*qwen2, smollm, tekken"),
        ({"pre": 3}, r"pre-tokenizer is 3"),
    ],
)
def test_what_is_damaged_is_named_by_its_key(extra, says):
    with pytest.raises(TextError, match=says):
        Text.from_gguf(damaged(byte_level(), extra))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"scores": [0.0]}, r"tokenizer\.ggml\.scores has 1 entries for 267 tokens"),
        ({"scores": ["x"] * 267}, r"tokenizer\.ggml\.scores is not a list of float"),
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"unknown_token_id": 999}, r"unknown_token_id is 999"),
        ({"bos_token_id": -5}, r"bos_token_id is -5"),
    ],
)
def test_what_is_damaged_in_sentencepiece_is_named_by_its_key(extra, says):
    with pytest.raises(TextError, match=says):
        Text.from_gguf(damaged(sentencepiece(), extra))


def test_a_call_ends_an_answer_in_channels_and_the_end_of_a_message_does_not():
    special = ("<s>", "</s>", "<|return|>", "<|end|>", "<|call|>")
    first = len(byte_level()[f"{KEY}tokens"]) - 3 + 2
    text = Text.from_gguf(byte_level(special=special, eos_token_id=first, eot_token_id=first + 1))
    assert {"<|return|>", "<|call|>"} == {text.piece(id) for id in text.eos_ids}
