"""Prometheus metrics, read off the engine's StepRecords. It knows records and the outcome of HTTP requests, nothing of the engine.

Counts come from the records. Gauges are set when somebody looks: the last record may be old, for an idle engine writes none.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stallfree.core.record import StepRecord
from stallfree.core.scheduler import Scheduler

STEP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)


class Metrics:
    """A registry of its own, so that two servers in a process do not share their counts. `record` is an Engine's callback."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"stallfree_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"stallfree_{name}", text, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"stallfree_{name}", text, registry=self.registry)

        tokens = counter("step_tokens", "Tokens computed, by phase.", "phase")
        self._prefill, self._decode = tokens.labels("prefill"), tokens.labels("decode")
        self._seconds = histogram("step_seconds", "Time of an iteration on the executor.", STEP_BUCKETS_S)
        self._errors = counter("step_errors", "Iterations that failed.")
        self._preemptions = counter("preemptions", "Running requests whose KV was given to others.")
        self._stalled = counter("stalled_decodes", "Ready decodes that got no token in an iteration.")
        self._ttft = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT_BUCKETS_S)
        self._tbt = histogram("inter_token_seconds", "Between consecutive tokens of a request.", STEP_BUCKETS_S)
        self._prompt = counter("prompt_tokens", "Prompt tokens of the requests that arrived.")
        self._cached = counter("cached_tokens", "Prompt tokens found in the prefix cache.")
        self._generation = counter("generation_tokens", "Tokens sampled.")
        self._finished = counter("requests", "Requests that ended, by reason.", "reason")
        self._running = gauge("running_requests", "Requests admitted.")
        self._waiting = gauge("waiting_requests", "Requests that wait for admission.")
        self._free_blocks = gauge("free_kv_blocks", "KV blocks that are free, or hold only what the prefix cache can drop.")
        self._since: dict[str, float] = {}
        self._decoding: set[str] = set()

    def record(self, step: StepRecord) -> None:
        """Count one iteration. Called in the engine's thread, after each."""
        for request in step.arrived:
            self._since[request.id] = request.arrival
            self._prompt.inc(request.prompt_tokens)
        decoded = sum(count for id, _, count in step.work if count == 1 and id in self._decoding)
        self._decode.inc(decoded)
        self._prefill.inc(sum(count for _, _, count in step.work) - decoded)
        self._seconds.observe(step.t_end - step.t_start)
        self._cached.inc(sum(count for _, count in step.cached))
        self._preemptions.inc(len(step.preempted))
        self._stalled.inc(len(step.stalled))
        self._generation.inc(len(step.emitted))
        if step.error is not None:
            self._errors.inc()
        for id in step.emitted:
            since = self._since.get(id)
            if since is not None:  # aborted requests' last tokens come after their end
                (self._tbt if id in self._decoding else self._ttft).observe(step.t_end - since)
                self._since[id] = step.t_end
                self._decoding.add(id)
        for id, reason, _ in step.finished:
            self._finished.labels(reason).inc()
            self._since.pop(id, None)
            self._decoding.discard(id)

    def expose(self, scheduler: Scheduler) -> bytes:
        """The text format, with the gauges as they are now."""
        self._running.set(len(scheduler.running))
        self._waiting.set(len(scheduler.queue))
        self._free_blocks.set(scheduler.pool.num_free)
        return generate_latest(self.registry)
