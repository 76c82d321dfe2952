"""An exception in one request's text, stops, watcher, KV transfer or record ends only that request. Its neighbour gets every
token."""

import asyncio

import pytest

from stallfree.core.request import Request
from stallfree.engine import engine as module_of_engine
from stallfree.engine import streams as module
from stallfree.engine import text as module_of_text
from stallfree.engine.engine import Engine
from stallfree.engine.text import Detokenizer, StopStrings, TextError
from stallfree.policies.sarathi import Sarathi
from tests.engine.test_engine import ANSWER, TEXT, Parrot
from tests.engine.test_thread import read, request, started

BAD = 13
"""The prompt length of the request that makes trouble; the neighbour has another."""


class Trouble(Exception):
    pass


def make_trouble(*_, **__):
    raise Trouble("out of order")


def served(*, depth=1, overlap=False, record=None, **bad) -> dict[str, tuple[str, str | None, str | None]]:
    """Text, finish reason and error of the request that makes trouble and of its neighbour, once both have ended."""
    engine = Engine(Parrot(depth=depth, overlap=overlap), TEXT, Sarathi(64), record=record)
    engine.submit(Request("bad", range(BAD), len(ANSWER)), **bad)
    engine.submit(Request("good", range(100, 107), len(ANSWER)))
    texts, ends = {}, {}
    for _ in range(500):
        for out in engine.step():
            texts[out.id] = texts.get(out.id, "") + out.text
            ends[out.id] = (out.finish_reason, out.error)
        if not engine.busy:
            break
    engine.scheduler.ledger.check()
    assert not engine.busy
    assert engine.scheduler.ledger.pool.num_free == engine.executor.capacity.num_blocks
    return {id: (texts[id], *ends[id]) for id in texts}


def assert_only_the_bad_one_failed(ends, *, error: str):
    assert ("Hello, world! Grüße. ", "length", None) == ends["good"]
    assert "error" == ends["bad"][1]
    assert error in ends["bad"][2]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("cls", "method"), [(Detokenizer, "push"), (Detokenizer, "flush"), (StopStrings, "push"), (StopStrings, "flush")]
)
def test_a_request_whose_text_raises_ends_alone(monkeypatch, cls, method, depth):
    instances = []
    init = cls.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        instances.append(self)

    monkeypatch.setattr(cls, "__init__", remember)
    own = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *a, **k: make_trouble() if self is instances[0] else own(self, *a, **k))
    assert_only_the_bad_one_failed(served(depth=depth), error="its tokens cannot be turned into text (Trouble: out of order)")


@pytest.mark.parametrize("late", [0, 1, 5])
def test_a_request_whose_text_raises_ends_alone_where_iterations_overlap(monkeypatch, late):
    own, count = Detokenizer.push, {}

    def push(self, id, **more):
        count[self] = count.get(self, -1) + 1
        return make_trouble() if self is next(iter(count)) and count[self] >= late else own(self, id, **more)

    monkeypatch.setattr(Detokenizer, "push", push)
    assert_only_the_bad_one_failed(served(depth=2, overlap=True), error="Trouble: out of order")


def test_a_request_whose_watcher_raises_ends_alone():
    assert_only_the_bad_one_failed(served(watch=make_trouble), error="could not be passed on (Trouble: out of order)")


def test_a_prompt_that_cannot_be_asked_for_elsewhere_is_computed_here():
    class Transfer:
        cut = None
        start = cancel = make_trouble

    ends = served(transfer=Transfer())
    assert {"bad": ("Hello, world! Grüße. ", "length", None), "good": ("Hello, world! Grüße. ", "length", None)} == ends


def test_an_abort_that_cannot_call_off_what_is_fetched_aborts():
    class Transfer:
        cut = None
        start = staticmethod(lambda request: None)
        cancel = staticmethod(make_trouble)

    engine = Engine(Parrot(), TEXT, Sarathi(64))
    engine.submit(Request("bad", range(BAD), 9), transfer=Transfer())
    engine.step()
    engine.abort("bad")
    assert not engine.busy
    engine.scheduler.ledger.check()


def test_a_record_that_cannot_be_made_or_kept_fails_nobody(monkeypatch):
    whole = ("Hello, world! Grüße. ", "length", None)
    assert {"bad": whole, "good": whole} == served(record=make_trouble)
    monkeypatch.setattr(module_of_engine.StepRecord, "of", make_trouble)
    assert {"bad": whole, "good": whole} == served(record=lambda _: None)


def test_a_request_that_cannot_be_queued_ends_alone(monkeypatch):
    own = Engine.submit

    def submit(self, r, *args, **kwargs):
        return make_trouble() if r.id == "bad" else own(self, r, *args, **kwargs)

    monkeypatch.setattr(Engine, "submit", submit)

    async def run():
        async with started() as thread:
            outputs = await read(thread.submit([request("bad"), request("good")]))
            return outputs, thread.failure

    outputs, failure = asyncio.run(run())
    assert failure is None
    assert {("bad", "error"), ("good", "length")} == {(o.id, o.finish_reason) for o in outputs if o.finish_reason}


def test_a_stream_that_cannot_be_made_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(module, "Detokenizer", make_trouble)
    engine = Engine(Parrot(), TEXT, Sarathi(64))
    with pytest.raises(Trouble):
        engine.submit(Request("bad", range(BAD), 9))
    assert not engine.busy


class Panic(BaseException):
    """What a panic in a Rust library looks like in Python."""


def test_a_panic_in_the_tokenizer_ends_its_request_alone(monkeypatch):
    own, first = Detokenizer.push, []

    def push(self, id, **more):
        first.append(self)
        if self is first[0]:
            raise Panic("index out of bounds")
        return own(self, id, **more)

    monkeypatch.setattr(Detokenizer, "push", push)
    assert_only_the_bad_one_failed(served(), error="Panic: index out of bounds")


def test_a_panic_while_tokenising_is_an_error_of_the_text():
    class Panics:
        def encode(self, *_, **__):
            raise Panic("index out of bounds")

    with pytest.raises(TextError, match="index out of bounds"):
        module_of_text._encoded(Panics(), "a", True)


def test_ctrl_c_is_not_taken_for_an_error_of_a_request(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Detokenizer, "push", interrupted)
    with pytest.raises(KeyboardInterrupt):
        served()
