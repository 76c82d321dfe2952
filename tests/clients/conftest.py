"""Servers for the clients that people use, each in the form of its own quick start: one draws its answers within what grammars
allow, one follows a script, and one calls a tool and then answers. `make test-clients` has the environments for all clients.
"""

from collections.abc import Iterator
from typing import Literal

import pytest
from pydantic import BaseModel

from stallfree.core.plan import StepResult
from tests.server.conftest import Server
from tests.server.models import HERMES, THINKING, Random, Scripted, chat_text

MODEL, KEY = "toy", "none"
MAX_TOKENS = 2000
QUESTION = "What is the weather in Rome?"
USER = [{"role": "user", "content": QUESTION}]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
FINAL = "It is sunny in Rome."
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}


class City(BaseModel):
    """A city."""

    name: Literal["Rome", "Paris"]
    population: int


ROME = '{"name": "Rome", "population": 3}'


class Caller(Scripted):
    """Answers with `script`, and with `FINAL` once the prompt has a tool's result."""

    script = CALL

    def collect(self) -> StepResult:
        plan = self._plans[0]
        result = super().collect()
        (tool,) = self.text.own_tokens(["<|tool|>"]).values()
        ids = [*self.text.encode(FINAL, special=False), *self.text.eos_ids]
        tokens = {
            work.id: (ids[min(work.start + work.count - len(work.prompt), len(ids) - 1)],)
            for work in plan.work
            if work.samples and tool in work.prompt
        }
        return StepResult(plan.step, result.tokens | tokens, result.seconds)


def serving(executor: type, template: str = HERMES) -> Iterator[Server]:
    with Server(text=chat_text(template), executor=executor, max_model_len=16384) as server:
        yield server
        server.settled()


@pytest.fixture(scope="package")
def drawn() -> Iterator[Server]:
    yield from serving(Random)


@pytest.fixture(scope="package")
def scripted() -> Iterator[Server]:
    """Its `executor.script` is what it answers."""
    yield from serving(Scripted)


@pytest.fixture(scope="package")
def thinking() -> Iterator[Server]:
    """As `scripted`, of a model that reasons: a script begins within the reasoning."""
    yield from serving(Scripted, THINKING)


@pytest.fixture(scope="package")
def caller() -> Iterator[Server]:
    yield from serving(Caller)
