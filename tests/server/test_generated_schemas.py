"""Generated schemas: no engine dies, nothing leaks, every answer that ends holds its schema, and a refusal names the keyword."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from stallfree.engine.assemble import Options, assemble
from tests.server.conftest import Server
from tests.server.models import Random, chat_text
from tests.server.schemas import UNSUPPORTED, schema
from tests.server.test_bad_input import CHAT

MESSAGES = [{"role": "user", "content": "Answer as JSON."}]


def served(server: Server, numbers: range, max_tokens: int) -> Counter[str]:
    """Serve these schemas, 16 at a time, and check each answer. Returns how they ended."""

    def serve(number: int) -> str:
        own = schema(number)
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": own}}
        answer = server.post(CHAT, {"messages": MESSAGES, "seed": number, "max_tokens": max_tokens, "response_format": form})
        if answer.status_code == 400:
            message = answer.json()["error"]["message"]
            assert any(keyword in own for keyword, _ in UNSUPPORTED) or "Unsatisfiable" in message, (number, own, message)
            assert "Unsatisfiable" in message or any(keyword in message for keyword, _ in UNSUPPORTED), (own, message)
            return "400"
        assert 200 == answer.status_code, (number, own, answer.text)
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), own, format_checker=jsonschema.FormatChecker())
        return choice["finish_reason"]

    with ThreadPoolExecutor(16) as clients:
        return Counter(clients.map(serve, numbers))


def test_random_answers_hold_generated_schemas():
    with Server(text=chat_text(), executor=Random, max_model_len=2048, blocks=4000) as server:
        ends = served(server, range(200), 700)
        server.settled()
    assert ends["stop"] > 150, ends
    assert 0 < ends["400"] < 30, ends


@pytest.mark.slow
def test_the_embedded_model_s_answers_hold_a_thousand_generated_schemas():
    with Server(engine=assemble(Options()).engine, max_queue=64) as server:
        ends = served(server, range(1000, 2000), 300)
        server.settled()
    assert 1000 == ends.total()
    assert ends["stop"] > 500, ends
