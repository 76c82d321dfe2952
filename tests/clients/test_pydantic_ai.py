"""pydantic-ai, over OpenAI's chats and responses and Anthropic's messages: texts, outputs, tools and streams."""

import asyncio
from typing import Literal

import pytest

pytest.importorskip("pydantic_ai")
AsyncOpenAI = pytest.importorskip("openai").AsyncOpenAI
anthropic = pytest.importorskip("anthropic")
from pydantic_ai import Agent, NativeOutput, ToolOrOutput  # noqa: E402
from pydantic_ai.models.anthropic import AnthropicModel  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.anthropic import AnthropicProvider  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

from tests.clients.conftest import FINAL, KEY, MAX_TOKENS, MODEL, QUESTION, City  # noqa: E402


def of_openai(kind, server):
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    return kind(MODEL, provider=OpenAIProvider(openai_client=client))


def of_anthropic(server):
    client = anthropic.AsyncAnthropic(base_url=server.url, api_key=KEY, max_retries=0)
    return AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client))


MODELS = {
    "chat": lambda server: of_openai(OpenAIChatModel, server),
    "responses": lambda server: of_openai(OpenAIResponsesModel, server),
    "messages": of_anthropic,
}


@pytest.fixture(params=MODELS)
def agent(request):
    """An agent of a server, with these fields."""
    return lambda server, **fields: Agent(MODELS[request.param](server), model_settings={"max_tokens": MAX_TOKENS}, **fields)


def test_an_answer_is_whole_and_streamed(scripted, agent):
    scripted.executor.script = FINAL

    async def streamed():
        async with agent(scripted).run_stream(QUESTION) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert FINAL == agent(scripted, instructions="Be brief.").run_sync(QUESTION).output
    assert FINAL == asyncio.run(streamed())


def test_an_output_type_holds(drawn, agent):
    async def streamed():
        async with agent(drawn, output_type=City).run_stream(QUESTION) as result:
            return [output async for output in result.stream_output()][-1]

    assert isinstance(agent(drawn, output_type=City).run_sync(QUESTION).output, City)
    assert isinstance(asyncio.run(streamed()), City)


@pytest.mark.parametrize("name", ["chat", "responses"])
def test_a_native_output_holds(drawn, name):
    """pydantic-ai offers it for Anthropic's own models only, by their names."""
    agent = Agent(MODELS[name](drawn), output_type=NativeOutput(City), model_settings={"max_tokens": MAX_TOKENS})
    assert isinstance(agent.run_sync(QUESTION).output, City)


def test_a_tool_is_called_and_the_run_ends(caller, agent):
    weather = agent(caller)
    cities = []

    @weather.tool_plain
    def get_weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather in a city."""
        cities.append(city)
        return "sunny"

    assert FINAL == weather.run_sync(QUESTION).output
    assert ["Rome"] == cities


def test_only_chosen_tools_are_called_and_the_run_ends(caller, agent):
    """Over OpenAI's APIs this is the choice `allowed_tools`."""
    weather = agent(caller)
    weather.tool_plain(get_time)
    weather.tool_plain(get_weather)
    settings = {"tool_choice": ToolOrOutput(function_tools=["get_weather"])}
    assert FINAL == weather.run_sync(QUESTION, model_settings=settings).output


def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def get_time() -> str:
    """The time."""
    return "noon"
