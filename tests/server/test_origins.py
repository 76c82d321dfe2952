"""Pages of other sites: preflights, answers and errors carry the headers that a browser wants to see."""

import pytest

from stallfree.server import origins
from tests.server.conftest import Server

SITE = "https://app.example"
ASKS = {"Origin": SITE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def open_server():
    with Server(api_key="secret", allow_origins=[SITE, "http://localhost:3000"]) as server:
        yield server


def test_a_preflight_needs_no_key(open_server):
    answer = open_server.client.options("/v1/chat/completions", headers=ASKS)
    allowed = {name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert (200, SITE) == (answer.status_code, answer.headers["access-control-allow-origin"])
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= allowed


def test_a_preflight_of_another_site_is_refused(open_server):
    answer = open_server.client.options("/v1/chat/completions", headers=ASKS | {"Origin": "https://evil.example"})
    assert 400 == answer.status_code
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(("key", "status"), [("secret", 200), ("wrong", 401)])
def test_answers_and_errors_carry_the_headers(open_server, key, status):
    answer = open_server.client.get("/v1/models", headers={"Origin": SITE, "x-api-key": key})
    assert (status, SITE) == (answer.status_code, answer.headers["access-control-allow-origin"])
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    assert "origin" in answer.headers["vary"].lower()


def test_a_stream_carries_them_too(open_server):
    headers = {"Origin": "http://localhost:3000", "x-api-key": "secret"}
    answer = open_server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}, headers=headers)
    assert (200, "http://localhost:3000") == (answer.status_code, answer.headers["access-control-allow-origin"])


def test_all_sites_may_be_allowed():
    with Server(allow_origins=["*"]) as server:
        assert "*" == server.client.get("/v1/models", headers={"Origin": SITE}).headers["access-control-allow-origin"]


def test_without_the_option_no_site_is_allowed(server):
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers={"Origin": SITE}).headers


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "http://localhost:3000",
        SITE,
        "http://10.0.0.7:8080",
        "https://[::1]:8443",
        "http://my-host",
        "http://xn--e1afmkfd.example",
    ],
)
def test_what_a_browser_sends_is_an_origin(origin):
    origins.check([origin])


@pytest.mark.parametrize(
    "origin",
    [
        "", "app.example", "https://", "https://app.example/", "https://app.example/page", "ftp://app.example", "https://a b",
        "https://app.example:0", "https://app.example:99999", "https://app.example:", "https://App.example", "https://*.example",
        "null", "https://user@app.example", "https://app.example?x", "https://app.example\n", "https://app.example:443",
        "http://app.example:80",
    ],
)  # fmt: skip
def test_what_is_no_origin_is_refused_by_name(origin):
    with pytest.raises(ValueError) as refused:
        origins.check([SITE, origin])
    assert f"--allow-origin {origin!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("allowed", "status"), [((), 403), (("https://other.example",), 403), (("https://app.example",), 200), (("*",), 200)]
)
def test_what_a_page_of_another_site_sends_is_refused_unless_its_origin_is_allowed(allowed, status):
    with Server(allow_origins=allowed) as server:
        headers = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
        body = b'{"prompt": "a", "max_tokens": 1}'
        assert status == server.client.post("/v1/completions", content=body, headers=headers).status_code
        assert (
            200
            == server.client.post("/v1/completions", content=body, headers=headers | {"Sec-Fetch-Site": "same-origin"}).status_code
        )
