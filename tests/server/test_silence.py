"""A stream that waits for its prompt says so, so that no proxy takes it for dead; clients see nothing of it."""

from openai import OpenAI

from stallfree.server import sse
from tests.server.conftest import Server
from tests.server.test_bad_input import CHAT


def test_a_silent_stream_sends_comments_until_its_tokens_come(monkeypatch):
    monkeypatch.setattr(sse, "SILENCE_S", 0.02)
    with Server() as server:
        server.executor.gate.clear()
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "stream": True}
        with server.client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            comments = []
            while len(comments) < 2:
                line = next(lines)
                if line.startswith(":"):
                    comments.append(line)
            server.executor.gate.set()
            rest = list(lines)
        assert {": the prompt is being computed"} == set(comments)
        assert "data: [DONE]" in rest
        server.settled()


def test_the_sdk_reads_past_comments(monkeypatch):
    monkeypatch.setattr(sse, "SILENCE_S", 0.001)
    with Server() as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "a"}], max_tokens=50, stream=True
        )
        assert 50 == len("".join(chunk.choices[0].delta.content or "" for chunk in stream))
        server.settled()
