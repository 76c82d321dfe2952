"""LlamaIndex's OpenAILike: texts, chats, streams, structured output, tools, and an agent that ends."""

import asyncio
from typing import Literal

import pytest

OpenAILike = pytest.importorskip("llama_index.llms.openai_like").OpenAILike
from llama_index.core.agent.workflow import FunctionAgent  # noqa: E402
from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.core.tools import FunctionTool  # noqa: E402

from tests.clients.conftest import FINAL, KEY, MAX_TOKENS, MODEL, QUESTION, City  # noqa: E402


def model(server, **fields):
    defaults = {"is_chat_model": True, "is_function_calling_model": True}
    base = f"{server.url}/v1"
    return OpenAILike(
        model=MODEL, api_base=base, api_key=KEY, max_retries=0, max_tokens=MAX_TOKENS, context_window=16384, **defaults | fields
    )


def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.mark.parametrize("is_chat_model", [True, False])
def test_an_answer_is_whole_and_streamed(scripted, is_chat_model):
    scripted.executor.script = FINAL
    llm = model(scripted, is_chat_model=is_chat_model)
    assert (FINAL, FINAL) == (llm.complete(QUESTION).text, list(llm.stream_complete(QUESTION))[-1].text)


def test_a_chat_is_whole_and_streamed(scripted):
    scripted.executor.script = FINAL
    llm, messages = model(scripted), [ChatMessage(role="user", content=QUESTION)]
    assert (FINAL, FINAL) == (llm.chat(messages).message.content, list(llm.stream_chat(messages))[-1].message.content)


@pytest.mark.parametrize("native", [True, False], ids=["response_format", "tools"])
def test_structured_output_holds(drawn, native):
    llm = model(drawn, should_use_structured_outputs=native)
    assert isinstance(llm.as_structured_llm(City).complete("A city").raw, City)


def test_a_tool_is_called(caller):
    tool = FunctionTool.from_defaults(get_weather)
    assert "sunny in Rome" == str(model(caller).predict_and_call([tool], user_msg=QUESTION))


def test_an_agent_calls_its_tool_and_ends(caller):
    async def run():
        return await FunctionAgent(tools=[get_weather], llm=model(caller)).run(QUESTION)

    assert FINAL == str(asyncio.run(run()))
