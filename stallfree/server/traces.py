"""OpenTelemetry traces: a span for each request, with its queue, prefill and decode in it, sent to a collector when it has ended.

They are read off the StepRecords, and sent by the SDK's own thread from a bounded queue: a collector that is slow or gone costs
no iteration anything. Names follow OpenTelemetry's conventions for generative AI where there are any. No text, token or key is in
them. It needs the extra `otel`.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import stallfree
from stallfree.core.record import Arrived, StepRecord
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import Stall, StallAccount

MOST_STALLS = 32
"""Stalls of one request that become events of its span."""
TIMEOUT_S = 5
PATH = "/v1/traces"


class Traces:
    """Spans of the requests to `model`, judged by `slo`, sent to `endpoint`. `record` is an Engine's callback; `origin_s` is the
    time since 1970 (s) at which the engine's clock shows 0. Raises ValueError for an endpoint that is no URL.
    """

    def __init__(self, endpoint: str, model: str, slo: Slo | None, origin_s: float, exporter: SpanExporter | None = None):
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(
                f"--otlp-endpoint {endpoint!r} is not a URL; write http://127.0.0.1:4318, the collector's port for HTTP"
            )
        target = endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}{PATH}"
        _once_in_the_log()
        resource = Resource.create({"service.name": "stallfree", "service.version": stallfree.__version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(target, timeout=TIMEOUT_S)))
        self._tracer = self._provider.get_tracer("stallfree", stallfree.__version__)
        self._model, self._origin = model, origin_s
        self._account = StallAccount(slo)
        self._parents: dict[str, Context] = {}
        self._lives: dict[str, _Life] = {}

    def expect(self, ids: Sequence[str], headers: Mapping[str, str]) -> None:
        """Requests that are about to be submitted, of a caller whose `headers` may say (W3C `traceparent`) whose trace it is."""
        if "traceparent" in headers:
            parent = TraceContextTextMapPropagator().extract(headers)
            self._parents |= dict.fromkeys(ids, parent)

    def forget(self, ids: Sequence[str]) -> None:
        """They were refused."""
        for id in ids:
            self._parents.pop(id, None)

    def record(self, step: StepRecord) -> None:
        """Follow one iteration. Called in the engine's thread, after each."""
        lives = self._lives
        for request in step.arrived:
            lives[request.id] = _Life(request, self._parents.pop(request.id, None))
        for stall in self._account.record(step):
            if stall.id in lives and len(lives[stall.id].stalls) < MOST_STALLS:
                lives[stall.id].stalls.append(stall)
        for id, cached in step.cached:
            if id in lives and lives[id].scheduled is None:
                lives[id].scheduled, lives[id].cached = step.t_plan, cached
        for id in step.preempted:
            if id in lives:
                lives[id].preemptions += 1
        for id in step.emitted:
            if id in lives:
                life = lives[id]
                life.first = step.t_end if life.first is None else life.first
                life.tokens += 1
        for id, reason, _ in step.finished:
            if id in lives:
                self._span(lives.pop(id), reason, step.t_end)

    def close(self) -> None:
        """Send what is left, for as long as one message may take."""
        self._provider.force_flush(1000 * TIMEOUT_S)
        self._provider.shutdown()

    def _span(self, life: "_Life", reason: str, end: float) -> None:
        request = life.request
        span = self._tracer.start_span(
            f"text_completion {self._model}", context=life.parent, kind=SpanKind.SERVER, start_time=self._at(request.arrival)
        )
        first = life.first
        attributes: dict[str, AttributeValue | None] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": request.id,
            "gen_ai.response.finish_reasons": (reason,),
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.usage.input_tokens": request.prompt_tokens,
            "gen_ai.usage.output_tokens": life.tokens,
            "gen_ai.latency.e2e": end - request.arrival,
            "gen_ai.latency.time_in_queue": None if life.scheduled is None else life.scheduled - request.arrival,
            "gen_ai.latency.time_to_first_token": None if first is None else first - request.arrival,
            "stallfree.cached_tokens": life.cached,
            "stallfree.preemptions": life.preemptions,
            "stallfree.slo": request.slo or None,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if reason == "error":
            span.set_status(Status(StatusCode.ERROR))
        self._part(span, "queue", request.arrival, end if life.scheduled is None else life.scheduled)
        if life.scheduled is not None:
            self._part(span, "prefill", life.scheduled, end if first is None else first)
        if first is not None:
            self._part(span, "decode", first, end)
        for stall in life.stalls:
            said = {"stallfree.step": stall.step, "stallfree.cause": stall.cause, "stallfree.why": stall.words()}
            span.add_event(f"token {stall.kind}", said | {"stallfree.gap_s": stall.gap_s}, timestamp=self._at(stall.t))
        span.end(self._at(end))

    def _part(self, whole: Span, name: str, start: float, end: float) -> None:
        part = self._tracer.start_span(name, context=set_span_in_context(whole), start_time=self._at(start))
        part.end(self._at(end))

    def _at(self, t: float) -> int:
        return int((self._origin + t) * 1e9)


class _Life:
    """A request that has not ended, and what is told of it then."""

    __slots__ = ("cached", "first", "parent", "preemptions", "request", "scheduled", "stalls", "tokens")

    def __init__(self, request: Arrived, parent: Context | None):
        self.request, self.parent = request, parent
        self.scheduled: float | None = None
        self.first: float | None = None
        self.tokens = self.cached = self.preemptions = 0
        self.stalls: list[Stall] = []


def _once_in_the_log() -> None:
    """The exporter complains of every message that a collector did not take; once a minute will do."""
    last = [float("-inf")]

    def seldom(_: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - last[0] < 60:
            return False
        last[0] = now
        return True

    for name in ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).addFilter(seldom)
