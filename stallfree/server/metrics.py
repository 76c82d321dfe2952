"""Prometheus metrics from the engine's StepRecords: plain numbers, which become families when a client reads /metrics.

`record` costs time in every iteration, so it updates a histogram once for all tokens that waited equally long. It knows records and
the ledger's gauges, and nothing of the engine. vLLM's names of these metrics are in `vllm_names`.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stallfree.core.draft import ENGINE_LIMIT
from stallfree.core.ledger import Ledger
from stallfree.core.record import StepRecord
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import CAUSES, TARGETS, Ended, StallAccount
from stallfree.server.sharing import Sharing
from stallfree.server.vllm_names import Aliases

REASONS = ("policy", "deadline", "engine")
"""What set the token budget: the policy's own rule, the time until a token was due, or the engine's limit. A record's reason has
times and ids in its words, and each would make a series of its own."""
FINISHED = ("stop", "length", "abort", "error")
OUTCOMES = ("delivered", "recomputed")

# vLLM's bounds, so that its dashboards find each `le` that they query; also finer ones below, for iterations of a few ms.
GAPS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
)  # fmt: skip
REQUEST_S = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
FORECAST_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
REQUEST_TOKENS = tuple(digit * 10**exponent for exponent in range(6) for digit in (1, 2, 5))


class Metrics(Collector):
    """Counts the iterations of `model`, held to `slo`. The engine's thread calls `record`, any other `expose` and `refuse`."""

    def __init__(self, model: str, slo: Slo | None = None) -> None:
        self._slo = slo or Slo()
        self._aliases = Aliases(model)
        self._slack: float | None = None
        self._oldest: tuple[str, float] | None = None
        self._lock = threading.Lock()
        self._last: StepRecord | None = None
        self._phases = {"prefill": 0, "decode": 0}
        self._reasons = dict.fromkeys(REASONS, 0)
        self._finished = dict.fromkeys(FINISHED, 0)
        self._late_s = dict.fromkeys(CAUSES, 0.0)
        self._late = dict.fromkeys(CAUSES, 0)
        self._judged = dict.fromkeys(TARGETS, 0)
        self._in_time = dict.fromkeys(TARGETS, 0)
        self._first_late_s = self._bubble_s = 0.0
        self._errors = self._preemptions = self._left_out = self._prompt = self._long_waits = self._looked_up = self._cached = (
            self._generated
        ) = 0
        self._judged_requests = self._requests_in_time = 0
        self._drafts = {"right": 0, "wrong": 0}
        self._transfers = dict.fromkeys(OUTCOMES, 0)
        self._transfer_bytes, self._transfer_s, self._decode_s = 0, 0.0, 0.0
        self._step_s, self._step_tokens = _Histogram(GAPS_S), _Histogram(STEP_TOKENS)
        self._ttft, self._tbt, self._tpot = _Histogram(TTFT_S), _Histogram(GAPS_S), _Histogram(GAPS_S)
        self._e2e, self._queue, self._prefill, self._decode, self._service = (_Histogram(REQUEST_S) for _ in range(5))
        self._prompts, self._outputs = _Histogram(REQUEST_TOKENS), _Histogram(REQUEST_TOKENS)
        self._forecasts = _Histogram(FORECAST_RATIOS)
        self._loads = _Histogram(GAPS_S)
        self._adapters: dict[str, int] = {}
        self._failed_loads = 0
        self._restored = 0
        self._sharing = Sharing()
        self._gauges: dict[str, float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def record(self, step: StepRecord, account: StallAccount) -> None:
        """Count one iteration, which `account` has judged. The engine's thread calls it after each."""
        with self._lock:
            self._prompt += sum(request.prompt_tokens for request in step.arrived)
            self._last, self._slack, self._oldest = step, account.slack, account.oldest
            tokens = sum(count for _, _, count in step.work)
            prefill = sum(count for _, count in account.iteration.prefills)
            self._phases["prefill"] += prefill
            self._phases["decode"] += tokens - prefill
            self._step_tokens.observe(tokens)
            self._step_s.observe(account.iteration.seconds)
            self._reasons[_reason(step)] += 1
            self._errors += step.error is not None
            self._bubble_s += step.bubble_s
            self._preemptions += len(step.preempted)
            self._left_out += len(step.stalled)
            self._looked_up += account.looked_up
            self._cached += account.found
            self._restored += sum(tokens for _, tokens in step.restored)
            self._generated += len(step.emitted) + len(step.sampled_elsewhere)
            checked, right = step.drafts
            self._drafts["right"] += right
            self._drafts["wrong"] += checked - right
            self._transfers["delivered"] += len(step.delivered)
            self._transfers["recomputed"] += len(step.recalled)
            self._transfer_bytes += sum(transfer.num_bytes for transfer in step.delivered)
            self._transfer_s += sum(transfer.seconds for transfer in step.delivered)
            self._tbt.observe_all(account.gaps)
            self._ttft.observe_all(account.ttfts)
            for target in TARGETS:
                self._judged[target] += account.due[target]
                self._in_time[target] += account.due[target] - account.late[target]
            self._first_late_s += account.first_late_s
            self._long_waits += len(account.waits)
            for stall in account.stalls:
                if stall.kind == "late":
                    self._late[stall.cause] += 1
                    self._late_s[stall.cause] += stall.late_s
            self._loads.observe_all([load.t - load.asked for load in step.loaded])
            self._end(account.ended)
            self._forecasts.observe_all(account.forecasts)
            self._sharing.record(account)

    def refuse(self, tenant: str, reason: str) -> None:
        """Count a request of `tenant` ("" for none) that was refused. `reason`: one of a few words, such as late."""
        with self._lock:
            self._sharing.refuse(tenant, reason)

    def expose(
        self, ledger: Ledger, now: float, prefill_engines: tuple[int, int] | None = None, prefill_room_s: float | None = None
    ) -> bytes:
        """Prometheus' text format, with the gauges at `now` (s, the run's): the last record may be old, because an idle engine
        writes none. `prefill_engines`: how many are connected and how many are configured, for an engine with KV transfers.
        `prefill_room_s`: seconds of prefill that can still be admitted, if the policy forecasts.
        """
        with self._lock:
            oldest = self._oldest
        blocks, free = ledger.capacity.num_blocks, ledger.pool.num_free
        self._gauges = {
            "running_requests": len(ledger.running),
            "waiting_requests": ledger.num_waiting,
            "kv_blocks": blocks,
            "free_kv_blocks": free,
            "kv_usage_ratio": 1 - free / blocks,
            "longest_wait_seconds": 0.0 if oldest is None else now - oldest[1],
        }
        adapters = ledger.adapters
        if adapters.known:
            self._gauges["adapter_kv_blocks"], self._gauges["adapter_waiting_requests"] = adapters.num_blocks, adapters.num_parked
        self._adapters, self._failed_loads = adapters.counts() if adapters.known else {}, adapters.num_failed
        if ledger.pool.tier is not None:
            self._gauges["host_kv_blocks"], self._gauges["used_host_kv_blocks"] = ledger.pool.tier.num_slots, len(ledger.pool.tier)
        if prefill_engines is not None:
            self._gauges["prefill_engines"], self._gauges["prefill_engines_configured"] = prefill_engines
        if prefill_room_s is not None:
            self._gauges["prefill_room_seconds"] = prefill_room_s
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every family under its own name, then all under vLLM's names."""
        with self._lock:
            families = list(self._families())
        yield from families
        for family in families:
            yield from self._aliases.of(family)

    def _end(self, requests: Sequence[Ended]) -> None:
        for ended in requests:
            self._finished[ended.reason] = self._finished.get(ended.reason, 0) + 1
            if ended.reason not in ("stop", "length"):
                continue
            if ended.in_time is not None:
                self._judged_requests += 1
                self._requests_in_time += ended.in_time
            self._e2e.observe(ended.t - ended.arrival)
            self._prompts.observe(ended.prompt_tokens)
            self._outputs.observe(ended.output_tokens)
            if ended.tpot is not None:
                self._tpot.observe(ended.tpot)
            if ended.scheduled is not None and ended.first is not None:
                self._queue.observe(ended.scheduled - ended.arrival)
                self._prefill.observe(ended.first - ended.scheduled)
                self._decode.observe(ended.t - ended.first)
                self._decode_s += ended.t - ended.first
                self._service.observe(ended.t - ended.scheduled)

    def _families(self) -> Iterator[Metric]:
        step, slo = self._last, {name: getattr(self._slo, name) for name in TARGETS}
        targets = {name: target for name, target in slo.items() if target is not None}
        yield _counter("step_tokens", "Tokens computed, by phase.", self._phases, "phase")
        yield self._step_tokens.family("tokens_per_step", "Tokens of an iteration, prefill and decode.")
        yield self._step_s.family("step_seconds", "Time of an iteration on the executor.")
        yield _counter("step_errors", "Iterations that failed.", self._errors)
        yield _counter("pipeline_bubble_seconds", "Time that pipeline stages waited while there was work.", self._bubble_s)
        yield _counter("steps", "Iterations, by what set their token budget.", self._reasons, "reason")
        yield _gauge("budget_tokens", "Token budget of the last iteration.", None if step is None else step.budget)
        yield _gauge("limit_seconds", "Time that the policy allowed the last iteration.", None if step is None else step.limit_s)
        yield _gauge("margin_ratio", "Factor by which the policy multiplies expected times.", None if step is None else step.margin)
        slack = "Time from the planning of the last iteration until its first decode was due; below 0: it was already late."
        yield _gauge("slack_seconds", slack, self._slack)
        yield _counter("decode_stall_seconds", "Lateness of tokens that came after they were due.", self._late_s, "cause")
        yield _counter("late_tokens", "Tokens that came after they were due, without first tokens.", self._late, "cause")
        yield _counter("first_token_late_seconds", "Lateness of first tokens.", self._first_late_s)
        yield _counter("long_waits", "First tokens later than their target, or than 10 s without one.", self._long_waits)
        yield _counter("stalled_decodes", "Ready decodes that got no token in an iteration.", self._left_out)
        yield _counter("slo_tokens", "Tokens with a deadline, by target.", self._judged, "target")
        yield _counter("slo_tokens_in_time", "Tokens with a deadline that came in time, by target.", self._in_time, "target")
        yield _counter("slo_requests", "Requests with a target that were neither aborted nor failed.", self._judged_requests)
        yield _counter("slo_requests_in_time", "Requests that met all their targets.", self._requests_in_time)
        seconds = {name: target.seconds for name, target in targets.items()}
        yield _gauge("slo_target_seconds", "The server's targets.", seconds, "target")
        shares = {name: target.percentile / 100 for name, target in targets.items()}
        yield _gauge("slo_target_ratio", "Share of tokens that should be in time.", shares, "target")
        yield self._ttft.family("time_to_first_token_seconds", "From a request's arrival to its first token.")
        yield self._tbt.family("inter_token_seconds", "Between consecutive tokens of a request.")
        yield self._tpot.family("request_tpot_seconds", "Mean time between the tokens of a request.")
        yield self._e2e.family("request_seconds", "From a request's arrival to its end.")
        yield self._queue.family("request_queue_seconds", "From a request's arrival to its first iteration.")
        yield self._prefill.family("request_prefill_seconds", "From a request's first iteration to its first token.")
        yield self._decode.family("request_decode_seconds", "From a request's first token to its end.")
        yield self._service.family("request_service_seconds", "From a request's first iteration to its end.")
        yield self._prompts.family("request_prompt_tokens", "Prompt tokens of a request.")
        yield self._outputs.family("request_output_tokens", "Tokens sampled for a request.")
        yield _counter("requests", "Requests that ended, by reason.", self._finished, "reason")
        yield _counter("preemptions", "Running requests whose KV was taken back.", self._preemptions)
        yield _counter("prompt_tokens", "Prompt tokens of the requests that arrived.", self._prompt)
        yield _counter("generation_tokens", "Tokens sampled.", self._generated)
        yield _counter("draft_tokens", "Guessed tokens that iterations checked.", sum(self._drafts.values()))
        yield _counter("accepted_draft_tokens", "Guessed tokens that were right.", self._drafts["right"])
        yield _counter("prefix_lookup_tokens", "Tokens that were looked up in the prefix cache.", self._looked_up)
        yield _counter("cached_tokens", "Prompt tokens found in the prefix cache.", self._cached)
        yield _counter("restored_tokens", "Tokens of requests whose KV came back from host memory.", self._restored)
        yield _counter("kv_transfers", "KV transfers from prefill engines, by outcome.", self._transfers, "outcome")
        yield _counter("kv_transfer_bytes", "Bytes of KV received from prefill engines.", self._transfer_bytes)
        yield _counter("kv_transfer_seconds", "Time spent copying, sending and receiving this KV.", self._transfer_s)
        share = self._transfer_s / self._decode_s if self._decode_s else None
        yield _gauge("kv_transfer_ratio", "KV transfer seconds over the seconds from first tokens to ends of all requests.", share)
        yield self._forecasts.family("first_token_forecast_ratio", "Actual over forecast time to first token.")
        yield from self._sharing.families()
        yield _gauge("adapters", "Adapters, by where their weights are.", self._adapters, "state")
        yield self._loads.family("adapter_load_seconds", "From the moment an adapter was asked for to its weights' arrival.")
        yield _counter(
            "adapter_load_failures", "Loads of adapters that failed, which ended the requests that waited.", self._failed_loads
        )
        for name, text in GAUGES.items():
            yield _gauge(name, text, self._gauges.get(name))


GAUGES = {
    "running_requests": "Requests admitted.",
    "waiting_requests": "Requests that wait for admission.",
    "kv_blocks": "All KV blocks of the engine.",
    "free_kv_blocks": "KV blocks that are free, or hold only KV that the prefix cache can drop.",
    "kv_usage_ratio": "Share of the KV blocks that running requests hold.",
    "longest_wait_seconds": "How long the oldest request without a first token has waited for it.",
    "prefill_room_seconds": "Seconds of prefill that can still be admitted within the target for TTFT.",
    "adapter_kv_blocks": "KV blocks that hold the weights of adapters.",
    "adapter_waiting_requests": "Requests that wait for their adapter's weights.",
    "host_kv_blocks": "KV blocks that host memory has room for, beside those of the engine.",
    "used_host_kv_blocks": "KV blocks in host memory.",
    "prefill_engines": "Prefill engines that are connected.",
    "prefill_engines_configured": "Prefill engines that are configured.",
}


class _Histogram:
    """Counts values by the first of `bounds` that they do not exceed, and sums them."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = (*bounds, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, number: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += number
        self._sum += value * number

    def observe_all(self, values: list[float]) -> None:
        for value, number in Counter(values).items():  # most tokens of an iteration waited equally long
            self.observe(value, number)

    def family(self, name: str, text: str) -> Metric:
        buckets = [
            ("+Inf" if bound == inf else str(float(bound)), count)
            for bound, count in zip(self._bounds, accumulate(self._counts), strict=True)
        ]
        family = HistogramMetricFamily(f"stallfree_{name}", text)
        family.add_metric([], buckets, self._sum)
        return family


def _counter(name: str, text: str, values: float | Mapping[str, float], label: str = "") -> Metric:
    return _filled(CounterMetricFamily(f"stallfree_{name}", text, labels=[label] if label else []), values)


def _gauge(name: str, text: str, values: float | Mapping[str, float] | None, label: str = "") -> Metric:
    """A gauge; without a sample if `values` is None."""
    return _filled(GaugeMetricFamily(f"stallfree_{name}", text, labels=[label] if label else []), {} if values is None else values)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, values: float | Mapping[str, float]
) -> CounterMetricFamily | GaugeMetricFamily:
    if isinstance(values, Mapping):
        for label, value in values.items():
            family.add_metric([label], value)
    else:
        family.add_metric([], values)
    return family


def _reason(step: StepRecord) -> str:
    if step.reason == ENGINE_LIMIT:
        return "engine"
    return "policy" if step.limit_s is None else "deadline"
