"""Token ids are checked against the model's vocabulary, which may be smaller or larger than its tokenizer's."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from stallfree.engine.text import Text
from tests.engine.tokenizers import byte_level
from tests.server.conftest import LETTERS, Server
from tests.server.test_bad_input import CHAT, COMPLETIONS, error_of

SIZE = 260
"""Embeddings: those of the letters and of their merges, and none of the added tokens <|end|> (260) and <think> (261)."""


@pytest.fixture(scope="module")
def server():
    text = Text(byte_level(), "{% for m in messages %}{{ m.content }}{% endfor %}", (260, 2**40, -1), vocab_size=SIZE)
    with Server(text=text) as running:
        yield running
        running.settled()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a<|end|>"}, "prompt"),
        ({"prompt": ["a", "b<think>"]}, "prompt[1]"),
        ({"prompt": [1, 260]}, "prompt[1]"),
        ({"prompt": [[1], [261]], "echo": True}, "prompt[1][0]"),
        ({"prompt": [-1], "echo": True}, "prompt[0]"),
        ({"logit_bias": {"260": 5}}, 'logit_bias["260"]'),
        ({"logit_bias": {"261": -100}, "min_tokens": 2}, 'logit_bias["261"]'),
        ({"stop_token_ids": [260]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [3, 261], "min_tokens": 2}, "stop_token_ids[1]"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]"),
    ],
)
def test_what_the_model_lacks_is_refused_though_the_tokenizer_has_it(server, fields, param):
    error = error_of(server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2} | fields), 400)
    assert param == error["param"]
    assert "outside the vocabulary (0 to 259)" in error["message"]


def test_a_conversation_with_a_token_that_the_model_lacks_is_refused_by_its_name(server):
    error = error_of(server.post(CHAT, {"messages": [{"role": "user", "content": "a<think>"}]}), 400)
    assert "messages" == error["param"]
    assert "'<think>'" in error["message"]


def test_end_tokens_that_the_model_lacks_are_dropped(server):
    assert frozenset() == server.engine.text.eos_ids
    assert 200 == server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 3, "min_tokens": 3}).status_code


def test_ids_that_only_the_model_has_are_served():
    with Server(text=Text(byte_level(), None, (), vocab_size=300)) as server:
        body = {"prompt": [1, 299], "max_tokens": 2, "logit_bias": {"299": 1}, "stop_token_ids": [299], "echo": True}
        assert 200 == server.post(COMPLETIONS, body).status_code


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_text_that_has_no_tokens_is_refused(path):
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(LETTERS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with Server(text=Text(tokenizer, "{{ messages[0].content }}", ())) as server:
        body = {"prompt": "é"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "é"}]}
        error = error_of(server.post(path, body), 400)
        assert ("prompt" if path == COMPLETIONS else "messages") == error["param"]
        assert "the model's tokenizer refuses this text: WordLevel error: Missing [UNK] token" in error["message"]
