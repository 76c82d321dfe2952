"""instructor, over OpenAI's and Anthropic's SDKs, in each of its modes, and with partial answers."""

import pytest

instructor = pytest.importorskip("instructor")
OpenAI = pytest.importorskip("openai").OpenAI
Anthropic = pytest.importorskip("anthropic").Anthropic

from tests.clients.conftest import KEY, MAX_TOKENS, MODEL, ROME, USER, City  # noqa: E402

FIELDS = {"model": MODEL, "messages": USER, "response_model": City, "max_tokens": MAX_TOKENS, "max_retries": 0}
GRAMMARS = ("TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS")
"""Modes in which a grammar holds the answer."""


def of_openai(server, mode):
    client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    return instructor.from_openai(client, mode=getattr(instructor.Mode, mode))


@pytest.mark.parametrize("mode", GRAMMARS)
def test_a_grammar_holds_the_answer(drawn, mode):
    assert isinstance(of_openai(drawn, mode).create(**FIELDS), City)


@pytest.mark.parametrize("mode", GRAMMARS)
def test_partial_answers_end_with_the_whole(drawn, mode):
    last = list(of_openai(drawn, mode).create_partial(**FIELDS))[-1]
    City.model_validate(last.model_dump())


@pytest.mark.parametrize(("mode", "script"), [("JSON", ROME), ("MD_JSON", f"```json\n{ROME}\n```")])
def test_an_answer_that_the_model_writes_is_read(scripted, mode, script):
    scripted.executor.script = script
    assert ("Rome", 3) == tuple(of_openai(scripted, mode).create(**FIELDS).model_dump().values())


def test_a_provider_is_named(drawn):
    fields = {name: value for name, value in FIELDS.items() if name != "model"}
    client = instructor.from_provider(f"openai/{MODEL}", base_url=f"{drawn.url}/v1", api_key=KEY)
    assert isinstance(client.create(**fields), City)


def test_anthropics_tools_hold_the_answer(drawn):
    client = Anthropic(base_url=drawn.url, api_key=KEY, max_retries=0)
    assert isinstance(instructor.from_anthropic(client, mode=instructor.Mode.ANTHROPIC_TOOLS).create(**FIELDS), City)


def test_anthropics_json_is_read(scripted):
    scripted.executor.script = ROME
    client = Anthropic(base_url=scripted.url, api_key=KEY, max_retries=0)
    structured = instructor.from_anthropic(client, mode=instructor.Mode.ANTHROPIC_JSON)
    assert ("Rome", 3) == tuple(structured.create(**FIELDS).model_dump().values())
