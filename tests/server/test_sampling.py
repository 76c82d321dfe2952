"""Sampling options that a request leaves open are as the model's makers recommend; those that it sets stay."""

from dataclasses import replace

import pytest

from stallfree import LLM
from stallfree.executors.sampling import Sampling
from tests.server.conftest import Server

RECOMMENDED = Sampling(temperature=0.2, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
CASES = [
    ({}, {}),
    ({"temperature": 0}, {"temperature": 0}),
    ({"temperature": 1.0, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1.0}),
    ({"top_k": 0, "min_p": 0}, {"top_k": 0, "min_p": 0}),
    ({"repetition_penalty": 1.0, "presence_penalty": 0.5}, {"repetition_penalty": 1.0, "presence_penalty": 0.5}),
]


@pytest.fixture(scope="module")
def recommending():
    """A server whose model has a recommendation, and how its requests were sampled, in turn."""
    with Server(sampling=RECOMMENDED) as server:
        samplings = []
        submit = server.engine.scheduler.submit
        server.engine.scheduler.submit = lambda request: (samplings.append(request.sampling), submit(request))[1]
        yield server, samplings
        server.settled()


@pytest.mark.parametrize(("fields", "own"), [*CASES, ({"top_k": -1}, {"top_k": 0}), ({"temperature": None}, {})])
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_a_request_of_the_server_gets_what_it_leaves_open(recommending, route, fields, own):
    server, samplings = recommending
    samplings.clear()
    body = {"messages": HELLO} if route == CHAT else {"prompt": "a"}
    assert 200 == server.post(route, body | {"max_tokens": 1, "seed": 7} | fields).status_code
    assert [replace(RECOMMENDED, seed=7, **own)] == samplings


@pytest.mark.parametrize(("fields", "own"), CASES)
def test_a_request_of_a_script_gets_what_it_leaves_open(fields, own):
    with LLM(executor="simulated", max_model_len=64) as llm:
        llm._engine.sampling = RECOMMENDED
        samplings = []
        submit = llm._engine.scheduler.submit
        llm._engine.scheduler.submit = lambda request: (samplings.append(request.sampling), submit(request))[1]
        llm.generate("a", max_tokens=1, seed=7, **fields)
    assert [replace(RECOMMENDED, seed=7, **own)] == samplings


def test_what_a_request_gets_is_listed_with_the_model(recommending):
    server, _ = recommending
    expected = {"temperature": 0.2, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    (model,) = server.client.get("/v1/models").json()["data"]
    assert expected == model["default_sampling"]
