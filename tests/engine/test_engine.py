"""The engine's loop: outputs, ends, faults and records, on an executor that only counts."""

from itertools import pairwise

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.record import StepRecord
from stallfree.core.request import Refused, Request
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.streams import Reading
from stallfree.executors.base import Lost
from stallfree.policies.sarathi import Sarathi

TEXT = bytes_as_text()
ANSWER = TEXT.encode("Hello, world! Grüße. ")


class Parrot:
    """Answers every request with ANSWER, repeated. It fails at the steps in `fails`, and loses all KV at those in `losses`."""

    def __init__(self, fails=(), depth=1, fail_in="collect", losses=(), overlap=False):
        self.capacity = Capacity(16, 64, 512, depth, overlap)
        self.plans, self.fails, self.fail_in, self.losses = [], fails, fail_in, losses

    def submit(self, plan):
        if plan.step in self.losses:
            self.plans.clear()
            raise Lost("rank 1 is gone")
        if self.fail_in == "submit" and plan.step in self.fails:
            raise MemoryError("no room")
        self.plans.append(plan)

    def collect(self):
        plan = self.plans.pop(0)
        if plan.step in self.fails:
            raise RuntimeError("boom")
        tokens = {w.id: (ANSWER[(w.start + w.count - len(w.prompt)) % len(ANSWER)],) for w in plan.work if w.samples}
        return StepResult(plan.step, tokens, 0.001)

    def close(self):
        self.plans.clear()


def serve(engine: Engine) -> dict[str, tuple[str, str | None, object]]:
    """Text, finish reason and stop reason by request, once all are served."""
    texts, ends = {}, {}
    while engine.busy:
        for out in engine.step():
            texts[out.id] = texts.get(out.id, "") + out.text
            ends[out.id] = (out.finish_reason, out.stop_reason)
    engine.scheduler.ledger.check()
    return {id: (texts[id], *ends[id]) for id in texts}


def engine(restart=False, **options) -> Engine:
    return Engine(Parrot(**options), TEXT, Sarathi(32), restart=restart)


def test_the_text_is_that_of_the_tokens_up_to_max_tokens():
    e = engine()
    e.submit(Request("a", range(50), len(ANSWER)))
    assert {"a": ("Hello, world! Grüße. ", "length", None)} == serve(e)


def test_a_stop_id_ends_the_text_before_its_own():
    e = engine()
    e.submit(Request("a", range(5), 99, stop_ids=frozenset({ANSWER[5]})))
    assert {"a": ("Hello", "stop", ANSWER[5])} == serve(e)


def test_a_stop_string_ends_the_request_and_frees_its_kv():
    e = engine()
    e.submit(Request("a", range(5), 99), Reading(["wor"]))
    assert {"a": ("Hello, ", "stop", "wor")} == serve(e)
    assert e.executor.capacity.num_blocks == e.scheduler.ledger.pool.num_free


def test_text_held_back_for_a_stop_string_comes_out_at_the_end():
    e = engine()
    e.submit(Request("a", range(5), 9), Reading(["world"]))
    assert {"a": ("Hello, wo", "length", None)} == serve(e)


def test_half_a_character_at_max_tokens_comes_out_as_a_replacement():
    e = engine()
    e.submit(Request("a", range(5), len(TEXT.encode("Hello, world! Gr")) + 1))
    assert {"a": ("Hello, world! Gr\ufffd", "length", None)} == serve(e)


@pytest.mark.parametrize("fail_in", ["submit", "collect"])
def test_an_executor_that_fails_once_fails_only_the_requests_of_that_iteration(fail_in, caplog):
    e = Engine(Parrot(fails={2}, fail_in=fail_in), TEXT, Sarathi(32), Limits(1, 512))
    e.submit(Request("hit", range(20), 50))
    e.submit(Request("spared", range(100, 105), 5))
    while e.scheduler.step < 2:
        e.step()
    (failed,) = e.step()
    assert ("hit", "error") == (failed.id, failed.finish_reason)
    assert {"spared": ("Hello", "length", None)} == serve(e)
    assert "the executor failed" in caplog.text


@pytest.mark.parametrize("depth", [1, 2])
def test_running_requests_fail_with_an_executor_that_is_lost_and_the_next_are_served(depth, caplog):
    e = engine(losses={3}, depth=depth)
    e.submit(Request("hit", range(20), 50))
    outputs = []
    while e.busy:
        outputs += e.step()
    assert ("hit", "error", "rank 1 is gone") == (outputs[-1].id, outputs[-1].finish_reason, outputs[-1].error)
    assert "rank 1 is gone; 1 requests were running" in caplog.text
    e.submit(Request("spared", range(5), 5))
    assert {"spared": ("Hello", "length", None)} == serve(e)


@pytest.mark.parametrize("depth", [1, 2])
def test_running_requests_are_computed_anew_if_that_is_wanted(depth):
    e = engine(restart=True, losses={3, 9}, depth=depth)
    e.submit(Request("a", range(70), 12))
    e.submit(Request("b", range(10), 5))
    assert {"a": ("Hello, world", "length", None), "b": ("Hello", "length", None)} == serve(e)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pipeline_gives_the_same_texts(depth):
    e = engine(depth=depth)
    for i in range(5):
        e.submit(Request(str(i), range(100 * i, 100 * i + 70), 5 + i))
    assert {str(i): ("Hello, world! "[: 5 + i], "length", None) for i in range(5)} == serve(e)


def overlapping(**options) -> Engine:
    return engine(depth=2, overlap=True, **options)


def test_overlapping_iterations_give_the_same_texts():
    e = overlapping()
    e.submit(Request("length", range(70), 9))
    e.submit(Request("id", range(100, 130), 99, stop_ids=frozenset({ANSWER[5]})))
    e.submit(Request("string", range(200, 205), 99), Reading(["wor"]))
    expected = {"length": ("Hello, wo", "length", None), "id": ("Hello", "stop", ANSWER[5]), "string": ("Hello, ", "stop", "wor")}
    assert expected == serve(e)
    assert e.executor.capacity.num_blocks == e.scheduler.ledger.pool.num_free


def test_an_id_that_is_used_again_gets_no_token_of_the_one_before():
    e = overlapping()
    e.submit(Request("a", range(5), 99))
    e.step()
    e.abort("a")
    e.submit(Request("a", range(50), 5))
    assert {"a": ("Hello", "length", None)} == serve(e)


@pytest.mark.parametrize("fail_in", ["submit", "collect"])
def test_an_overlapping_iteration_that_fails_fails_only_its_requests(fail_in, caplog):
    e = overlapping(fails={2}, fail_in=fail_in)
    e.submit(Request("hit", range(20), 50))
    outputs = []
    while e.busy:
        outputs += e.step()
    assert [("hit", "error")] == [(o.id, o.finish_reason) for o in outputs if o.finish_reason]
    e.submit(Request("spared", range(5), 5))
    assert {"spared": ("Hello", "length", None)} == serve(e)
    assert "the executor failed" in caplog.text


def test_an_overlapping_iteration_is_recorded_from_the_end_of_the_one_before():
    records: list[StepRecord] = []
    e = Engine(Parrot(depth=2, overlap=True), TEXT, Sarathi(32), record=records.append)
    e.submit(Request("a", range(10), 5))
    serve(e)
    assert all(a.t_end <= b.t_start for a, b in pairwise(records))
    assert any(b.t_plan < a.t_end for a, b in pairwise(records))


def test_an_aborted_request_gives_no_more_output():
    e = engine()
    e.submit(Request("a", range(5), 99))
    e.step()
    e.abort("a")
    assert ([], False) == (e.step(), e.busy)
    assert e.executor.capacity.num_blocks == e.scheduler.ledger.pool.num_free


def test_what_is_refused_leaves_nothing_behind():
    e = engine()
    with pytest.raises(Refused):
        e.submit(Request("a", range(600), 1))
    assert not e.busy


def test_records_tell_the_whole_run():
    records: list[StepRecord] = []
    e = Engine(Parrot(), TEXT, Sarathi(32), record=records.append)
    e.submit(Request("a", range(40), 2))
    e.submit(Request("b", range(100, 110), 9), Reading(["e"]))
    serve(e)
    e.submit(Request("c", range(5), 1))
    serve(e)
    assert list(range(len(records))) == [r.step for r in records]
    assert ["a", "b", "c"] == [id for r in records for id, *_ in r.arrived]
    assert {("a", "length"), ("b", "stop"), ("c", "length")} == {f[:2] for r in records for f in r.finished}
    assert 40 + 2 - 1 == sum(count for r in records for id, _, count in r.work if id == "a")
    assert all(r.t_plan <= r.t_start <= r.t_end for r in records)
