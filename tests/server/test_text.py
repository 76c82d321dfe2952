"""Text as clients see it: leading spaces, bytes of tokens, offsets, stops, and control tokens in what they write."""

import json

import pytest

from stallfree.engine.text import Text
from tests.engine.tokenizers import byte_level, sentencepiece
from tests.server.conftest import Server
from tests.server.test_bad_input import CHAT, COMPLETIONS

TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|><think>{% endfor %}"


class Says:
    """A server whose model answers every prompt with these tokens, repeated."""

    def __init__(self, tokenizer, template=TEMPLATE, **options):
        self.text = Text(tokenizer, template, [tokenizer.token_to_id("</s>") or -1])
        self.server = Server(text=self.text, **options)

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *_):
        self.server.settled()
        self.server.__exit__()

    def ids(self, *tokens):
        return [self.text.tokenizer.token_to_id(token) for token in tokens]

    def post(self, path, prompt, *tokens, **fields):
        """The first choice, where the model says `tokens` after the prompt."""
        ids = self.ids(*tokens)
        body = {"messages": prompt} if path == CHAT else {"prompt": prompt}
        question = {"messages": prompt} if path == CHAT else {"prompt": prompt} if isinstance(prompt, str) else None
        count = len(prompt) if question is None else self.server.post("/tokenize", question).json()["count"]
        # The simulated model says the letter at the position modulo their number.
        self.server.executor._letters = ids[-(count % len(ids)) :] + ids[: -(count % len(ids))] if count % len(ids) else ids
        answer = self.server.post(path, {"max_tokens": len(ids), **body, **fields})
        assert 200 == answer.status_code, answer.text
        return answer.json()["choices"][0]


@pytest.fixture(scope="module")
def llama():
    with Says(sentencepiece()) as says:
        yield says


@pytest.fixture(scope="module")
def qwen():
    with Says(byte_level()) as says:
        yield says


USER = [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize("prompt", ["ab", " ab", "ab ", "  ab", "é", "ab\n", "ab<|end|>"])
@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_continues_its_prompt_with_the_space_of_its_first_word(llama, prompt, echo):
    choice = llama.post(COMPLETIONS, prompt, "▁world", ".", echo=echo)
    assert f"{prompt if echo else ''} world." == choice["text"]


def test_a_completion_of_nothing_begins_without_a_space(llama):
    assert "world ab" == llama.post(COMPLETIONS, llama.ids("<|end|>"), "▁world", "▁ab")["text"]


def test_a_prompt_that_ends_within_a_character_does_not_leak(llama):
    choice = llama.post(COMPLETIONS, llama.ids("▁Hello", "<0xE2>"), "<0x82>", "<0xAC>", "▁world")
    assert "\ufffd\ufffd world" == choice["text"]


@pytest.mark.parametrize(
    "tokens",
    [
        ["<0x0A>", "<0xDD>", "▁world"],
        ["<0xDD>", "</s>", "<0xE2>", "▁ab"],
        ["<0xFF>"] * 9,
        ["<|end|>", "<0xE2>", "<|end|>", "<unk>", "<0x0A>"],
    ],
)
def test_bytes_that_are_no_characters_end_no_request_and_no_engine(llama, tokens):
    for path, prompt in ((COMPLETIONS, "ab"), (CHAT, USER)):
        assert (
            "length"
            == llama.post(path, prompt, *tokens, ignore_eos=True, logprobs=1 if path == COMPLETIONS else True)["finish_reason"]
        )
    assert 200 == llama.server.client.get("/health").status_code


def test_a_prompt_of_ids_is_echoed_as_its_text(llama):
    assert "Hello. world" == llama.post(COMPLETIONS, llama.ids("▁Hello", "."), "▁world", echo=True)["text"]


def test_an_answer_in_a_chat_begins_without_a_space(llama):
    assert "world ab" == llama.post(CHAT, USER, "▁world", "▁ab")["message"]["content"]


@pytest.mark.parametrize(
    ("tokens", "octets"),
    [
        (["▁world", "▁", "<0xE2>", "<0x82>", "<0xAC>", "."], [b" world", b" ", b"\xe2", b"\x82", b"\xac", b"."]),
        (["<0x0A>", "é", "<think>", "<|end|>"], [b"\n", "é".encode(), b"<think>", b"<|end|>"]),
    ],
)
def test_log_probabilities_have_the_true_bytes(llama, tokens, octets):
    content = llama.post(CHAT, USER, *tokens, logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert octets == [bytes(entry["bytes"]) for entry in content]
    assert [piece.decode(errors="replace") for piece in octets] == [entry["token"] for entry in content]
    assert all(isinstance(other["bytes"], list) for entry in content for other in entry["top_logprobs"])


def test_bytes_of_byte_level_tokens_are_true_too(qwen):
    content = qwen.post(CHAT, USER, "Ġa", "ðŁ", "ĺ", "Ģ", logprobs=True)["logprobs"]["content"]
    assert [b" a", b"\xf0\x9f", b"\x98", b"\x80"] == [bytes(entry["bytes"]) for entry in content]
    assert "😀" == b"".join(bytes(entry["bytes"]) for entry in content[1:]).decode()


@pytest.mark.parametrize("echo", [None, False])
@pytest.mark.parametrize(
    "tokens",
    [
        ["▁world", ".", "▁ab", "▁"],
        ["<0xE2>", "<0x82>", "<0xAC>", "▁world", "<|end|>", "é", "."],
        ["▁Hello", "<0xDD>", "▁world", "<think>"],
    ],
)
def test_offsets_are_where_tokens_stand_in_the_text(llama, tokens, echo):
    choice = llama.post(COMPLETIONS, "ab", *tokens, logprobs=1, echo=echo)
    text, logprobs = choice["text"], choice["logprobs"]
    assert len(tokens) == len(logprobs["text_offset"]) == len(logprobs["tokens"])
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if "\ufffd" not in token and token != "<|end|>":
            assert token == text[offset : offset + len(token)]


def test_stop_strings_wait_for_min_tokens(llama):
    tokens = ["▁ab", ".", "▁ab", ".", "▁ab", ".", "▁ab"]
    for least, expected in ((0, " ab"), (2, " ab"), (3, " ab. ab"), (5, " ab. ab. ab"), (7, " ab. ab. ab. ab")):
        assert expected == llama.post(COMPLETIONS, "a", *tokens, stop=".", min_tokens=least)["text"]


def test_a_stop_string_that_ends_behind_min_tokens_counts(llama):
    choice = llama.post(COMPLETIONS, "a", "▁ab", ".", "▁Hello", "▁world", "▁ab", stop=[". Hello"], min_tokens=2)
    assert (" ab", "stop", ". Hello") == (choice["text"], choice["finish_reason"], choice["stop_reason"])


@pytest.mark.parametrize("stop", ["▁world", ".", "<|end|>", "<think>", "<0xE2>"])
def test_the_text_of_a_stop_token_is_included_where_that_is_asked(llama, stop):
    (id,) = llama.ids(stop)
    fields = {"stop_token_ids": [id], "max_tokens": 9}
    assert "ab" == llama.post(CHAT, USER, "▁ab", stop, **fields)["message"]["content"]
    choice = llama.post(CHAT, USER, "▁ab", stop, **fields, include_stop_str_in_output=True)
    shown = {"▁world": " world", "<0xE2>": "\ufffd"}.get(stop, stop)
    assert (f"ab{shown}", "stop", id) == (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"])


def test_the_model_s_own_end_is_not_included(llama):
    choice = llama.post(CHAT, USER, "▁ab", "</s>", max_tokens=9, include_stop_str_in_output=True)
    assert ("ab", "stop") == (choice["message"]["content"], choice["finish_reason"])


WRITTEN = ["a<|end|>b", "<|end|><|end|>", "a<think>b", "<<|end|>", "<|end|<|end|>|>", "<|end|>" * 9]


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("model", ["llama", "qwen"])
def test_control_tokens_in_messages_can_be_text_while_those_of_the_template_are_not(request, model, written):
    says = request.getfixturevalue(model)
    end, think = says.ids("<|end|>", "<think>")
    messages = [{"role": "user", "content": written}]

    def tokens(**fields):
        return says.server.post("/tokenize", {"messages": messages} | fields).json()["tokens"]

    recognised, text = tokens(), tokens(sanitize_control_tokens=True)
    assert recognised == tokens(sanitize_control_tokens=False)
    assert written.count("<|end|>") + 1 == recognised.count(end)
    assert ([end, think], 1, 1) == (text[-2:], text.count(end), text.count(think))
    assert f"{written}<|end|><think>" == says.text.decode(text, skip_special=False)


@pytest.mark.parametrize("written", WRITTEN[:2])
def test_control_tokens_in_a_prompt_can_be_text(qwen, written):
    (end,) = qwen.ids("<|end|>")
    usual = qwen.server.post("/tokenize", {"prompt": written}).json()["tokens"]
    text = qwen.server.post("/tokenize", {"prompt": written, "sanitize_control_tokens": True}).json()["tokens"]
    assert end in usual
    assert end not in text
    assert written == qwen.text.decode(text)
    body = {"prompt": written, "max_tokens": 1, "echo": True, "sanitize_control_tokens": True}
    answer = qwen.server.post(COMPLETIONS, body).json()
    assert len(text) == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["text"].startswith(written)


def test_a_server_can_take_control_tokens_for_text_unless_a_request_says_otherwise():
    with Says(byte_level(), sanitize_control_tokens=True) as says:
        (end,) = says.ids("<|end|>")
        for fields, expected in (
            ({}, False),
            ({"sanitize_control_tokens": None}, False),
            ({"sanitize_control_tokens": False}, True),
        ):
            tokens = says.server.post("/tokenize", {"prompt": "a<|end|>"} | fields).json()["tokens"]
            assert expected == (end in tokens)
        usage = says.server.post(CHAT, {"messages": [{"role": "user", "content": "<|end|>"}], "max_tokens": 1}).json()["usage"]
        assert len("<|end|>") + 2 == usage["prompt_tokens"]


def test_text_without_control_tokens_is_the_same_either_way(qwen):
    for prompt in ("Grüße, 😀 <|en d|> x" + json.dumps({"a": 1}), "", "\n\n"):
        body = {"prompt": prompt}
        assert (
            qwen.server.post("/tokenize", body).json()
            == qwen.server.post("/tokenize", body | {"sanitize_control_tokens": True}).json()
        )
