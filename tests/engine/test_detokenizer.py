"""With every tokenizer, token ids decoded piece by piece give the same text as decoded together."""

import re

import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given

from stallfree.engine.detokenizer import Detokenizer, Pieces
from tests.engine.tokenizers import ALL, BYTES, byte_level, sentencepiece

FALLBACK = sentencepiece()


def streamed(tokenizer, ids, before=()):
    detokenizer = Detokenizer(tokenizer, before)
    return "".join([*[detokenizer.push(id) for id in ids], detokenizer.flush()])


def id_of(token, tokenizer=FALLBACK):
    return tokenizer.token_to_id(token)


def any_ids(tokenizer):
    size = tokenizer.get_vocab_size()
    return st.lists(st.integers(0, size + 5) | st.integers(max(0, size - 16), size - 1), max_size=12)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sentencepiece", "sentencepiece without a prefix")])
@given(st.data())
def test_the_pieces_of_any_ids_are_the_decoding_of_all(name, data):
    ids = data.draw(any_ids(ALL[name]))
    assert ALL[name].decode(ids) == streamed(ALL[name], ids)


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece without a prefix"])
@given(st.data())
def test_the_pieces_of_byte_tokens_are_the_decoding_of_all_where_they_are_characters_or_none_is(name, data):
    """One invalid byte token makes the library reject the whole run of them; here the run's valid characters stay."""
    tokenizer = ALL[name]
    ids = data.draw(any_ids(tokenizer))
    runs = re.findall(r"(?:<0x..>)+", "".join(t for id in ids if (t := tokenizer.id_to_token(id) or "") and t != "<|end|>"))
    for run in runs:
        characters = bytes.fromhex(re.sub("<0x|>", "", run)).decode(errors="replace")
        assume("\ufffd" not in characters or not characters.strip("\ufffd"))
    assert tokenizer.decode(ids) == streamed(tokenizer, ids)


@given(
    st.lists(
        st.sampled_from(["<0x0A>", "<0xDD>", "<0xE2>", "<0x82>", "<0xAC>", "<0x20>", "▁Hello", "a", "</s>", "<|end|>"]), max_size=10
    )
)
@example(["<0x0A>", "<0xDD>", "▁Hello"])
def test_byte_tokens_are_read_as_utf8(tokens):
    text = streamed(FALLBACK, [id_of(token) for token in tokens])
    pieces, octets = [], b""
    for token in tokens:
        if token in BYTES:
            octets += bytes([BYTES.index(token)])
        elif token not in ("<|end|>",):
            pieces.append(octets.decode(errors="replace"))
            pieces.append(token.replace("▁", " "))
            octets = b""
    expected = "".join([*pieces, octets.decode(errors="replace")])
    broken = re.compile("\ufffd+")  # the number of U+FFFD for a broken character does not matter
    assert broken.sub("\ufffd", expected.removeprefix(" ")) == broken.sub("\ufffd", text)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["<0x0A>", "<0xDD>", "▁world"], "\n\ufffd world"),
        (["<0x0A>", "▁world"], "\n world"),
        (["▁Hello", "<0xDD>", "<0xDD>", "▁world"], "Hello\ufffd\ufffd world"),
        (["<0xE2>", "<0x82>", "<0xAC>", "▁world"], "€ world"),
        (["<0x80>", "▁world"], "\ufffd world"),
        (["<0xE2>", "</s>"], "\ufffd</s>"),
        (["<0xE2>", "<|end|>", "<0x82>", "<0xAC>"], "€"),
        (["<|end|>", "▁Hello", "<|end|>", "▁world"], "Hello world"),
        (["▁Hello", "<think>", "▁world"], "Hello<think> world"),
        (["▁", "▁world"], " world"),
        (["<0x20>", "a"], "a"),
        (["<0xF0>", "<0x9F>", "<0x98>"], "\ufffd\ufffd\ufffd"),
        (["�", "�", "a"], "��a"),
    ],
)
def test_named_cases_of_byte_fallback(tokens, text):
    assert text == streamed(FALLBACK, [id_of(token) for token in tokens])


@pytest.mark.parametrize("name", ALL)
def test_ids_that_there_are_not_add_nothing(name):
    ids = [-1, 10**6, 2**31, 2**32, 2**70]
    assert "" == streamed(ALL[name], ids)
    assert [b""] * 5 == [Pieces(ALL[name])[id] for id in ids]


@pytest.mark.parametrize("tokenizer", [FALLBACK, byte_level()])
def test_a_run_of_bytes_that_never_ends_is_not_held_back(tokenizer):
    id = tokenizer.token_to_id("<0x80>") or tokenizer.token_to_id("Ģ")
    detokenizer = Detokenizer(tokenizer)
    assert ["\ufffd"] * 500 == [detokenizer.push(id) for _ in range(500)]


def test_a_piece_is_decoded_with_one_token_of_context_however_long_the_text_is():
    class Counted:
        def __init__(self):
            self.most, self.decoder = 0, FALLBACK.decoder
            self.id_to_token = FALLBACK.id_to_token

        def decode(self, ids, skip_special_tokens):
            self.most = max(self.most, len(ids))
            return FALLBACK.decode(ids, skip_special_tokens=skip_special_tokens)

    counted = Counted()
    streamed(counted, [id_of("▁Hello"), id_of("<0xE2>")] * 200)
    assert 2 == counted.most


@given(st.lists(st.sampled_from(["▁Hello", "▁world", ".", "<|end|>", "<0x0A>", "a"]), min_size=1, max_size=6), st.integers(0, 6))
def test_a_continuation_is_what_the_text_grows_by(tokens, cut):
    ids = [id_of(token) for token in tokens]
    before, after = ids[:cut], ids[cut:]
    assert FALLBACK.decode(ids) == FALLBACK.decode(before) + streamed(FALLBACK, after, before)


@pytest.mark.parametrize(
    ("tokenizer", "token", "octets"),
    [
        (FALLBACK, "<0xE2>", b"\xe2"),
        (FALLBACK, "▁world", b" world"),
        (FALLBACK, "▁", b" "),
        (FALLBACK, "<|end|>", b"<|end|>"),
        (FALLBACK, "<think>", b"<think>"),
        (byte_level(), "ðŁ", b"\xf0\x9f"),
        (byte_level(), "Ġa", b" a"),
        (byte_level(), "<|end|>", b"<|end|>"),
        (ALL["words"], "world", b" world"),
        (ALL["word pieces"], "##ing", b"ing"),
    ],
)
def test_a_token_has_its_true_bytes(tokenizer, token, octets):
    assert octets == Pieces(tokenizer)[tokenizer.token_to_id(token)]
