"""Sends a span for every request to an OpenTelemetry collector: when it waited, was prefilled and decoded, and what stalled it.

The engine's thread only queues ended requests; a separate thread makes and sends the spans. While the collector is slow or down,
requests that find the queue full are dropped. It knows sizes and times of a request, never its prompt, text or key.
"""

import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from stallfree import extra
from stallfree.core.record import StepRecord
from stallfree.metrics.stalls import Ended, Stall, StallAccount

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

WAITING = 2048
"""At most this many ended requests wait to be sent; more are dropped."""
AT_ONCE = 128
CALLS = 4096
"""The calls of at most this many requests are remembered: more than the server takes by default."""
STALLS = 32
"""At most this many stalls of one request become events."""
TIMEOUT_S = 5.0
"""Seconds for one attempt to send, and for the last one when the server stops."""


class HttpCall(NamedTuple):
    """The HTTP side of a request: its `operation`, by OpenTelemetry's name, and its caller's W3C trace headers."""

    operation: str
    headers: Mapping[str, str]


class Traces:
    """Sends spans by `exporter`. The event loop calls `note_call`, the engine's thread `record`. `clock` (s) is the engine's."""

    def __init__(self, model: str, clock: Callable[[], float], exporter: "SpanExporter"):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "stallfree")})
        self._tracer = TracerProvider(resource=resource, shutdown_on_exit=False).get_tracer("stallfree")
        self._propagator = TraceContextTextMapPropagator()
        self._model, self._clock, self._exporter = model, clock, exporter
        self._calls: OrderedDict[str, HttpCall] = OrderedDict()
        self._stalls: dict[str, list[Stall]] = {}
        self._ended: queue.Queue[tuple[Ended, list[Stall]] | None] = queue.Queue(WAITING)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def note_call(self, ids: Sequence[str], operation: str, headers: Mapping[str, str]) -> None:
        """Remember the HTTP call that made the requests `ids`. Call it before they are submitted."""
        call = HttpCall(operation, {name: headers[name] for name in ("traceparent", "tracestate") if name in headers})
        for id in ids:
            self._calls[id] = call
        while len(self._calls) > CALLS:  # refused requests never end
            self._calls.popitem(last=False)

    def record(self, step: StepRecord, account: StallAccount) -> None:
        """Note the stalls and ended requests of the iteration `step`, which `account` has judged."""
        for stall in account.stalls:
            kept = self._stalls.setdefault(stall.id, [])
            if len(kept) < STALLS:
                kept.append(stall)
        for ended in account.ended:
            stalls = self._stalls.pop(ended.id, [])
            try:
                self._ended.put_nowait((ended, stalls))
            except queue.Full:
                self._calls.pop(ended.id, None)

    def close(self) -> None:
        """Send the requests that are queued. It waits twice, each time at most `TIMEOUT_S`."""
        try:
            self._ended.put(None, timeout=TIMEOUT_S)
        except queue.Full:
            log.warning("traces of the last requests are lost")
        self._thread.join(TIMEOUT_S)
        self._exporter.shutdown()

    def _run(self) -> None:
        while (first := self._ended.get()) is not None:
            batch = [first]
            while len(batch) < AT_ONCE and not self._ended.empty():
                item = self._ended.get()
                if item is None:
                    self._send(batch)
                    return
                batch.append(item)
            self._send(batch)

    def _send(self, batch: Sequence[tuple[Ended, list[Stall]]]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        spans = [span for ended, stalls in batch for span in self._spans(ended, stalls)]
        try:
            failed = bool(spans) and self._exporter.export(spans) is not SpanExportResult.SUCCESS
        except Exception:
            failed = True
        if failed and not self._failing:
            log.warning("the OpenTelemetry collector takes no traces; does it run, and is its port that of OTLP over HTTP (4318)?")
        elif self._failing and not failed:
            log.warning("the OpenTelemetry collector takes traces again")
        self._failing = failed

    def _spans(self, ended: Ended, stalls: Sequence[Stall]) -> "list[ReadableSpan]":
        """The spans of a request and of its phases; none if its caller does not sample."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        origin = time.time_ns() - int(self._clock() * 1e9)

        def at(t: float) -> int:
            return origin + int(t * 1e9)

        call = self._calls.pop(ended.id, HttpCall("text_completion", {}))
        context = self._propagator.extract(call.headers)
        name = f"{call.operation} {self._model}"
        span = self._tracer.start_span(name, context, SpanKind.SERVER, start_time=at(ended.arrival))
        if not isinstance(span, ReadableSpan):
            return []
        attributes = self._attributes(ended) | {"gen_ai.operation.name": call.operation}
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        for stall in stalls:
            span.add_event("stall", _of(stall), timestamp=at(stall.t))
        if ended.reason == "error":
            span.set_status(StatusCode.ERROR)
        spans: list[Span] = [span]
        phases = {"queue": ended.arrival, "prefill": ended.scheduled, "decode": ended.first}
        begun = [(phase, since) for phase, since in phases.items() if since is not None]
        until = [since for _, since in begun[1:]] + [ended.t]
        for (phase, since), to in zip(begun, until, strict=True):
            child = self._tracer.start_span(phase, set_span_in_context(span), start_time=at(since))
            child.end(at(to))
            spans.append(child)
        span.end(at(ended.t))
        return [span for span in spans if isinstance(span, ReadableSpan)]

    def _attributes(self, ended: Ended) -> dict[str, str | int | float | bool | list[str] | None]:
        """Attributes by OpenTelemetry's names, then by vLLM's where OpenTelemetry has no name or had another."""

        def between(since: float | None, to: float | None) -> float | None:
            return None if since is None or to is None else to - since

        ttft = between(ended.arrival, ended.first)
        return {
            "gen_ai.provider.name": "stallfree",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": [ended.reason],
            "gen_ai.response.time_to_first_chunk": ttft,
            "gen_ai.server.time_to_first_token": ttft,
            "gen_ai.usage.input_tokens": ended.prompt_tokens,
            "gen_ai.usage.output_tokens": ended.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": ended.cached_tokens,
            "gen_ai.request.id": ended.id,
            "gen_ai.usage.prompt_tokens": ended.prompt_tokens,
            "gen_ai.usage.completion_tokens": ended.output_tokens,
            "gen_ai.latency.time_to_first_token": ttft,
            "gen_ai.latency.time_in_queue": between(ended.arrival, ended.scheduled),
            "gen_ai.latency.time_in_model_prefill": between(ended.scheduled, ended.first),
            "gen_ai.latency.time_in_model_decode": between(ended.first, ended.last),
            "gen_ai.latency.time_in_model_inference": between(ended.scheduled, ended.t),
            "gen_ai.latency.e2e": ended.t - ended.arrival,
            "stallfree.late_tokens": ended.late_tokens,
            "stallfree.preemptions": ended.preemptions,
            "stallfree.slo.in_time": ended.in_time,
        }


def exporter_to(endpoint: str) -> "SpanExporter":
    """An exporter to the collector at `endpoint`, by OTLP over HTTP. ValueError for an invalid address, or without the extra."""
    address = _address(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError(f"--otlp-endpoint needs OpenTelemetry: {extra('otel')}") from None
    # It would log a warning with every batch; this module logs one per outage.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    return OTLPSpanExporter(endpoint=address, timeout=TIMEOUT_S)


def _address(endpoint: str) -> str:
    """The URL that takes traces. OTLP's path is added to an address that has none."""
    message = f"--otlp-endpoint {endpoint!r} is not the address of a collector; write http://127.0.0.1:4318"
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise ValueError(message) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(message)
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def _of(stall: Stall) -> dict[str, str | int | float]:
    return {
        "stallfree.stall.kind": stall.kind,
        "stallfree.stall.cause": stall.cause,
        "stallfree.stall.gap_s": stall.gap_s,
        "stallfree.stall.late_s": stall.late_s,
        "stallfree.stall.step": stall.blamed.step,
    }
