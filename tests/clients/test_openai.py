"""OpenAI's SDK, with chats and with responses: tools, structured output, and the helpers for streams."""

import json
from typing import Literal

import pytest

openai = pytest.importorskip("openai")
from pydantic import BaseModel  # noqa: E402

from tests.clients.conftest import CALL, FINAL, KEY, MAX_TOKENS, MODEL, PARAMETERS, ROME, USER, City  # noqa: E402

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS, "strict": True}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "additionalProperties": False}}}
FUNCTION = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
TIME_FUNCTION = {"type": "function", "name": "get_time", "parameters": {"type": "object"}, "strict": None}


class GetWeather(BaseModel):
    city: Literal["Rome", "Paris"]


def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def test_a_tool_is_called_and_its_result_answered(caller):
    with client(caller) as sdk:
        message = sdk.chat.completions.create(model=MODEL, messages=USER, tools=[TOOL]).choices[0].message
        (call,) = message.tool_calls
        assert {"city": "Rome"} == json.loads(call.function.arguments)
        for earlier in (message, message.model_dump()):
            messages = [*USER, earlier, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
            assert FINAL == sdk.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL]).choices[0].message.content


def test_an_answer_is_parsed(drawn):
    with client(drawn) as sdk:
        fields = {"model": MODEL, "messages": USER, "max_tokens": MAX_TOKENS}
        assert isinstance(sdk.chat.completions.parse(**fields, response_format=City).choices[0].message.parsed, City)
        tools = [openai.pydantic_function_tool(GetWeather)]
        (call,) = sdk.chat.completions.parse(**fields, tools=tools, tool_choice="required").choices[0].message.tool_calls[:1]
        assert isinstance(call.function.parsed_arguments, GetWeather)


def test_the_stream_helper_parses_answers_and_calls(drawn):
    with client(drawn) as sdk:
        fields = {"model": MODEL, "messages": USER, "max_tokens": MAX_TOKENS}
        with sdk.chat.completions.stream(**fields, response_format=City) as stream:
            assert {"chunk", "content.delta", "content.done"} == {event.type for event in stream}
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)
        tools = [openai.pydantic_function_tool(GetWeather)]
        with sdk.chat.completions.stream(**fields, tools=tools, tool_choice="required") as stream:
            kinds = {event.type for event in stream}
            assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
            (call, *_) = stream.get_final_completion().choices[0].message.tool_calls
            assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_response_is_whole_streamed_and_parsed(scripted):
    scripted.executor.script = ROME
    fields = {"model": MODEL, "input": "A city", "instructions": "Be brief."}
    with client(scripted) as sdk:
        assert ROME == sdk.responses.create(**fields).output_text
        events = list(sdk.responses.create(**fields, stream=True))
        assert ROME == "".join(event.delta for event in events if event.type == "response.output_text.delta")
        with sdk.responses.stream(**fields, text_format=City) as stream:
            assert City(name="Rome", population=3) == stream.get_final_response().output_parsed
        assert City(name="Rome", population=3) == sdk.responses.parse(**fields, text_format=City).output_parsed


def test_a_function_is_called_and_its_output_answered(caller):
    with client(caller) as sdk:
        items = list(USER)
        items += sdk.responses.create(model=MODEL, input=items, tools=[FUNCTION]).output
        items.append({"type": "function_call_output", "call_id": items[-1].call_id, "output": json.dumps({"sky": "sunny"})})
        assert FINAL == sdk.responses.create(model=MODEL, input=items, tools=[FUNCTION]).output_text


def test_only_allowed_tools_are_called(drawn):
    """As pydantic-ai asks for some of an agent's tools."""
    with client(drawn) as sdk:
        chosen = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
        choice = {"type": "allowed_tools", "allowed_tools": chosen}
        fields = {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": USER, "tools": [TIME, TOOL], "tool_choice": choice}
        for seed in range(3):
            calls = sdk.chat.completions.create(**fields, seed=seed).choices[0].message.tool_calls
            assert {"get_weather"} == {call.function.name for call in calls}
        choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
        fields = {"model": MODEL, "max_output_tokens": MAX_TOKENS, "input": USER, "tools": [TIME_FUNCTION, FUNCTION]}
        assert {"get_weather"} == {call.name for call in sdk.responses.create(**fields, tool_choice=choice).output}


def test_a_call_of_a_tool_that_is_not_allowed_is_text(scripted):
    scripted.executor.script = CALL
    chosen = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": chosen}
    with client(scripted) as sdk:
        create = sdk.chat.completions.create
        message = create(model=MODEL, messages=USER, tools=[TIME, TOOL], tool_choice=choice).choices[0].message
        assert (CALL, None) == (message.content, message.tool_calls)


@pytest.mark.parametrize("name", ["get_tide", ""])
def test_an_allowed_tool_that_is_not_there_is_named(scripted, name):
    chosen = {"mode": "auto", "tools": [{"type": "function", "function": {"name": name}}]}
    choice = {"type": "allowed_tools", "allowed_tools": chosen}
    with client(scripted) as sdk, pytest.raises(openai.BadRequestError) as error:
        sdk.chat.completions.create(model=MODEL, messages=USER, tools=[TOOL], tool_choice=choice)
    assert "tool_choice" == error.value.param


def test_a_forced_call_needs_no_content_for_the_format_to_hold(drawn):
    """As instructor (RESPONSES_TOOLS) and agents with an output type ask."""
    with client(drawn) as sdk:
        format = {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}
        fields = {"model": MODEL, "messages": USER, "max_tokens": MAX_TOKENS, "tools": [TOOL], "response_format": format}
        message = sdk.chat.completions.create(**fields, tool_choice="required").choices[0].message
        assert (None, "get_weather") == (message.content, message.tool_calls[0].function.name)
        text = {"format": {"type": "json_schema", "name": "city", "schema": City.model_json_schema()}}
        fields = {"model": MODEL, "input": USER, "max_output_tokens": MAX_TOKENS, "tools": [FUNCTION], "text": text}
        choice = {"type": "function", "name": "get_weather"}
        assert ["get_weather"] == [item.name for item in sdk.responses.create(**fields, tool_choice=choice).output]


def test_fields_of_openais_own_service_change_nothing(scripted):
    scripted.executor.script = FINAL
    fields = {"max_tool_calls": 3, "prompt_cache_key": "a", "service_tier": "auto", "store": True, "safety_identifier": "u"}
    with client(scripted) as sdk:
        response = sdk.responses.create(model=MODEL, input="Hello", **fields, extra_body={"prompt_cache_options": {"mode": "auto"}})
    assert FINAL == response.output_text
