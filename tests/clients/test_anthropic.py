"""Anthropic's SDK: messages, streams, tools, parsed answers, thinking, and its tool runner."""

from typing import Literal

import pytest

anthropic = pytest.importorskip("anthropic")

from tests.clients.conftest import CALL, FINAL, KEY, MAX_TOKENS, MODEL, PARAMETERS, QUESTION, USER, City  # noqa: E402

TOOL = {"name": "get_weather", "description": "The weather in a city.", "input_schema": PARAMETERS}
FIELDS = {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": USER}


def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


def test_a_message_is_whole_and_streamed(scripted):
    scripted.executor.script = FINAL
    with client(scripted) as sdk:
        message = sdk.messages.create(**FIELDS, system="Be brief.")
        with sdk.messages.stream(**FIELDS, system="Be brief.") as stream:
            assert FINAL == "".join(stream.text_stream)
        assert (FINAL, message.usage.output_tokens) == (message.content[0].text, stream.get_final_message().usage.output_tokens)


def test_a_tool_is_used_and_its_result_answered(caller):
    with client(caller) as sdk:
        message = sdk.messages.create(**FIELDS, tools=[TOOL])
        (use,) = message.content
        assert ("tool_use", {"city": "Rome"}) == (message.stop_reason, use.input)
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny", "cache_control": {"type": "ephemeral"}}
        turns = [*USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        assert FINAL == sdk.messages.create(**{**FIELDS, "messages": turns}, tools=[TOOL]).content[0].text


def test_an_answer_is_parsed(drawn):
    with client(drawn) as sdk:
        if not hasattr(sdk.messages, "parse"):
            pytest.skip("this version of the SDK parses no answers")
        assert isinstance(sdk.messages.parse(**FIELDS, output_format=City).parsed_output, City)
        with sdk.messages.stream(**FIELDS, output_format=City) as stream:
            assert isinstance(stream.get_final_message().parsed_output, City)


def test_thinking_is_a_block(thinking):
    thinking.executor.script = f"Hm.\n</think>\n\n{FINAL}"
    with client(thinking) as sdk:
        message = sdk.messages.create(**FIELDS, thinking={"type": "enabled", "budget_tokens": 1024})
        assert [("thinking", "Hm."), ("text", FINAL)] == [(block.type, getattr(block, block.type)) for block in message.content]
        turns = [*USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": "And in Paris?"}]
        again = sdk.messages.create(**{**FIELDS, "messages": turns}, thinking={"type": "adaptive"})
        assert ["thinking", "text"] == [block.type for block in again.content]


def test_tokens_are_counted(scripted):
    with client(scripted) as sdk:
        plain = sdk.messages.count_tokens(model=MODEL, messages=USER).input_tokens
        assert len(QUESTION) < plain < sdk.messages.count_tokens(model=MODEL, messages=USER, tools=[TOOL]).input_tokens


def test_the_tool_runner_ends(caller):
    """It asks the server to keep the conversation, and sends the whole of it once the server refuses."""
    if not hasattr(anthropic, "beta_tool"):
        pytest.skip("this version of the SDK has no tool runner")

    @anthropic.beta_tool
    def get_weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    with client(caller) as sdk:
        assert FINAL == sdk.beta.messages.tool_runner(**FIELDS, tools=[get_weather]).until_done().content[0].text


@pytest.mark.parametrize("padding", [0, 20_000], ids=["small", "large"])
def test_a_conversation_that_the_server_should_keep_is_refused_in_anthropics_form(scripted, padding):
    turns = [{"role": "user", "content": QUESTION + " " * padding}]
    body = {"thread": {"type": "create"}}
    with client(scripted) as sdk, pytest.raises(anthropic.BadRequestError) as error:
        sdk.messages.create(**{**FIELDS, "messages": turns, "max_tokens": 10}, extra_body=body)
    expected = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert expected == error.value.body["error"]["details"]


@pytest.mark.parametrize(
    "fields",
    [
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"context_management": {"edits": []}},
        {"inference_geo": "eu"},
        {"speed": "standard"},
        {"mcp_servers": []},
        {"tools": [TOOL | {"eager_input_streaming": True, "defer_loading": False, "allowed_callers": ["direct"]}]},
    ],
)
def test_fields_that_change_no_token_are_accepted(scripted, fields):
    scripted.executor.script = FINAL
    with client(scripted) as sdk:
        assert FINAL == sdk.messages.create(**FIELDS, extra_body=fields).content[0].text


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"mcp_servers": [{"type": "url", "name": "x", "url": "https://example.com"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(scripted, fields, name):
    scripted.executor.script = CALL
    with client(scripted) as sdk, pytest.raises(anthropic.BadRequestError) as error:
        sdk.messages.create(**FIELDS, extra_body=fields)
    assert name in error.value.body["error"]["message"]
