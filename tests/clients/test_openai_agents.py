"""OpenAI's Agents SDK, with chats and with responses: a tool, an output type, both at once, and a stream."""

import asyncio
from typing import Literal

import pytest

agents = pytest.importorskip("agents")
AsyncOpenAI = pytest.importorskip("openai").AsyncOpenAI

from tests.clients.conftest import FINAL, KEY, MAX_TOKENS, MODEL, QUESTION, City  # noqa: E402

MODELS = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}


@agents.function_tool
def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture(params=MODELS)
def agent(request):
    """An agent of a server, with these fields."""
    agents.set_tracing_disabled(True)

    def made(server, choice=None, **fields):
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        settings = agents.ModelSettings(max_tokens=MAX_TOKENS, tool_choice=choice)
        model = MODELS[request.param](model=MODEL, openai_client=client)
        return agents.Agent(name="Weather", instructions="Be brief.", model=model, model_settings=settings, **fields)

    return made


def test_a_run_calls_its_tool_and_ends(caller, agent):
    assert FINAL == agents.Runner.run_sync(agent(caller, tools=[get_weather]), QUESTION).final_output


def test_a_streamed_run_ends(caller, agent):
    async def run():
        result = agents.Runner.run_streamed(agent(caller, tools=[get_weather]), QUESTION)
        kinds = {event.type async for event in result.stream_events()}
        return result.final_output, kinds

    final, kinds = asyncio.run(run())
    assert FINAL == final
    assert {"raw_response_event", "run_item_stream_event"} <= kinds


def test_an_output_type_holds(drawn, agent):
    assert isinstance(agents.Runner.run_sync(agent(drawn, output_type=City), QUESTION).final_output, City)


def test_a_forced_tool_and_an_output_type_hold_one_after_the_other(drawn, agent):
    runner = agent(drawn, "required", tools=[get_weather], output_type=City)
    assert isinstance(agents.Runner.run_sync(runner, QUESTION, max_turns=50).final_output, City)
