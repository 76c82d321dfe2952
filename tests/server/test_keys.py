"""Several API keys: the file that holds them, the headers that carry them, and what is refused by line."""

import hmac
from hashlib import sha256

import pytest

from stallfree.server import keys as module
from stallfree.server.errors import ApiError
from stallfree.server.keys import Keys, open_to_others
from tests.server.conftest import Server

SECRET = "sk-9f3c"


def file_of(tmp_path, text: str | bytes):
    file = tmp_path / "keys"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o600)
    return file


def scope(**headers: str) -> dict[str, object]:
    return {"headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]}


def test_a_file_has_keys_comments_and_digests(tmp_path):
    digest = sha256(b"second").hexdigest().upper()
    keys = Keys.of(None, file_of(tmp_path, f"# our clients\n\nweb: first\r\n  batch:sha256={digest}\nodd:a:b#c\n"))
    found = [keys.check(scope(authorization=f"Bearer {key}")) for key in ("first", "second", "a:b#c")]
    assert ["web", "batch", "odd"] == found


def test_the_key_of_the_command_line_is_one_more(tmp_path):
    keys = Keys.of("third", file_of(tmp_path, "web:first"))
    assert ["web", "default"] == [keys.check(scope(x_api_key=key)) for key in ("first", "third")]


def test_without_keys_none_is_needed():
    keys = Keys.of(None)
    assert not keys
    assert keys.check(scope()) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first"},
        {"authorization": "bearer  first"},
        {"x_api_key": "first"},
        {"authorization": "Bearer placeholder", "x_api_key": "first"},
        {"authorization": "Basic dTpw", "x_api_key": "first"},
    ],
)
def test_either_header_counts(headers):
    assert "default" == Keys.of("first").check(scope(**headers))


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "missing"),
        ({"authorization": "Bearer "}, "wrong"),
        ({"authorization": "first"}, "wrong"),
        ({"authorization": "Bearer firs"}, "wrong"),
        ({"x_api_key": "first2"}, "wrong"),
        ({"x_api_key": ""}, "wrong"),
    ],
)
def test_what_is_no_key_is_refused(headers, says):
    with pytest.raises(ApiError, match=says) as refused:
        Keys.of("first").check(scope(**headers))
    assert (401, "invalid_api_key") == (refused.value.status, refused.value.code)


def test_every_key_is_compared_with_every_digest(monkeypatch, tmp_path):
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return hmac.compare_digest(one, other)

    keys = Keys.of(None, file_of(tmp_path, "a:1\nb:2\nc:3"))
    monkeypatch.setattr(module, "hmac", type("Counted", (), {"compare_digest": staticmethod(compare)}))
    assert "a" == keys.check(scope(x_api_key="1"))
    assert {sha256(key).digest() for key in (b"1", b"2", b"3")} == set(compared)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no keys"),
        ("# nothing\n\n", "has no keys"),
        (f"a:1\n{SECRET}", "line 2: there is no colon"),
        (f"a b:{SECRET}", "line 1: the name before the colon"),
        (f":{SECRET}", "line 1: the name before the colon"),
        ("a:", "line 1: 'a' has no key"),
        (f"a:1\n\na:{SECRET}", "line 3: the name 'a' is there twice"),
        (f"a:{SECRET}\nb:{SECRET}", "line 2: 'b' has the key of an earlier line"),
        (f"a:{SECRET} or so", "line 1: the key of 'a' has a space"),
        (f"a:sha256={SECRET}", "line 1: after sha256= of 'a' there are not 64 hex digits"),
        (f"a:sha256={'0' * 63}g", "line 1: after sha256="),
        (f"default:{SECRET}", "has a key named 'default'"),
        (b"a:\xff\xfe", "is not UTF-8 text at byte 2"),
    ],
)
def test_a_bad_file_is_refused_by_line_without_its_secrets(tmp_path, text, says):
    file = file_of(tmp_path, text)
    with pytest.raises(ValueError, match=says) as refused:
        Keys.of("x", file)
    assert str(file) in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_file_that_is_not_there_and_an_empty_key_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--api-key-file .*nowhere cannot be read: No such file.*; name a file"):
        Keys.of(None, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--api-key is empty"):
        Keys.of("")


@pytest.mark.parametrize(("mode", "expected"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True), (0o602, True)])
def test_a_file_is_open_to_others_by_its_mode(tmp_path, mode, expected):
    file = file_of(tmp_path, "a:1")
    file.chmod(mode)
    assert expected == open_to_others(file)


def test_a_server_takes_each_of_its_keys(tmp_path):
    with Server(keys=Keys.of("third", file_of(tmp_path, "web:first\nbatch:second"))) as server:
        for headers in ({"Authorization": "Bearer first"}, {"x-api-key": "second"}, {"x-api-key": "third"}):
            assert 200 == server.client.get("/v1/models", headers=headers).status_code
        refused = server.client.get("/v1/models", headers={"x-api-key": "fourth"})
        assert (401, "Bearer") == (refused.status_code, refused.headers["www-authenticate"])
