"""The client adapts its requests to servers that refuse fields which others accept."""

import asyncio

import numpy as np
import pytest

from stallfree.bench.client import Client
from stallfree.bench.dialect import Dialect
from tests.bench.conftest import Fake, running


def probe(fake: Fake, **options) -> Dialect:
    async def probed():
        async with running(fake, **options) as client:
            return await Dialect.probe(client)

    return asyncio.run(probed())


def refusing(*names: str) -> Fake:
    """A server that refuses these fields; the name `ids` stands for a prompt of token ids."""
    fake = Fake()
    fake.refuse = lambda body: next(
        (f"unknown {name}" for name in names if name in body or (name == "ids" and isinstance(body["prompt"], list))), None
    )
    return fake


def test_a_server_that_takes_everything_is_asked_for_everything():
    dialect = probe(Fake())
    assert "fake" == dialect.model
    assert (1000, 30_000) == dialect.ids
    assert {"ignore_eos", "stream_options"} == set(dialect.options)
    assert "token ids; ignore_eos; usage in every event" in str(dialect)


def test_what_is_refused_is_left_out_and_said():
    dialect = probe(refusing("ignore_eos", "stream_options"))
    assert {} == dialect.options
    assert "no ignore_eos, so outputs may end early; no usage, so an event is a token" in str(dialect)


def test_usage_at_the_end_is_asked_for_if_not_taken_in_every_event():
    fake = Fake()
    fake.refuse = lambda body: "unknown" if "continuous_usage_stats" in body.get("stream_options", {}) else None
    assert {"include_usage": True} == probe(fake).options["stream_options"]


def test_ids_of_a_small_vocabulary_are_found():
    fake = Fake()
    fake.refuse = lambda body: "no such token" if isinstance(body["prompt"], list) and max(body["prompt"]) >= 256 else None
    assert (32, 250) == probe(fake).ids


@pytest.mark.parametrize("per_word", [1, 5])
def test_texts_have_the_tokens_of_the_ids_that_are_refused(per_word):
    fake = refusing("ids")
    fake.per_word = per_word
    dialect = probe(fake)
    fields = dialect._fields(np.random.default_rng(), 501, 1)
    assert (None, 501) == (dialect.ids, 1 + per_word * len(fields["prompt"].split()))


def test_a_server_that_counts_ids_as_something_else_is_given_text():
    fake = Fake()
    fake.refuse = lambda body: body.update(prompt=["a"]) if isinstance(body["prompt"], list) else None
    assert probe(fake).ids is None


def test_prompts_differ_from_run_to_run():
    dialect = Dialect(None, (0, 1000), (0, 1), {})
    assert dialect.body(np.random.default_rng(), 50, 1) != dialect.body(np.random.default_rng(), 50, 1)


def test_a_server_without_a_list_of_models_is_asked_for_none():
    fake = Fake()
    fake.models = []
    assert probe(fake).model is None
    assert all("model" not in body for body in fake.bodies)


def test_a_server_that_answers_nothing_plain_is_named_with_what_it_said():
    fake = Fake()
    fake.refuse = lambda body: "I am a teapot"
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.*HTTP 400: I am a teapot"):
        probe(fake)


def test_an_address_at_which_nobody_is_is_said():
    async def nobody():
        async with Client("http://127.0.0.1:9") as client:
            await Dialect.probe(client)

    with pytest.raises(ValueError, match="no server answers at http://127.0.0.1:9"):
        asyncio.run(nobody())


@pytest.mark.parametrize(
    ("options", "says"), [({"url": "localhost:8000"}, "http://"), ({"url": "http://x", "timeout_s": 0}, "0 s")]
)
def test_what_is_no_url_or_timeout_is_said(options, says):
    with pytest.raises(ValueError, match=says):
        Client(**options)
