"""OpenAI's responses over HTTP, through OpenAI's own SDK: its types check every event."""

import json

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.server.conftest import Server
from tests.server.models import HERMES, THINKING, Random, Scripted, chat_text


def nested(depth):
    schema = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def server():
    with Server(text=chat_text(THINKING), executor=Scripted, max_model_len=8192) as server:
        yield server
        server.settled()


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, server, script, **fields):
    """The whole response, after the stream gave the same."""
    server.executor.script = script
    fields = {"model": "toy", "input": "Hello", "max_output_tokens": 500, **fields}
    whole = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        events = list(stream)
    streamed = events[-1].response
    assert [item.model_dump(exclude={"id", "call_id"}) for item in whole.output] == [
        item.model_dump(exclude={"id", "call_id", "parsed", "parsed_arguments"})
        | ({} if item.type != "message" else {"content": [part.model_dump(exclude={"parsed"}) for part in item.content]})
        for item in streamed.output
    ]
    assert list(range(len(events))) == [event.sequence_number for event in events]
    return whole, events


def test_an_answer_is_reasoning_and_a_message(client, server):
    whole, events = ask(client, server, "Hm.\n</think>\n\nHello there.")
    assert ["reasoning", "message"] == [item.type for item in whole.output]
    assert ("Hello there.", "completed", "Hm.") == (whole.output_text, whole.status, whole.output[0].content[0].text)
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    kinds = [event.type for event in events]
    assert ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"] == kinds[:4]
    assert ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"] == kinds[
        -4:
    ]


def test_a_call_is_an_item(client, server):
    whole, events = ask(client, server, "Hm.\n</think>\n\n" + CALL, tools=[TOOL])
    (call,) = [item for item in whole.output if item.type == "function_call"]
    assert ("weather", '{"city": "Rome"}') == (call.name, call.arguments)
    assert "response.function_call_arguments.done" in [event.type for event in events]


def test_an_answer_that_is_cut_off_is_incomplete(client, server):
    whole, _ = ask(client, server, "Hm.\n</think>\n\nHello there, how are you?", max_output_tokens=24)
    assert ("incomplete", "max_output_tokens") == (whole.status, whole.incomplete_details.reason)


def test_a_conversation_goes_on_with_the_items_of_an_answer(client, server):
    whole, _ = ask(client, server, "Hm.\n</think>\n\n" + CALL, tools=[TOOL])
    call = next(item for item in whole.output if item.type == "function_call")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again, _ = ask(
        client, server, "Hm.\n</think>\n\nSunny.", tools=[TOOL], input=[{"role": "user", "content": "Rome?"}, *whole.output, output]
    )
    assert "Sunny." == again.output_text


class City(BaseModel):
    name: str
    population: int


def test_a_pydantic_model_is_parsed():
    with Server(text=chat_text(HERMES), executor=Random, max_model_len=4096) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert isinstance(
            client.responses.parse(model="toy", input="A city", text_format=City, max_output_tokens=2000).output_parsed, City
        )
        messages = [{"role": "user", "content": "A city"}]
        chat = client.chat.completions.parse(model="toy", messages=messages, response_format=City, max_tokens=2000)
        assert isinstance(chat.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
    ],
)
def test_a_wrong_field_is_named(client, fields, param):
    with pytest.raises(BadRequestError) as error:
        client.responses.create(**{"model": "toy", "input": "Hello", **fields})
    assert param == error.value.param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [{"role": "user", "content": ["input_text"]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input[0].content"),
        ({"input": "a", "tools": [TOOL | {"description": "\udc00"}]}, "tools[0].description"),
        ({"instructions": "x", "input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": "a", "tools": [TOOL | {"parameters": nested(300)}]}, None),
    ],
)
def test_broken_items_are_named(server, body, param):
    answer = server.client.post("/v1/responses", content=json.dumps(body))
    assert (400, param) == (answer.status_code, answer.json()["error"]["param"]), answer.text


def test_log_probabilities_cover_every_byte_of_the_message():
    with Server(text=chat_text(HERMES), executor=Random, max_model_len=4096) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        fields = {"model": "toy", "input": "A city", "max_output_tokens": 60, "top_logprobs": 2, "temperature": 1.9}
        whole = client.responses.create(**fields, extra_body={"seed": 3})
        (part,) = whole.output[0].content
        raw = b"".join(bytes(entry.bytes) for entry in part.logprobs if entry.token != "<|end|>")
        assert part.text == raw.decode(errors="replace")
        assert all(2 == len(entry.top_logprobs) for entry in part.logprobs)
        with client.responses.stream(**fields, extra_body={"seed": 3}) as stream:
            streamed = stream.get_final_response()
        assert part.logprobs == streamed.output[0].content[0].logprobs
