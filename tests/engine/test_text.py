"""Text and tokens: templates, streams that never emit half a character, stop strings that never leak."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.detokenizer import Detokenizer, StopStrings
from stallfree.engine.text import Text, TextError

TEXT = bytes_as_text()


@given(st.text(max_size=30))
@example("é🤗 ß")
def test_the_pieces_together_are_the_text_and_each_is_whole_characters(text):
    detokenizer = Detokenizer(TEXT.tokenizer)
    pieces = [detokenizer.push(id) for id in TEXT.encode(text)]
    assert text == "".join([*pieces, detokenizer.flush()])
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_half_a_character_at_the_end_is_flushed_as_a_replacement():
    detokenizer = Detokenizer(TEXT.tokenizer)
    assert ["", ""] == [detokenizer.push(id) for id in TEXT.encode("🤗")[:2]]
    assert "\ufffd" in detokenizer.flush()


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_wherever_it_is_cut(pieces, stops):
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    filter = StopStrings(stops)
    out, stopped = "", None
    for piece in pieces:
        new, stopped = filter.push(piece)
        out += new
        if stopped is not None:
            break
    if ends:
        assert text[: min(ends)[1]] == out
        assert stopped in stops
    else:
        assert (text, None) == (out + filter.flush(), stopped)


def test_a_partial_stop_string_is_held_back():
    filter = StopStrings(["END"])
    assert ["a", "", "ENx"] == [filter.push(piece)[0] for piece in ("aE", "N", "x")]


def test_a_stop_string_can_be_included():
    assert ("aEND", "END") == StopStrings(["END"], include=True).push("aENDb")


def gguf(**extra):
    tokens = ["<s>", "</s>", "a", "b", "ab", "Ġ", "1"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1], "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.bos_token_id": 0,
    } | extra  # fmt: skip


def test_a_byte_level_gguf_tokenizer_merges_and_knows_its_special_tokens():
    text = Text.from_gguf(gguf())
    assert [4, 5, 6, 6, 1] == text.encode("ab 11</s>")
    assert "ab 11" == text.decode([4, 5, 6, 6, 1])
    assert frozenset({1}) == text.eos_ids


def test_bos_is_added_when_the_file_says_so():
    text = Text.from_gguf(gguf(**{"tokenizer.ggml.add_bos_token": True}))
    assert [[0, 4], [4]] == [text.encode("ab"), text.encode("ab", special=False)]


def test_a_sentencepiece_gguf_tokenizer_merges_by_score_and_falls_back_to_bytes():
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, "▁", "a", "b", "▁a", "ab", "▁ab"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -3.0, -2.0]
    text = Text.from_gguf({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    })  # fmt: skip
    assert [1, tokens.index("▁ab"), tokens.index("▁a")] == text.encode("ab a")
    assert "ab é" == text.decode(text.encode("ab é"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv'"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon'"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.chat_template": "{% if %}"}, "does not parse"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(change, says):
    with pytest.raises(TextError, match=says):
        Text.from_gguf(gguf(**change))


def test_a_conversation_goes_through_the_template():
    text = Text.from_gguf(gguf(**{"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}))
    assert [4, 1, 2, 1] == text.chat([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a"}])


def test_messages_that_the_template_refuses_say_so():
    text = Text.from_gguf(gguf(**{"tokenizer.chat_template": "{{ raise_exception('roles must alternate') }}"}))
    with pytest.raises(TextError, match="roles must alternate"):
        text.chat([])


def test_a_template_cannot_reach_into_python():
    text = Text.from_gguf(gguf(**{"tokenizer.chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}))
    with pytest.raises(TextError, match="refuses"):
        text.chat([])


def test_a_model_without_a_template_cannot_chat():
    with pytest.raises(TextError, match="no chat template"):
        Text.from_gguf(gguf()).chat([])


def test_a_folder_is_read_with_all_of_its_end_tokens(tmp_path):
    Text.from_gguf(gguf()).tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "chat_template": "{{ messages[0].content }}"})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    text = Text.from_folder(tmp_path)
    assert frozenset({1, 3}) == text.eos_ids
    assert [4] == text.chat([{"role": "user", "content": "ab"}])


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(TextError, match=r"no tokenizer\.json"):
        Text.from_folder(tmp_path)


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TextError, match=r"tokenizer\.json"):
        Text.from_folder(tmp_path)


LONG = "ab " * 40


@pytest.mark.parametrize(
    "enable",
    [
        lambda t: t.enable_truncation(8),
        lambda t: t.enable_truncation(8, stride=2, strategy="only_first", direction="left"),
        lambda t: t.enable_padding(length=512, pad_id=1, pad_token="</s>"),
        lambda t: t.enable_padding(pad_to_multiple_of=64, direction="left"),
        lambda t: (t.enable_truncation(8), t.enable_padding(length=8)),
    ],
)
def test_a_prompt_is_neither_cut_nor_filled_up_whatever_the_file_says(tmp_path, enable):
    tokenizer = Text.from_gguf(gguf()).tokenizer
    expected = tokenizer.encode(LONG).ids
    enable(tokenizer)
    assert expected != tokenizer.encode(LONG).ids
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}", "model_max_length": 8}')
    text = Text.from_folder(tmp_path)
    assert expected == text.encode(LONG) == text.encode(LONG, control=False)
    assert expected == text.chat([{"role": "user", "content": LONG}])
    assert expected == text.chat([{"role": "user", "content": LONG}], control=False)
