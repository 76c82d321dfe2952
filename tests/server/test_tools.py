"""Tools over HTTP: calls in whole answers and in streams, choices that force one, and conversations that go on after one."""

import json

import jsonschema
import pytest

from tests.server.conftest import Server
from tests.server.models import CHATML, HERMES, Random, Scripted, chat_text
from tests.server.test_bad_input import CHAT

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
USER = [{"role": "user", "content": "The weather in Rome?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome {\\"x\\"}", "days": 2}}\n</tool_call>'


class Script:
    def __init__(self, template=HERMES):
        self.server = Server(text=chat_text(template), executor=Scripted, max_model_len=8192)

    def says(self, script: str, **fields: object) -> dict:
        """The choice of a whole answer, which is compared with the stream."""
        self.server.executor.script = script
        body = {"messages": USER, "max_tokens": 1000, "tools": TOOLS, **fields}
        answer = self.server.post(CHAT, body)
        assert 200 == answer.status_code, answer.text
        choice = answer.json()["choices"][0]
        assert without_ids(choice["message"]) == without_ids(self._streamed(body))
        return choice

    def _streamed(self, body: dict) -> dict:
        message: dict = {"content": None, "refusal": None, "role": "assistant"}
        with self.server.client.stream("POST", CHAT, json=body | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    add(message, json.loads(line[6:])["choices"][0]["delta"])
        if not message["content"] and "tool_calls" not in message:
            message["content"] = ""
        return message | ({"content": None} if not message["content"] and "tool_calls" in message else {})


def add(message: dict, delta: dict) -> None:
    for name in ("content", "reasoning_content"):
        if delta.get(name) is not None:
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({"id": call["id"], "type": call["type"], "function": {"name": call["function"]["name"], "arguments": ""}})
        calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def without_ids(message: dict) -> dict:
    return message | ({"tool_calls": [c["function"] for c in message["tool_calls"]]} if message.get("tool_calls") else {})


@pytest.fixture(scope="module")
def model():
    script = Script()
    with script.server:
        yield script
        script.server.settled()


@pytest.fixture(scope="module")
def random():
    with Server(text=chat_text(HERMES), executor=Random, max_model_len=4096) as server:
        yield server
        server.settled()


def test_a_call_is_taken_out_of_the_text(model):
    choice = model.says(CALL)
    (call,) = choice["message"]["tool_calls"]
    assert ("tool_calls", None) == (choice["finish_reason"], choice["message"]["content"])
    assert ("weather", {"city": 'Rome {"x"}', "days": 2}) == (call["function"]["name"], json.loads(call["function"]["arguments"]))
    assert call["id"].startswith("call_")


def test_text_before_a_call_stays_text(model):
    message = model.says("Let me look.\n" + CALL)["message"]
    assert "Let me look." == message["content"].strip()
    assert 1 == len(message["tool_calls"])


def test_several_calls_come_in_order(model):
    calls = model.says(f'{CALL}\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>')["message"]["tool_calls"]
    assert ["weather", "time"] == [call["function"]["name"] for call in calls]
    assert 2 == len({call["id"] for call in calls})


@pytest.mark.parametrize("text", ['<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "<tool_call>hello", "a < b"])
def test_a_call_that_is_none_is_text(model, text):
    choice = model.says(text)
    assert (text, "stop") == (choice["message"]["content"], choice["finish_reason"])
    assert "tool_calls" not in choice["message"]


def test_a_call_that_is_cut_off_has_what_was_written(model):
    choice = model.says(CALL, max_tokens=50)
    assert "length" == choice["finish_reason"]
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments
    assert '{"city": "Rome {'.startswith(arguments)


def test_without_tools_nothing_is_parsed(model):
    assert CALL == model.says(CALL, tools=None)["message"]["content"]
    assert CALL == model.says(CALL, tool_choice="none")["message"]["content"]


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_valid_whatever_the_model_wants(random, seed):
    body = {"messages": USER, "tools": [WEATHER], "tool_choice": "required", "seed": seed, "parallel_tool_calls": False}
    choice = random.post(CHAT, body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert "tool_calls" == choice["finish_reason"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])


def test_a_named_tool_is_the_one_that_is_called(random):
    choice = {"type": "function", "function": {"name": "time"}}
    calls = random.post(CHAT, {"messages": USER, "tools": TOOLS, "tool_choice": choice}).json()["choices"][0]["message"][
        "tool_calls"
    ]
    assert [("time", "{}")] == [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_with_tools_and_a_schema_the_answer_is_one_of_the_two(random):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    for seed in range(4):
        body = {"messages": USER, "tools": [WEATHER], "response_format": form, "seed": seed, "max_tokens": 500}
        message = random.post(CHAT, body).json()["choices"][0]["message"]
        assert message.get("tool_calls") or isinstance(json.loads(message["content"]), int)


def prompt(server: Server, messages: list[dict], **fields: object) -> str:
    """The prompt that the model gets."""
    seen = []
    real = server.engine_thread.submit
    server.engine_thread.submit = lambda requests, *a, **k: seen.extend(requests) or real(requests, *a, **k)
    try:
        answer = server.post(CHAT, {"messages": messages, "max_tokens": 1, **fields})
        assert 200 == answer.status_code, answer.text
    finally:
        server.engine_thread.submit = real
    return server.engine.text.decode(seen[0].prompt, skip_special=False)


def test_the_template_gets_tools_calls_and_results(model):
    history = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    text = prompt(model.server, history, tools=TOOLS)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert "<|tool|>sunny<|end|>" in text
    assert '"description": "The weather in a city."' in text


def test_a_template_without_tools_gets_them_in_a_system_message():
    with Server(text=chat_text(CHATML), executor=Scripted, max_model_len=8192) as server:
        text = prompt(server, [{"role": "system", "content": "Be brief."}, *USER], tools=[WEATHER])
        assert text.startswith("<|system|>Be brief.\n\nYou may call these functions:\n{")
        server.executor.script = '{"name": "weather", "arguments": {"city": "Rome", "days": 1}}'
        message = server.post(CHAT, {"messages": USER, "tools": [WEATHER], "max_tokens": 500}).json()["choices"][0]["message"]
        assert "weather" == message["tool_calls"][0]["function"]["name"]


def function(parameters: object) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


CALLED = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
BROKEN = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]}
OTHER_RESULT = {"role": "tool", "content": "x", "tool_call_id": "d"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "not a name"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_choice": ["a"]}, "tool_choice"),
        ({"tools": [TIME] * 257}, "tools"),
        ({"tools": [function({"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tools": [function({"not": {}})], "tool_choice": "required"}, "tools"),
        ({"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[1]"),
        ({"messages": [USER[0] | {"tool_calls": [CALLED]}]}, "messages[0].tool_calls"),
        ({"messages": [BROKEN]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALLED]}, OTHER_RESULT]}, "messages[1].tool_call_id"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ],
)  # fmt: skip
def test_a_wrong_tool_or_message_is_named(model, fields, param):
    answer = model.server.post(CHAT, {"messages": USER, **fields})
    assert (400, param) == (answer.status_code, answer.json()["error"]["param"]), answer.text
