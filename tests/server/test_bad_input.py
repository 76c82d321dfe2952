"""Whatever is wrong with a request, the answer is an error object with the right status that names the field."""

import json

import pytest

from tests.server.conftest import Server

HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def error_of(response, status):
    assert status == response.status_code, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("max_tokens", 5000),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", 5000),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -1),
        ("n", 0),
        ("n", 1000),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"1": 1000}),
        ("logit_bias", [1]),
        ("seed", 1.5),
        ("seed", 2**70),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 257),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [256]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("top_logprobs", 2),
        ("priority", "high"),
        ("slo", "fast"),
        ("slo", {"tbt_ms": "100"}),
        ("slo", {"tbt_ms": 0}),
        ("slo", {"ttft_ms": -5}),
        ("slo", {"tbt_ms": 1e9}),
        ("slo", {"tbt_ms": 100, "tpot_ms": 100}),
        ("user", 7),
        ("cache_salt", "s" * 1_000_000),
        ("messages", []),
        ("messages", "hello"),
        ("messages", None),
        ("messages", [{"role": "king", "content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "user", "content": "x" * 3000}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("x" * 100_000, 1),
        ("functions", [{"name": "f"}]),
        ("prediction", {"type": "content", "content": "a"}),
        ("response_format", {"type": "json_object"}),
        ("audio", {}),
        ("modalities", ["text", "audio"]),
        ("best_of", 3),
        ("temprature", 1),
        ("no_such_field", 1),
    ],
)
def test_a_chat_with_a_wrong_field_is_refused_by_its_name(server, field, value):
    body = {"model": "toy", "messages": HELLO} | {field: value}
    error = error_of(server.client.post(CHAT, content=json.dumps(body)), 400)
    assert (field[:80], "invalid_request_error") == (top(error), error["type"])
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", ""]),
        ("prompt", [-1]),
        ("prompt", [[256]]),
        ("prompt", [1, "a"]),
        ("prompt", [True]),
        ("prompt", None),
        ("prompt", {}),
        ("prompt", "x" * 3000),
        ("suffix", "end"),
        ("logprobs", 21),
        ("logprobs", True),
        ("best_of", 2),
    ],
)
def test_a_completion_with_a_wrong_field_is_refused_by_its_name(server, field, value):
    assert field == top(error_of(server.post(COMPLETIONS, {"prompt": "a", field: value}), 400))


SAID = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("route", "fields", "where"),
    [
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [SAID, SAID, {"role": 3, "content": "x"}]}, "messages[2].role"),
        (CHAT, {"messages": [SAID, "hello"]}, "messages[1]"),
        (CHAT, {"messages": [SAID, {"role": "king", "content": "x"}, {"content": [{}]}]}, "messages[1].role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [SAID, {"role": "user"}]}, "messages[1].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}, {"type": 7}]}]}, "messages[0].content[1].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [SAID | {"nmae": "x"}]}, "messages[0].nmae"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0].function"),
        (CHAT, {"messages": [SAID | {"name": "\ud800"}]}, "messages[0].name"),
        (CHAT, {"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        (CHAT, {"stream": True, "stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
        (CHAT, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (CHAT, {"slo": {"tbt_ms": "100"}}, "slo.tbt_ms"),
        (CHAT, {"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
        (CHAT, {"logit_bias": {"11": 0, "12": 1000}}, 'logit_bias["12"]'),
        (CHAT, {"logit_bias": {"999999": 1}}, 'logit_bias["999999"]'),
        (CHAT, {"logit_bias": {"12": "x"}}, 'logit_bias["12"]'),
        (CHAT, {"stop": ["a", "b", "c", ""]}, "stop[3]"),
        (CHAT, {"stop": ["a", 4, "c"]}, "stop[1]"),
        (CHAT, {"stop": {}}, "stop"),
        (CHAT, {"stop_token_ids": [1, 2, "x"]}, "stop_token_ids[2]"),
        (CHAT, {"stop_token_ids": [1, 256]}, "stop_token_ids[1]"),
        (COMPLETIONS, {"prompt": ["a", 3]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [1, 2, "a", 3]}, "prompt[2]"),
        (COMPLETIONS, {"prompt": [[1], [2, "a"]]}, "prompt[1][1]"),
        (COMPLETIONS, {"prompt": [1, 256]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], [2, 256]]}, "prompt[1][1]"),
        (COMPLETIONS, {"prompt": ["a", "\ud800"]}, "prompt[1]"),
        ("/detokenize", {"tokens": [1, None]}, "tokens[1]"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}, {}]}, "messages[1].role"),
    ],
)
def test_what_is_wrong_within_a_field_is_named_by_its_whole_path(server, route, fields, where):
    body = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "a"}}.get(route, {}) | fields
    error = error_of(server.client.post(route, content=json.dumps(body)), 400)
    assert where == error["param"]
    assert where in error["message"]


def top(error: dict) -> str:
    """The body's top-level field that has the error."""
    return error["param"].partition("[")[0].partition(".")[0]


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_none_are_refused(server, field, constant):
    body = f'{{"prompt": "a", "{field}": {constant}}}'
    assert field == error_of(server.client.post(COMPLETIONS, content=body), 400)["param"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": "x"}}',
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
        b"\x00",
    ],
)
def test_a_body_that_is_no_json_object_or_no_text_is_refused(server, body):
    error_of(server.client.post(COMPLETIONS, content=body), 400)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        (b"\x1f\x8b\x08\x00 packed", "not UTF-8 at byte 1"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "a number of more than 4,300 digits"),
        (b'{"prompt": "a",}', "not JSON: "),
    ],
    ids=["not text", "packed", "deep", "a long number", "a comma"],
)
def test_why_a_body_cannot_be_read_is_said(server, body, says):
    error = error_of(server.client.post(COMPLETIONS, content=body), 400)
    assert says in error["message"]
    assert "invalid_json" == error["code"]


@pytest.mark.parametrize(
    ("stop", "says"), [("", "stop: a stop string needs at least one character, not ''"), (["a", ""], "stop[1]: a stop")]
)
def test_an_empty_stop_string_is_named_as_that(server, stop, says):
    assert error_of(server.post(COMPLETIONS, {"prompt": "a", "stop": stop}), 400)["message"].startswith(says)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "logprobs"),
        ({"n": 100, "prompt": ["a", "b", "c"]}, "n"),
        ({"prompt": ["a"] * 100_000}, "prompt"),
    ],
)
def test_fields_at_odds_are_refused(server, fields, param):
    assert param == error_of(server.post(COMPLETIONS, {"prompt": "a"} | fields), 400)["param"]


@pytest.mark.parametrize(("prompt", "code"), [("x" * 3000, "context_length_exceeded"), ("", None)])
def test_a_prompt_beyond_the_context_has_a_code_of_its_own(server, prompt, code):
    assert code == error_of(server.post(COMPLETIONS, {"prompt": prompt}), 400)["code"]


def test_two_limits_that_differ_are_refused(server):
    body = {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}
    assert "max_tokens" == error_of(server.post(CHAT, body), 400)["param"]


def test_a_misspelt_field_is_answered_with_the_nearest_known_one(server):
    assert "'temperature'" in error_of(server.post(COMPLETIONS, {"prompt": "a", "temprature": 1}), 400)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none", "parallel_tool_calls": False},
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [], "annotations": [], "function_call": None}]},
        {"response_format": {"type": "text"}},
        {"temperature": None, "max_tokens": 1, "stop": None},
        {"store": False, "metadata": {"a": "b"}},
        {"best_of": 1},
        {"top_k": -1},
        {"temperature": 1},
        {"no_such_field": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(server, fields):
    assert 200 == server.post(CHAT, {"messages": HELLO, "max_tokens": 1} | fields).status_code


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
def test_a_model_that_is_not_served_is_not_found(server, path):
    body = {"model": "gpt-9", "prompt": "a"} if path != CHAT else {"model": "gpt-9", "messages": HELLO}
    error = error_of(server.post(path, body), 404)
    assert ("model_not_found", "model") == (error["code"], error["param"])


def test_routes_and_methods_that_there_are_not_answer_with_error_objects(server):
    error_of(server.client.get("/v1/nothing"), 404)
    error_of(server.client.get("/v1/models/"), 404)
    error = server.client.get(CHAT)
    error_of(error, 405)
    assert "POST" == error.headers["allow"]
    error_of(server.client.get("/v1/nothing", headers={"Host": "[::1"}), 404)
    error_of(server.client.get("/%ff%00%0d%0a"), 404)


def test_the_content_type_does_not_matter(server):
    for type_ in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "\x01;;"}):
        assert 200 == server.client.post(COMPLETIONS, content='{"prompt": "a"}', headers=type_).status_code


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, chunked):
    def pieces():
        for _ in range(10):
            yield b" " * 2**20

    response = server.client.post(COMPLETIONS, content=pieces() if chunked else b" " * 10 * 2**20)
    assert "body_too_large" == error_of(response, 413)["code"]


def test_a_request_id_comes_back_clean_and_short(server):
    assert "my-id" == server.client.get("/health", headers={"X-Request-Id": "my-id"}).headers["x-request-id"]
    assert "x" * 128 == server.client.get("/nothing", headers={"X-Request-Id": "x" * 1000}).headers["x-request-id"]
    assert "ab" == server.client.get("/health", headers={"X-Request-Id": b"a \xe4\tb"}).headers["x-request-id"]
    assert 32 == len(server.client.get("/health", headers={"X-Request-Id": b"\xe4"}).headers["x-request-id"])


def test_tokenize_and_detokenize_undo_each_other(server):
    tokens = server.post("/tokenize", {"prompt": "Grüße"}).json()
    assert (7, 2048) == (tokens["count"], tokens["max_model_len"])
    assert {"prompt": "Grüße"} == server.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    chat = server.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    assert "user: hello\n" == server.post("/detokenize", {"tokens": chat}).json()["prompt"]
    error_of(server.post("/tokenize", {"prompt": "a", "messages": HELLO}), 400)
    assert "tokens[0]" == error_of(server.post("/detokenize", {"tokens": [300]}), 400)["param"]


def test_with_a_key_every_route_but_health_and_the_page_s_files_wants_it():
    with Server(api_key="sësame") as server:
        groups = [getattr(route, "original_router", None) for route in server.app.routes]
        routes = [route for group in groups if group is not None for route in group.routes]
        routes += [route for route in server.app.routes if hasattr(route, "methods")]
        routes = {(method, route.path) for route in routes for method in route.methods - {"HEAD"}}
        health = {("GET", path) for path in ("/health", "/health/live", "/health/ready")}
        open_ = health | {("GET", "/"), ("GET", "/live/{name:path}")}
        assert open_ < routes
        for method, path in [*sorted(routes - open_), ("GET", "/nothing")]:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": b"Bearer \xff"},
                {"Authorization": "sësame".encode()},
            ):
                response = server.client.request(method, path, headers=headers)
                if path.startswith("/v1/messages"):  # errors in Anthropic's form
                    assert (401, "authentication_error") == (response.status_code, response.json()["error"]["type"])
                else:
                    assert "invalid_api_key" == error_of(response, 401)["code"]
                assert "Bearer" == response.headers["www-authenticate"]
        assert 200 == server.client.get("/health").status_code
        assert 200 == server.client.get("/v1/models", headers={"Authorization": "Bearer sësame".encode()}).status_code
