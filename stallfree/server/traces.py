"""A span for every request, sent to an OpenTelemetry collector: when it waited, was prefilled and decoded, and what stalled it.

The engine's thread only notes what ended; spans are made and sent in a thread of its own, and dropped while a collector that is
slow or down holds it up. It knows sizes and times of a request, never its prompt, text or key.
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
"""Ended requests that wait to be sent; more are dropped."""
AT_ONCE = 128
CALLS = 4096
"""Requests whose operation and parent are remembered: more than can be in the server by default."""
STALLS = 32
"""Stalls of one request that become events."""
TIMEOUT_S = 5.0
"""For one attempt to send, and for the last one when the server stops."""


class Told(NamedTuple):
    """What the HTTP side knows of a request: its `operation`, by OpenTelemetry's name, and the W3C headers of its caller."""

    operation: str
    headers: Mapping[str, str]


class Traces:
    """`told` is for the event loop's thread, `record` for the engine's. `clock` is the engine's (s), `exporter` sends."""

    def __init__(self, model: str, clock: Callable[[], float], exporter: "SpanExporter"):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "stallfree")})
        self._tracer = TracerProvider(resource=resource, shutdown_on_exit=False).get_tracer("stallfree")
        self._propagator = TraceContextTextMapPropagator()
        self._model, self._clock, self._exporter = model, clock, exporter
        self._calls: OrderedDict[str, Told] = OrderedDict()
        self._stalls: dict[str, list[Stall]] = {}
        self._ended: queue.Queue[tuple[Ended, list[Stall]] | None] = queue.Queue(WAITING)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def told(self, ids: Sequence[str], operation: str, headers: Mapping[str, str]) -> None:
        """What there is to know of the requests `ids` beside their records. Call it before they are submitted."""
        about = Told(operation, {name: headers[name] for name in ("traceparent", "tracestate") if name in headers})
        for id in ids:
            self._calls[id] = about
        while len(self._calls) > CALLS:  # those refused never end
            self._calls.popitem(last=False)

    def record(self, step: StepRecord, account: StallAccount) -> None:
        """Note what the iteration `step`, which `account` has just judged, stalled and ended."""
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
        """Send what is there, but wait no longer than a while for it."""
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
            log.warning("the OpenTelemetry collector takes no traces; is it there, and its port that of OTLP over HTTP (4318)?")
        elif self._failing and not failed:
            log.warning("the OpenTelemetry collector takes traces again")
        self._failing = failed

    def _spans(self, ended: Ended, stalls: Sequence[Stall]) -> "list[ReadableSpan]":
        """The request's span and those of its phases; none if its caller does not sample."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        origin = time.time_ns() - int(self._clock() * 1e9)

        def at(t: float) -> int:
            return origin + int(t * 1e9)

        told = self._calls.pop(ended.id, Told("text_completion", {}))
        context = self._propagator.extract(told.headers)
        name = f"{told.operation} {self._model}"
        span = self._tracer.start_span(name, context, SpanKind.SERVER, start_time=at(ended.arrival))
        if not isinstance(span, ReadableSpan):
            return []
        attributes = self._attributes(ended) | {"gen_ai.operation.name": told.operation}
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        for stall in stalls:
            span.add_event("stall", _of(stall), timestamp=at(stall.t))
        if ended.reason == "error":
            span.set_status(StatusCode.ERROR)
        made: list[Span] = [span]
        phases = {"queue": ended.arrival, "prefill": ended.scheduled, "decode": ended.first}
        begun = [(phase, since) for phase, since in phases.items() if since is not None]
        until = [since for _, since in begun[1:]] + [ended.t]
        for (phase, since), to in zip(begun, until, strict=True):
            child = self._tracer.start_span(phase, set_span_in_context(span), start_time=at(since))
            child.end(at(to))
            made.append(child)
        span.end(at(ended.t))
        return [one for one in made if isinstance(one, ReadableSpan)]

    def _attributes(self, ended: Ended) -> dict[str, str | int | float | bool | list[str] | None]:
        """OpenTelemetry's names, then vLLM's for what has none there or had another."""

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
    """Sends to the collector at `endpoint`, by OTLP over HTTP. ValueError for what is no such address, or without the extra."""
    address = _address(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ValueError(f"--otlp-endpoint needs OpenTelemetry: {extra('otel')}") from None
    # Its own lines would come with every batch; ours comes once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    return OTLPSpanExporter(endpoint=address, timeout=TIMEOUT_S)


def _address(endpoint: str) -> str:
    """The URL that takes traces: a collector's address has no path of its own."""
    wrong = f"--otlp-endpoint {endpoint!r} is not the address of a collector; write http://127.0.0.1:4318"
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise ValueError(wrong) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(wrong)
    return endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def _of(stall: Stall) -> dict[str, str | int | float]:
    return {
        "stallfree.stall.kind": stall.kind,
        "stallfree.stall.cause": stall.cause,
        "stallfree.stall.gap_s": stall.gap_s,
        "stallfree.stall.late_s": stall.late_s,
        "stallfree.stall.step": stall.blamed.step,
    }
