"""Anthropic's messages over HTTP, through Anthropic's own SDK."""

import json

import pytest
from anthropic import Anthropic, AuthenticationError, BadRequestError, NotFoundError

from tests.server.conftest import Server
from tests.server.models import HERMES, THINKING, Random, Scripted, chat_text

TOOL = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
USER = [{"role": "user", "content": "Rome?"}]


@pytest.fixture(scope="module")
def server():
    with Server(text=chat_text(THINKING), executor=Scripted, max_model_len=8192, api_key="secret") as server:
        yield server
        server.settled()


@pytest.fixture(scope="module")
def client(server):
    return Anthropic(base_url=server.url, api_key="secret", max_retries=0)


def ask(client, server, script, **fields):
    """The whole message, after the stream gave the same."""
    server.executor.script = script
    fields = {"model": "toy", "max_tokens": 500, "messages": USER, **fields}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    exclude = {"id", "parsed_output"}
    assert [block.model_dump(exclude=exclude) for block in whole.content] == [
        block.model_dump(exclude=exclude) for block in streamed.content
    ]
    assert (whole.stop_reason, whole.usage.output_tokens) == (streamed.stop_reason, streamed.usage.output_tokens)
    return whole


def test_an_answer_is_a_text(client, server):
    whole = ask(client, server, "Sunny.")
    assert (["text"], "Sunny.", "end_turn") == ([block.type for block in whole.content], whole.content[0].text, whole.stop_reason)


def test_thinking_is_a_block_where_it_is_asked_for(client, server):
    whole = ask(client, server, "Hm.\n</think>\n\nSunny.", thinking={"type": "enabled", "budget_tokens": 100})
    assert [("thinking", "Hm."), ("text", "Sunny.")] == [
        (b.type, b.thinking if b.type == "thinking" else b.text) for b in whole.content
    ]


def test_a_tool_use_is_a_block_and_its_result_goes_on(client, server):
    whole = ask(client, server, "I look.\n" + CALL, tools=[TOOL])
    use = whole.content[-1]
    assert ("tool_use", "weather", {"city": "Rome"}, "tool_use") == (use.type, use.name, use.input, whole.stop_reason)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "sunny"}]}
    history = [*USER, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert "Sunny." == ask(client, server, "Sunny.", messages=history, tools=[TOOL]).content[0].text


def test_stop_sequences_and_limits_are_told(client, server):
    whole = ask(client, server, "One. Two.", stop_sequences=["."])
    assert ("One", "stop_sequence", ".") == (whole.content[0].text, whole.stop_reason, whole.stop_sequence)
    assert "max_tokens" == ask(client, server, "One. Two.", max_tokens=5).stop_reason


def test_a_tool_that_must_be_used_is():
    with Server(text=chat_text(HERMES), executor=Random, max_model_len=4096) as server:
        client = Anthropic(base_url=server.url, api_key="none", max_retries=0)
        fields = {"model": "toy", "max_tokens": 2000, "messages": USER, "tools": [TOOL]}
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
            message = client.messages.create(**fields, tool_choice=choice)
            assert "weather" == message.content[0].name


def test_tokens_are_counted(client, server):
    count = client.messages.count_tokens(model="toy", messages=USER, system="Be brief.").input_tokens
    assert len(server.engine.text.encode("<|system|>Be brief.<|end|><|user|>Rome?<|end|><|assistant|>")) == count


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "a message in messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name"),
    ],
)
def test_a_wrong_field_is_named_in_anthropics_form(client, fields, word):
    with pytest.raises(BadRequestError) as error:
        client.messages.create(**{"model": "toy", "max_tokens": 10, "messages": USER, **fields})
    assert ("error", "invalid_request_error") == (error.value.body["type"], error.value.body["error"]["type"])
    assert word in error.value.body["error"]["message"]


def test_a_wrong_key_and_model_have_anthropics_form(server, client):
    with pytest.raises(AuthenticationError) as error:
        Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(model="toy", max_tokens=1, messages=USER)
    assert "authentication_error" == error.value.body["error"]["type"]
    with pytest.raises(NotFoundError):
        client.messages.create(model="other", max_tokens=1, messages=USER)


def test_a_model_thinks_only_where_it_is_asked_to(client, server):
    hidden = {"type": "enabled", "budget_tokens": 99, "display": "omitted"}
    for script, thinking in (("Sunny.", {"type": "disabled"}), ("Hm.\n</think>\n\nSunny.", hidden)):
        whole = ask(client, server, script, thinking=thinking)
        assert [("text", "Sunny.")] == [(block.type, block.text) for block in whole.content]


def test_one_call_counts_where_only_one_may(client, server):
    whole = ask(client, server, CALL + "\n" + CALL, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert 1 == len(whole.content)


def test_arguments_that_no_client_could_read_come_as_they_were_written(client, server):
    call = '<tool_call>{"name": "weather", "arguments": {"city": NaN, "days": 1e999}}</tool_call>'
    server.executor.script = call
    whole = client.messages.create(model="toy", max_tokens=500, messages=USER, tools=[TOOL])
    assert {"partial": '{"city": NaN, "days": 1e999}'} == whole.content[0].input


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (["text"], "messages[0].content[0]"),
        ([{"type": "tool_result", "tool_use_id": "c", "content": ["text"]}], "messages[0].content[0].content[0].type"),
        ([{"type": "text", "text": "\ud800"}], "surrogate"),
        ([{"type": "tool_result", "tool_use_id": "\ud800", "content": "x"}], "surrogate"),
    ],
)
def test_broken_blocks_are_named(server, content, word):
    body = json.dumps({"model": "toy", "max_tokens": 5, "messages": [{"role": "user", "content": content}]})
    answer = server.client.post("/v1/messages", content=body, headers={"x-api-key": "secret"})
    assert (400, True) == (answer.status_code, word in answer.json()["error"]["message"]), answer.text
