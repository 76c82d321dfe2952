"""Requests become spans; a missing collector disturbs nobody."""

import logging
import queue
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stallfree.core.record import Arrived, Finished, StepRecord
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import StallAccount
from stallfree.server import traces as module
from stallfree.server.traces import Traces, exporter_to
from tests.server.conftest import Server
from tests.waiting import PATIENCE_S

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

COMPLETIONS = "/v1/completions"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-1] + "0"


def step(number: int, t_start: float, t_end: float, work, **fields) -> StepRecord:
    """An iteration in which all get a token."""
    values = {
        "emitted": [id for id, _, _ in work], "cached": [], "arrived": [], "finished": [], "preempted": [], "stalled": [],
        "num_running": 1, "num_waiting": 0, "free_blocks": 9, "budget": 64, "reason": "",
    }  # fmt: skip
    return StepRecord(number, t_start, t_start, t_end, work, **values | fields)


FIRST = step(0, 1.0, 2.0, [("a", 4, 6)], arrived=[Arrived("a", 0.5, 10, 9, 0)], cached=[("a", 4)])
LATE = step(1, 2.0, 4.0, [("a", 10, 1), ("b", 0, 99)], arrived=[Arrived("b", 2.0, 99, 9, 0)], cached=[("b", 0)])
END = step(2, 4.0, 4.5, [("a", 11, 1)], finished=[Finished("a", "stop")])


def spans(*records: StepRecord, headers=None):
    """The spans of the requests that end in `records`, by name; the clock stands at 10 s."""
    exporter, account = InMemorySpanExporter(), StallAccount(Slo.parse("tbt=1s"))
    traces = Traces("toy", lambda: 10.0, exporter)
    traces.note_call(["a"], "chat", headers or {})
    for record in records:
        account.record(record)
        traces.record(record, account)
    finished = exporter.get_finished_spans
    traces.close()
    return {span.name: span for span in finished()}


def test_a_request_is_a_span_with_its_phases_below():
    named = spans(FIRST, LATE, END)
    request = named.pop("chat toy")
    assert {"queue", "prefill", "decode"} == set(named)
    assert {request.context.span_id} == {span.parent.span_id for span in named.values()}
    assert [0.5, 1.0, 2.5] == [round((named[p].end_time - named[p].start_time) / 1e9, 6) for p in ("queue", "prefill", "decode")]


def test_times_of_the_run_become_those_of_the_day(monkeypatch):
    monkeypatch.setattr(module.time, "time_ns", lambda: 1_000_000_000_000)
    request = spans(FIRST, LATE, END)["chat toy"]
    assert (990_500_000_000, 994_500_000_000) == (request.start_time, request.end_time)


def test_attributes_have_the_names_of_the_conventions_and_of_vllm():
    attributes = spans(FIRST, LATE, END)["chat toy"].attributes
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "toy",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 1.5,
        "gen_ai.latency.time_to_first_token": 1.5,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.e2e": 4.0,
        "stallfree.late_tokens": 1,
        "stallfree.slo.in_time": False,
    }
    assert expected == {name: attributes[name] for name in expected}


def test_a_stall_is_an_event_with_its_cause():
    (event,) = spans(FIRST, LATE, END)["chat toy"].events
    assert ("stall", "late", "prefill", 1) == (
        event.name,
        *(event.attributes[f"stallfree.stall.{name}"] for name in ("kind", "cause", "step")),
    )


def test_the_caller_s_span_is_the_parent():
    request = spans(FIRST, END, headers={"traceparent": CALLER})["chat toy"]
    assert (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331) == (request.context.trace_id, request.parent.span_id)


def test_a_caller_that_does_not_sample_gets_no_spans():
    assert {} == spans(FIRST, END, headers={"traceparent": UNSAMPLED})


def test_a_request_that_ends_in_the_queue_has_no_other_phase():
    ended = step(0, 1.0, 2.0, [], arrived=[Arrived("a", 0.5, 10, 9, 0)], finished=[Finished("a", "abort")])
    assert {"chat toy", "queue"} == set(spans(ended))


class Blocked(SpanExporter):
    """A collector that does not answer until the test allows it, and then fails."""

    def __init__(self):
        self.called, self.go_on = threading.Event(), threading.Event()

    def export(self, _):
        self.called.set()
        self.go_on.wait(PATIENCE_S)
        return SpanExportResult.FAILURE


def test_a_collector_that_hangs_holds_up_nobody_and_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "WAITING", 3)
    exporter, account = Blocked(), StallAccount()
    traces = Traces("toy", lambda: 10.0, exporter)
    for i in range(50):
        record = step(i, 1.0, 2.0, [], arrived=[Arrived(f"{i}", 0.5, 1, 9, 0)], finished=[Finished(f"{i}", "abort")])
        account.record(record)
        traces.record(record, account)
        if i == 0:
            assert exporter.called.wait(PATIENCE_S)
    assert 3 == traces._ended.qsize()
    exporter.go_on.set()
    traces.close()
    assert [logging.WARNING] == [record.levelno for record in caplog.records]
    assert "takes no traces" in caplog.text


def test_calls_that_never_end_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "CALLS", 2)
    traces = Traces("toy", lambda: 0.0, InMemorySpanExporter())
    traces.note_call(["a", "b", "c"], "chat", {})
    assert ["b", "c"] == list(traces._calls)
    traces.close()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://host", "http://", "http://host:port", "http://host:0"])
def test_what_is_no_address_is_refused_with_an_example(endpoint):
    with pytest.raises(ValueError, match=r"write http://127\.0\.0\.1:4318"):
        exporter_to(endpoint)


def test_a_served_request_reaches_a_collector_without_its_text():
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.put(self.path.encode() + b" " + body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    try:
        exporter = exporter_to(f"http://127.0.0.1:{collector.server_port}")
        with Server(exporter=exporter) as server:
            server.post(COMPLETIONS, {"prompt": "a secret", "max_tokens": 5}, headers={"traceparent": CALLER})
            path, body = received.get(timeout=PATIENCE_S).split(b" ", 1)
        sent = ExportTraceServiceRequest.FromString(body).resource_spans[0].scope_spans[0].spans
        assert (b"/v1/traces", 4) == (path, len(sent))
        assert CALLER.split("-")[1] == sent[0].trace_id.hex()
        assert b"secret" not in body
    finally:
        collector.shutdown()
        collector.server_close()
