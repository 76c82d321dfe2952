"""Bodies are read alike here and in a helper process. Text that is surely too long is refused before it is tokenised. A process
that dies fails one request."""

import asyncio
import json
import os
import signal

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.text import Text
from stallfree.server import reading
from stallfree.server.errors import ApiError
from stallfree.server.reading import BodyLimits, Reader, read
from stallfree.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.engine.tokenizers import byte_level, sentencepiece

TEXT = bytes_as_text()
LIMITS = BodyLimits(512, 64, False)


def check(name):
    if name not in (None, "toy"):
        raise ApiError(404, f"the model {name!r} is not served here", param="model")


COMPLETION = {"model": "toy", "prompt": "Hello", "max_tokens": 3, "logit_bias": {"5": 1.5}, "stop": ["a"]}


def outcome(call):
    try:
        return call()
    except ApiError as error:
        return error.status, error.message, error.param, error.code


BODIES = [
    (CompletionRequest, COMPLETION),
    (CompletionRequest, {"prompt": ["a", "b"], "n": 2, "echo": True}),
    (CompletionRequest, {"prompt": [1, 2, 3], "echo": True}),
    (CompletionRequest, {"prompt": [1, 99999]}),
    (CompletionRequest, {"prompt": "a", "logit_bias": {"-1": 1}}),
    (CompletionRequest, {"prompt": "a", "max_token": 1}),
    (CompletionRequest, {"prompt": "a", "model": "another"}),
    (CompletionRequest, {"prompt": "a" * 600}),
    (CompletionRequest, {"prompt": ["a"] * 65}),
    (CompletionRequest, [1]),
    (ChatRequest, {"messages": [{"role": "user", "content": "Hello"}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": "b" * 600}]}),
    (ChatRequest, {"messages": [{"content": "x"}]}),
    (TokenizeRequest, {"prompt": "Hello"}),
    (TokenizeRequest, {"messages": [{"role": "user", "content": "Hello"}]}),
    (TokenizeRequest, {}),
    (DetokenizeRequest, {"tokens": [7, 8]}),
    (DetokenizeRequest, {"tokens": [7, -8]}),
]


@pytest.fixture(scope="module")
def reader():
    reader = Reader(TEXT, LIMITS, check)
    yield reader
    reader.close()


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_a_process_reads_what_is_read_here(reader, monkeypatch, kind, body):
    raw = json.dumps(body).encode()
    direct = outcome(lambda: asyncio.run(reader.read(kind, raw)))
    monkeypatch.setattr(reading, "LARGE", 0)
    by_process = outcome(lambda: asyncio.run(reader.read(kind, raw)))
    assert direct == by_process


def test_a_small_body_needs_no_process():
    alone = Reader(TEXT, LIMITS, check)
    request = asyncio.run(alone.read(CompletionRequest, json.dumps(COMPLETION).encode()))
    assert ([(TEXT.encode("Hello"), "")], {5: 1.5}) == (request.prompts, request.bias)
    assert alone._pool is None


def test_what_was_read_of_a_body_does_not_come_back_with_it(reader, monkeypatch):
    monkeypatch.setattr(reading, "LARGE", 0)
    request = asyncio.run(reader.read(CompletionRequest, json.dumps(COMPLETION).encode()))
    assert ("", None) == (request.body.prompt, request.body.logit_bias)


def test_a_process_that_dies_fails_its_request_and_the_next_one_gets_another(monkeypatch):
    monkeypatch.setattr(reading, "LARGE", 0)
    mortal = Reader(TEXT, LIMITS, check)
    raw = json.dumps(COMPLETION).encode()

    async def die():
        await mortal.read(CompletionRequest, raw)
        for pid in list(mortal._pool._processes):
            os.kill(pid, signal.SIGKILL)
        error = None
        while error is None:  # until the pool has noticed
            error = (await asyncio.gather(mortal.read(CompletionRequest, raw), return_exceptions=True))[0]
            error = error if isinstance(error, Exception) else None
        assert isinstance(error, ApiError)
        assert "has died" in error.message
        return await mortal.read(CompletionRequest, raw)

    try:
        assert [(TEXT.encode("Hello"), "")] == asyncio.run(die()).prompts
    finally:
        mortal.close()


@pytest.mark.parametrize(
    "raw", [b"", b"  ", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}", b"null"]
)
def test_what_is_no_json_object_is_a_400(raw):
    assert 400 == outcome(lambda: read(TEXT, LIMITS, CompletionRequest, raw))[0]


def test_a_text_that_is_certain_to_be_too_long_is_not_tokenised(monkeypatch):
    monkeypatch.setattr(Text, "encode", lambda *_, **__: pytest.fail("tokenised"))
    status, message, param, code = outcome(
        lambda: read(TEXT, LIMITS, CompletionRequest, json.dumps({"prompt": "a" * 5000}).encode())
    )
    assert (400, "prompt", "context_length_exceeded") == (status, param, code)
    assert "at least" in message
    assert "at most 511 fit" in message


TEXTS = ["", "a", "hello world " * 50, "ß" * 300, "한국어" * 100, "e\u0301" * 200, "   " * 300, "<|end|>" * 40, "\x00\x01" * 50]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, sentencepiece, lambda: TEXT.tokenizer])
@pytest.mark.parametrize("composing", [False, True])
def test_a_text_has_at_least_as_many_tokens_as_is_told_without_making_them(text, make, composing):
    tokenizer = Tokenizer.from_str(make().to_str())
    if composing:
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *own])
    counter = Text(tokenizer, None, ())
    assert counter.least_tokens(text) <= len(counter.encode(text, special=False))


def words(**how) -> Tokenizer:
    """A tokenizer whose tokens may stand for any number of bytes."""
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", **how))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def dropping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def replacing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace("aaaa", "b")
    return tokenizer


@pytest.mark.parametrize("make", [lambda: words(fuse_unk=True), dropping, stripping, replacing])
def test_where_characters_are_dropped_or_joined_nothing_is_told(make):
    assert 0 == Text(make(), None, ()).least_tokens("a" * 10_000)


def test_of_a_usual_tokenizer_something_is_told():
    assert Text(byte_level(), None, ()).least_tokens("x" * 10_000) > 500
