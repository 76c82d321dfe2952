"""Reasoning over HTTP: a section of its own, streamed too, that stop strings, grammars and limits treat as what it is."""

import json

import pytest

from stallfree.parsers.channels import MARKS
from stallfree.server.conversation import Conversation
from stallfree.server.schema import ChatRequest
from tests.server.conftest import Server
from tests.server.models import HERMES, THINKING, Random, chat_text
from tests.server.test_bad_input import CHAT
from tests.server.test_tools import Script

OPTIONAL = HERMES + "{# the model may write <think> and </think> #}"
CHANNELS = HERMES + "{# the model answers in <|channel|> #}"


@pytest.fixture(scope="module")
def inside():
    script = Script(THINKING)
    with script.server:
        yield script
        script.server.settled()


@pytest.fixture(scope="module")
def outside():
    script = Script(OPTIONAL)
    with script.server:
        yield script
        script.server.settled()


@pytest.fixture(scope="module")
def channels():
    script = Script(CHANNELS)
    with script.server:
        yield script
        script.server.settled()


def test_a_section_that_the_prompt_begins_is_taken_out(inside):
    message = inside.says("Hm, 2 + 2.\n</think>\n\nFour.")["message"]
    assert ("Hm, 2 + 2.", "Four.") == (message["reasoning_content"], message["content"])


def test_a_section_that_the_model_begins_is_taken_out(outside):
    message = outside.says("<think>\nHm.\n</think>\n\nFour.")["message"]
    assert ("Hm.", "Four.") == (message["reasoning_content"], message["content"])


def test_an_answer_without_a_section_is_all_content(outside):
    message = outside.says("Four. </think> is a mark.")["message"]
    assert "Four. </think> is a mark." == message["content"]
    assert "reasoning_content" not in message


def test_the_template_decides_about_thinking(inside):
    for fields in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert "Four." == inside.says("Four.", **fields)["message"]["content"]


def test_a_client_may_leave_it_out(inside):
    message = inside.says("Hm.\n</think>\n\nFour.", include_reasoning=False)["message"]
    assert "Four." == message["content"]
    assert "reasoning_content" not in message


def test_stop_strings_do_not_count_in_it(inside, outside):
    for model, text in ((inside, "One. Two.\n</think>\n\nOne. Two."), (outside, "<think>One. Two.\n</think>\n\nOne. Two.")):
        choice = model.says(text, stop=["."])
        assert ("One. Two.", "One", ".") == (
            choice["message"]["reasoning_content"],
            choice["message"]["content"],
            choice["stop_reason"],
        )


def test_stop_strings_count_where_there_is_none(outside):
    assert "One" == outside.says("One. Two.", stop=["."])["message"]["content"]


def test_calls_come_after_it(inside):
    message = inside.says('Hm.\n</think>\n\n<tool_call>{"name": "time", "arguments": {}}</tool_call>')["message"]
    assert ("Hm.", "time") == (message["reasoning_content"], message["tool_calls"][0]["function"]["name"])


def test_an_answer_in_channels_is_taken_apart(channels):
    hm = "<|channel|>analysis<|message|>Hm.<|start|>assistant"  # <|end|> would end the answer with this tokenizer
    message = channels.says(f"{hm}<|channel|>final<|message|>Four.")["message"]
    assert ("Hm.", "Four.") == (message["reasoning_content"], message["content"])
    message = channels.says(f"{hm} to=functions.time<|channel|>commentary json<|message|>{{}}<|call|>")["message"]
    assert ("Hm.", "time") == (message["reasoning_content"], message["tool_calls"][0]["function"]["name"])


def test_the_analysis_before_a_call_comes_back_as_the_template_names_it():
    text = chat_text("{# <|channel|> #}{% for message in messages %}{{ message.thinking or '-' }}{% endfor %}")
    call = {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "12", "tool_call_id": "a"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "Well."},
    ]
    body = ChatRequest.model_validate({"messages": talk})
    assert "-Hm.--" == Conversation(text, body, None).render(control=False)


def test_the_special_tokens_of_channels_are_visible():
    text = chat_text(CHANNELS)
    text.tokenizer.add_special_tokens(list(MARKS))
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "?"}]})
    visible = Conversation(text, body, None).form("").visible
    assert {text.tokenizer.token_to_id(mark) for mark in MARKS} == visible


@pytest.mark.parametrize("template", [THINKING, OPTIONAL])
def test_structured_output_begins_after_it(template):
    with Server(text=chat_text(template), executor=Random, max_model_len=4096) as server:
        for seed in range(3):
            body = {
                "messages": [{"role": "user", "content": "?"}],
                "guided_choice": ["yes", "no"],
                "seed": seed,
                "max_tokens": 2000,
            }
            message = server.post(CHAT, body | {"max_reasoning_tokens": 40}).json()["choices"][0]["message"]
            assert message["content"] in ("yes", "no"), message
        server.settled()


def test_a_limit_ends_it():
    with Server(text=chat_text(THINKING), executor=Random, max_model_len=4096) as server:
        body = {
            "messages": [{"role": "user", "content": "?"}],
            "max_reasoning_tokens": 10,
            "seed": 4,
            "max_tokens": 60,
            "logprobs": True,
        }
        choice = server.post(CHAT, body).json()["choices"][0]
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert "</think>" in tokens[:12]
        assert len(choice["message"]["reasoning_content"]) <= 10
        server.settled()


def test_the_limit_of_a_section_that_the_model_begins_holds_only_such_an_answer():
    class Thinker(Random):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._favour[chat_text().tokenizer.token_to_id(self.first)] = 60.0

        first = "<think>"

    class Talker(Thinker):
        first = "A"

    for executor, thinks in ((Thinker, True), (Talker, False)):
        with Server(text=chat_text(OPTIONAL), executor=executor, max_model_len=4096) as server:
            body = {"messages": [{"role": "user", "content": "?"}], "max_reasoning_tokens": 5, "max_tokens": 30, "logprobs": True}
            choice = server.post(CHAT, body).json()["choices"][0]
            tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
            assert thinks == ("</think>" in tokens[:8]), tokens
            server.settled()


def test_json_of_a_stream_names_the_field():
    script = Script(THINKING)
    with script.server as server:
        server.executor.script = "Hm.\n</think>\n\nFour."
        body = {"messages": [{"role": "user", "content": "?"}], "stream": True, "max_tokens": 100}
        with server.client.stream("POST", CHAT, json=body) as answer:
            deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in answer.iter_lines() if line.startswith("data: {")]
        assert {"role", "content", "reasoning_content"} == {name for delta in deltas for name in delta}
