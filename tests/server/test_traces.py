"""A span for each request, with its parts and its stalls; nothing of what was said."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.policies.prefill_first import PrefillFirst
from tests.virtual import run

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stallfree.server.traces import Traces

TRACE = "0af7651916cd43dd8448eb211c80319c"
RECORDS = run(
    PrefillFirst(),
    [
        *(Request(f"short-{i}", range(100 * i, 100 * i + 20), 30, arrival=0.01 * i) for i in range(2)),
        Request("long", range(5000, 6000), 5, arrival=0.2),
    ],
    Capacity(16, 200, 2048),
)


@pytest.fixture(scope="module")
def spans():
    exporter = InMemorySpanExporter()
    traces = Traces("http://127.0.0.1:4318", "toy", Slo.parse("tbt=50ms"), 1000.0, exporter)
    traces.expect(["short-0"], {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    for record in RECORDS:
        traces.record(record)
    traces.close()
    return exporter.get_finished_spans()


def of(spans, id):
    whole = next(s for s in spans if s.attributes.get("gen_ai.response.id") == id)
    return whole, {s.name: s for s in spans if s.parent and s.parent.span_id == whole.context.span_id}


def test_a_request_is_a_span_from_its_arrival_to_its_end_with_its_numbers(spans):
    whole, _ = of(spans, "short-1")
    end = next(r.t_end for r in RECORDS for f in r.finished if f.id == "short-1")
    assert (int(1000.01 * 1e9), int((1000 + end) * 1e9)) == (whole.start_time, whole.end_time)
    attributes = dict(whole.attributes)
    assert (20, 30) == (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"])
    assert ("length",) == attributes["gen_ai.response.finish_reasons"]


def test_its_parts_follow_one_another(spans):
    whole, parts = of(spans, "long")
    assert {"queue", "prefill", "decode"} == parts.keys()
    assert whole.start_time == parts["queue"].start_time
    assert parts["queue"].end_time == parts["prefill"].start_time
    assert parts["prefill"].end_time == parts["decode"].start_time
    assert whole.end_time == parts["decode"].end_time


def test_its_stalls_are_events_with_their_cause(spans):
    whole, _ = of(spans, "short-0")
    assert ["token left out", "token left out", "token late"] == [e.name for e in whole.events]
    assert "1000 prefill tokens of long" in whole.events[2].attributes["stallfree.why"]


def test_the_callers_trace_is_continued(spans):
    assert TRACE == f"{of(spans, 'short-0')[0].context.trace_id:032x}"
    assert f"{of(spans, 'short-1')[0].context.trace_id:032x}" != TRACE


def test_a_collector_gets_them_over_http():
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        traces = Traces(f"http://127.0.0.1:{server.server_port}", "toy", None, 0.0)
        for record in RECORDS:
            traces.record(record)
        traces.close()
        server.shutdown()
        thread.join()
    sent = ExportTraceServiceRequest()
    sent.ParseFromString(bodies[0][1])
    assert "/v1/traces" == bodies[0][0]
    assert 12 == sum(len(scope.spans) for resource in sent.resource_spans for scope in resource.scope_spans)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://x", "http://", ""])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(ValueError, match="is not a URL; write http"):
        Traces(endpoint, "toy", None, 0.0)
