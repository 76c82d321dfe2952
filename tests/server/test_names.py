"""A model may have several names: each is accepted and listed, and answers have the first."""

import pytest

from tests.server.conftest import Server


@pytest.fixture(scope="module")
def named():
    with Server(aliases=["gpt-4o-mini", "team/toy"]) as server:
        yield server


@pytest.mark.parametrize("name", ["toy", "gpt-4o-mini", "team/toy"])
def test_each_name_is_accepted_and_answers_have_the_first(named, name):
    answer = named.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})
    assert (200, "toy") == (answer.status_code, answer.json()["model"])
    assert name == named.client.get(f"/v1/models/{name}").json()["id"]


def test_each_name_is_listed(named):
    assert ["toy", "gpt-4o-mini", "team/toy"] == [model["id"] for model in named.client.get("/v1/models").json()["data"]]


@pytest.mark.parametrize("path", ["/v1/models/to", "/v1/models/gpt"])
def test_another_name_is_refused_with_all_that_there_are(named, path):
    answer = named.client.get(path)
    assert 404 == answer.status_code
    assert "'toy', 'gpt-4o-mini', 'team/toy' are" in answer.json()["error"]["message"]
