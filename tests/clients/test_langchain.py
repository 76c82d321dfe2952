"""LangChain's ChatOpenAI, with chats and responses, and ChatAnthropic: streams, tools, structured output, and agents that end."""

from typing import Literal

import pytest

pytest.importorskip("langchain")
ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI
ChatAnthropic = pytest.importorskip("langchain_anthropic").ChatAnthropic
from langchain.agents import create_agent  # noqa: E402
from langchain_core.tools import tool  # noqa: E402

from tests.clients.conftest import CALL, FINAL, KEY, MAX_TOKENS, MODEL, QUESTION, ROME, USER, City  # noqa: E402

FIELDS = {"model": MODEL, "api_key": KEY, "max_tokens": MAX_TOKENS, "max_retries": 0}
MODELS = {
    "chat": lambda server: ChatOpenAI(base_url=f"{server.url}/v1", **FIELDS),
    "responses": lambda server: ChatOpenAI(base_url=f"{server.url}/v1", use_responses_api=True, **FIELDS),
    "messages": lambda server: ChatAnthropic(base_url=server.url, **FIELDS),
}


@tool
def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def test_an_answer_is_whole_and_streamed(scripted, model):
    scripted.executor.script = FINAL
    assert FINAL == model(scripted).invoke(QUESTION).text
    assert FINAL == "".join(chunk.text for chunk in model(scripted).stream(QUESTION))


def test_a_bound_tool_is_called(scripted, model):
    scripted.executor.script = CALL
    calls = model(scripted).bind_tools([get_weather]).invoke(QUESTION).tool_calls
    assert [("get_weather", {"city": "Rome"})] == [(call["name"], call["args"]) for call in calls]


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_tool_that_must_be_called_is(drawn, model, choice):
    calls = model(drawn).bind_tools([get_weather], tool_choice=choice, strict=True).invoke(QUESTION).tool_calls
    assert {"get_weather"} == {call["name"] for call in calls}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_holds(drawn, model, method):
    structured = model(drawn).with_structured_output(City, method=method)
    assert isinstance(structured.invoke(QUESTION), City)
    assert isinstance(list(structured.stream(QUESTION))[-1], City)


@pytest.mark.parametrize("name", ["chat", "responses"])
def test_json_mode_is_parsed(scripted, name):
    scripted.executor.script = ROME
    structured = MODELS[name](scripted).with_structured_output(City, method="json_mode")
    assert City(name="Rome", population=3) == structured.invoke("A city, as JSON")


def test_an_agent_calls_its_tool_and_ends(caller, model):
    messages = create_agent(model(caller), [get_weather]).invoke({"messages": USER})["messages"]
    assert ["human", "ai", "tool", "ai"] == [message.type for message in messages]
    assert ("sunny in Rome", FINAL) == (messages[2].text, messages[3].text)
