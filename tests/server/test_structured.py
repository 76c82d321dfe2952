"""Structured output over HTTP: answers that end hold their schema, and what cannot be served is a 400 that says why."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import jsonschema
import pytest

from stallfree.grammar import compiling
from stallfree.grammar.constraint import GrammarConstraint
from tests.server.conftest import Server
from tests.server.models import Random, chat_text
from tests.server.test_bad_input import CHAT, COMPLETIONS

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def server():
    with Server(text=chat_text(), executor=Random, max_model_len=4096) as server:
        yield server
        server.settled()


def schema(schema: object, **more: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}}


def choice(server: Server, **fields: object) -> dict:
    answer = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1500, "seed": 1, **fields})
    assert 200 == answer.status_code, answer.text
    return answer.json()["choices"][0]


def content(server: Server, **fields: object) -> str:
    got = choice(server, **fields)
    assert "stop" == got["finish_reason"]
    return got["message"]["content"]


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_holds_its_schema(server, seed):
    jsonschema.validate(json.loads(content(server, **schema(PERSON, strict=True), seed=seed)), PERSON)


def test_a_json_object_is_one(server):
    assert isinstance(json.loads(content(server, response_format={"type": "json_object"})), dict)


def test_a_text_format_changes_nothing(server):
    assert choice(server, max_tokens=5) == choice(server, max_tokens=5, response_format={"type": "text"})


@pytest.mark.parametrize(
    "fields", [{"structured_outputs": {"json": PERSON}}, {"guided_json": PERSON}, {"guided_json": json.dumps(PERSON)}]
)
def test_vllms_names_of_a_schema_are_served(server, fields):
    jsonschema.validate(json.loads(content(server, **fields)), PERSON)


@pytest.mark.parametrize("fields", [{"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, {"guided_regex": "[a-c]{3}-[0-9]{2}"}])
def test_a_regular_expression_holds_the_answer(server, fields):
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", content(server, **fields))


@pytest.mark.parametrize(
    "fields", [{"structured_outputs": {"choice": ["yes", 'no "way"']}}, {"guided_choice": ["yes", 'no "way"']}]
)
def test_a_choice_is_one_of_the_texts(server, fields):
    assert content(server, **fields) in ("yes", 'no "way"')


@pytest.mark.parametrize("grammar", ['start: "a" ("b" | "c")+ "d"', 'root ::= "a" ("b" | "c")+ "d"'])
def test_a_grammar_holds_the_answer(server, grammar):
    assert re.fullmatch("a[bc]+d", content(server, structured_outputs={"grammar": grammar}))


def test_completions_take_grammars_too(server):
    answer = server.post(COMPLETIONS, {"prompt": "x", "guided_choice": ["left", "right"], "max_tokens": 20})
    assert answer.json()["choices"][0]["text"] in ("left", "right")


def test_choices_of_one_request_each_hold_the_schema(server):
    answer = server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1500, "seed": 3, "n": 4, **schema(PERSON)})
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert 4 == len(set(texts))
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_an_answer_that_is_cut_off_ends_with_length(server):
    assert "length" == choice(server, **schema(PERSON), max_tokens=3)["finish_reason"]


def test_a_complete_answer_ends_even_before_min_tokens(server):
    assert "yes" == content(server, guided_choice=["yes"], min_tokens=50)


def test_a_stream_is_the_same_text(server):
    body = {"messages": MESSAGES, "max_tokens": 1500, "seed": 1, "stream": True, **schema(PERSON)}
    with server.client.stream("POST", CHAT, json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert content(server, **schema(PERSON)) == streamed


def test_log_probabilities_come_with_a_grammar(server):
    got = choice(server, guided_choice=["yes"], logprobs=True, top_logprobs=2)
    assert list("yes") == [entry["token"] for entry in got["logprobs"]["content"]][:3]


BAD = {
    "contradictory": ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    "impossible member": ({"type": "object", "properties": {}, "required": ["b"], "additionalProperties": False}, "'b'"),
    "remote reference": ({"$ref": "http://127.0.0.1:9/x.json"}, "http://127.0.0.1:9/x.json"),
    "reference to nothing": ({"$ref": "#/$defs/x"}, "$defs/x"),
    "back reference": ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
    "unknown keyword": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "unknown format": ({"type": "string", "format": "zip"}, "zip"),
    "unknown type": ({"type": "text"}, "text"),
    "very large": ({"enum": [f"value-{i}" for i in range(20_000)]}, "characters"),
}


@pytest.mark.parametrize(("wrong", "named"), BAD.values(), ids=BAD)
def test_a_schema_that_cannot_be_served_is_a_400_that_says_why(server, wrong, named):
    answer = server.post(CHAT, {"messages": MESSAGES, **schema(wrong)})
    error = answer.json()["error"]
    assert (400, "response_format.json_schema.schema") == (answer.status_code, error["param"])
    assert named in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_json": PERSON, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_wrong_field_is_named(server, fields, param):
    answer = server.post(CHAT, {"messages": MESSAGES, **fields})
    assert (400, param) == (answer.status_code, answer.json()["error"]["param"]), answer.text


def test_a_model_without_an_end_token_serves_no_grammar():
    with Server() as plain:
        answer = plain.post(CHAT, {"messages": MESSAGES, **schema(PERSON)})
        assert 400 == answer.status_code
        assert "no token that ends" in answer.json()["error"]["message"]


def test_equal_grammars_that_come_at_once_are_tried_once(server):
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda seed: content(server, guided_regex="x[0-9]{5}y", seed=seed), range(8)))
    assert all(re.fullmatch("x[0-9]{5}y", answer) for answer in answers)


def test_the_first_token_of_a_prompt_computed_elsewhere_is_held_too():
    options = {"text": chat_text(), "executor": Random, "max_model_len": 4096}
    with (
        Server(serves_peers=True, **options) as prefill,
        Server(asks=[prefill.peer_socket.getsockname()], **options) as decode,
    ):
        assert content(decode, guided_choice=["left", "right"]) in ("left", "right")
        jsonschema.validate(json.loads(content(decode, **schema(PERSON))), PERSON)
        decode.settled()
        transfers = [line for line in decode.client.get("/metrics").text.splitlines() if line.startswith("stallfree_kv_transfers")]
        assert any(float(line.split()[-1]) >= 2 for line in transfers), transfers
        prefill.settled()


@pytest.mark.parametrize("value", [True, {}])
def test_a_schema_that_allows_anything_gives_json(server, value):
    json.loads(content(server, **schema(value)))


def test_thousands_of_choices_are_one_choice(monkeypatch, server):
    monkeypatch.setattr(compiling, "LIMIT_S", 60.0)  # a busy machine
    assert content(server, guided_choice=[f"choice {i}" for i in range(3000)]).startswith("choice ")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (schema(False), "allows no answer"),
        (schema({"$ref": "#"}), "allows no text that ends"),
        (schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        ({"guided_grammar": "start: start"}, "allows no text that ends"),
        ({"guided_grammar": "start: missing"}, "unknown name"),
    ],
)
def test_what_allows_nothing_or_points_elsewhere_says_so(server, fields, says):
    answer = server.post(CHAT, {"messages": MESSAGES, **fields})
    assert 400 == answer.status_code
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["control", "generation_prompt", "extra"])
def test_a_template_s_value_may_have_any_name_but_those_of_fields(server, name):
    body = {"messages": MESSAGES, "max_tokens": 2, "chat_template_kwargs": {name: False}}
    assert 200 == server.post(CHAT, body).status_code


@pytest.mark.parametrize("grammar", ['main ::= "a"', "root ::= b", 'root ::= "a\\', ""])
def test_a_grammar_that_is_none_is_a_400(server, grammar):
    answer = server.post(CHAT, {"messages": MESSAGES, "guided_grammar": grammar})
    assert (400, "guided_grammar") == (answer.status_code, answer.json()["error"]["param"]), answer.text


def test_a_request_whose_search_takes_long_is_deferred_and_gets_the_same_answer(server, monkeypatch):
    expected = content(server, **schema(PERSON), seed=5)
    asked = count()
    ready = GrammarConstraint.ready
    monkeypatch.setattr(GrammarConstraint, "ready", lambda self, wait_s: next(asked) % 3 == 0 and ready(self, 1.0))
    assert expected == content(server, **schema(PERSON), seed=5)
    monkeypatch.undo()
    server.settled()
