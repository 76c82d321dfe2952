"""Log-probabilities of prompts over HTTP, computed in small chunks, as evaluation harnesses ask for them."""

import json

import numpy as np
import pytest

from stallfree.core.draft import SCORED_TOKENS
from stallfree.core.plan import StepResult
from stallfree.executors.sampling import Rows, sample
from tests.server.conftest import Executor, Server
from tests.server.models import chat_text
from tests.server.test_bad_input import CHAT, COMPLETIONS


class Scoring(Executor):
    """A model of bigrams: its logits follow from the last token alone. `chunks`: the largest number of rows of an iteration."""

    table = np.random.default_rng(1).normal(0, 2, (chat_text().vocab_size, chat_text().vocab_size)).astype(np.float32)
    most_rows = 0

    def collect(self) -> StepResult:
        work = self._plans[0].work
        tokens = [token for w in work for token in w.tokens]
        result = super().collect()
        rows = Rows(work)
        type(self).most_rows = max(self.most_rows, len(rows.rows))
        logits = self.table[[tokens[row] for row in rows.rows]]
        sampled, details, failed = sample(logits[rows.sampled], [w for w in work if w.samples])
        return StepResult(result.step, sampled, result.seconds, details=details, failed=failed, scores=rows.scores(logits))


def expected(ids: list[int]) -> list[float]:
    logits = Scoring.table[ids[:-1]].astype(np.float64)
    return list(logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(axis=1)))


@pytest.fixture(scope="module")
def server():
    with Server(text=chat_text(), executor=Scoring, max_model_len=4096, blocks=2000) as server:
        yield server
        server.settled()


TEXT = "It is 12 °C in Zürich. "


def test_an_echoed_prompt_has_the_log_probability_of_each_token(server):
    ids = server.engine.text.encode(TEXT)
    body = {"prompt": TEXT, "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
    choice = server.post(COMPLETIONS, body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(ids) + 3 == len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"])
    assert (None, None) == (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0])
    assert expected(ids) == pytest.approx(logprobs["token_logprobs"][1 : len(ids)], abs=1e-4)
    assert choice["text"].startswith(TEXT)
    for token, offset in zip(logprobs["tokens"][: len(ids)], logprobs["text_offset"], strict=False):
        assert token in ("\ufffd", choice["text"][offset : offset + len(token)])


def test_the_prompt_alone_may_be_asked_for(server):
    body = {"prompt": TEXT, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = server.post(COMPLETIONS, body).json()
    (choice,) = answer["choices"]
    assert (TEXT, "length", 0) == (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"])
    assert len(server.engine.text.encode(TEXT)) == len(choice["logprobs"]["tokens"])


def test_a_long_prompt_is_scored_in_small_chunks_and_takes_no_cached_prefix(server):
    ids = [7 + i % 90 for i in range(1000)]
    body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    Scoring.most_rows = 0
    for _ in range(2):
        got = server.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]["token_logprobs"]
        assert expected(ids) == pytest.approx(got[1:], abs=1e-4)
    assert Scoring.most_rows <= SCORED_TOKENS


def test_several_prompts_and_choices_each_have_their_own(server):
    body = {"prompt": ["ab", "xyz"], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 1}
    choices = server.post(COMPLETIONS, body).json()["choices"]
    assert [3, 3, 4, 4] == [len(choice["logprobs"]["tokens"]) for choice in choices]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_vllms_list_has_ranks_and_ids(server, path):
    body = {"messages": [{"role": "user", "content": "ab"}]} if path == CHAT else {"prompt": "ab"}
    answer = server.post(path, body | {"prompt_logprobs": 1, "max_tokens": 1}).json()
    entries = answer["prompt_logprobs"] if path == CHAT else answer["choices"][0]["prompt_logprobs"]
    ids = server.engine.text.encode("<|user|>ab<|end|><|assistant|>" if path == CHAT else "ab")
    assert (len(ids), None) == (len(entries), entries[0])
    row = Scoring.table[ids[0]]
    assert 1 + int((row > row[ids[1]]).sum()) == entries[1][str(ids[1])]["rank"]
    assert {1, entries[1][str(ids[1])]["rank"]} == {entry["rank"] for entry in entries[1].values()}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "logprobs": 1, "stream": True}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [7] * 1000, "n": 100, "prompt_logprobs": 20}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_served_is_named(server, fields, param):
    answer = server.post(COMPLETIONS, {"prompt": "ab", **fields})
    assert (400, param) == (answer.status_code, answer.json()["error"]["param"])


def test_the_prompt_alone_is_streamed_too(server):
    body = {"prompt": TEXT, "echo": True, "max_tokens": 0, "stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", COMPLETIONS, json=body) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert TEXT == "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert 0 == chunks[-1]["usage"]["completion_tokens"]


def test_several_scored_prompts_share_the_rows_of_an_iteration(server):
    Scoring.most_rows = 0
    body = {"prompt": [[7 + (i * k) % 90 for i in range(300)] for k in range(1, 9)], "echo": True, "logprobs": 0, "max_tokens": 0}
    choices = server.post(COMPLETIONS, body).json()["choices"]
    assert [300] * 8 == [len(choice["logprobs"]["tokens"]) for choice in choices]
    assert Scoring.most_rows <= SCORED_TOKENS + 8
