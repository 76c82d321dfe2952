"""LiteLLM, through its OpenAI, hosted vLLM and Anthropic providers."""

import json

import pytest

litellm = pytest.importorskip("litellm")

from tests.clients.conftest import CALL, FINAL, KEY, MAX_TOKENS, MODEL, PARAMETERS, ROME, USER, City  # noqa: E402

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}}
PROVIDERS = {"openai": "/v1", "hosted_vllm": "/v1", "anthropic": ""}


@pytest.fixture(params=PROVIDERS)
def provider(request):
    """The fields that name a server, for a provider of LiteLLM's, and these others."""
    name = request.param

    def fields(server, **others):
        base = {"model": f"{name}/{MODEL}", "api_base": server.url + PROVIDERS[name], "api_key": KEY, "num_retries": 0}
        return base | others

    return fields


def test_an_answer_is_whole_and_streamed(scripted, provider):
    scripted.executor.script = FINAL
    fields = provider(scripted, messages=USER, max_tokens=MAX_TOKENS)
    assert FINAL == litellm.completion(**fields).choices[0].message.content
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    assert (FINAL, len(FINAL) + 1) == (whole.choices[0].message.content, whole.usage.completion_tokens)


def test_a_tool_is_called_and_its_result_answered(caller, provider):
    fields = provider(caller, max_tokens=MAX_TOKENS, tools=[TOOL])
    message = litellm.completion(messages=USER, **fields).choices[0].message
    (call,) = message.tool_calls
    assert {"city": "Rome"} == json.loads(call.function.arguments)
    messages = [*USER, message, {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny"}]
    assert FINAL == litellm.completion(messages=messages, **fields).choices[0].message.content
    streamed = litellm.stream_chunk_builder(list(litellm.completion(messages=USER, **fields, stream=True)))
    assert ["get_weather"] == [call.function.name for call in streamed.choices[0].message.tool_calls]


def test_a_response_format_holds(drawn, provider):
    fields = provider(drawn, messages=USER, max_tokens=MAX_TOKENS)
    City.model_validate_json(litellm.completion(**fields, response_format=City).choices[0].message.content)


def test_responses_are_whole_and_streamed(scripted, provider):
    scripted.executor.script = ROME
    fields = provider(scripted, input="A city", max_output_tokens=MAX_TOKENS)
    assert ROME == litellm.responses(**fields).output[0].content[0].text
    deltas = [event.delta for event in litellm.responses(**fields, stream=True) if "output_text.delta" in str(event.type.value)]
    assert ROME == "".join(deltas)


def test_a_response_has_calls(scripted, provider):
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    scripted.executor.script = CALL
    fields = provider(scripted, input="The weather?", max_output_tokens=MAX_TOKENS, tools=[tool])
    assert ["get_weather"] == [item.name for item in litellm.responses(**fields).output if item.type == "function_call"]
