"""Prometheus metrics, read off the engine's StepRecords, under names of our own and under vLLM's, so that its dashboards work here.

Each number is kept once, and named when somebody looks. Gauges of now come from the scheduler then: the last record may be old, for
an idle engine writes none. It knows records, targets and the scheduler's counts, nothing of HTTP.
"""

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from stallfree.core.record import Arrived, StepRecord
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.metrics.stalls import StallAccount

STEP_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 250.0)
TOKENS = tuple(float(1 << k) for k in range(16))
WINDOW_S = 60
"""Seconds that the gauge of the attainment reaches back."""

Labels = Mapping[str, str]


class Metrics:
    """What has been served under the name `model`, by `slo` and what requests asked for. `record` is an Engine's callback."""

    def __init__(self, model: str, slo: Slo | None = None):
        self._vllm = {"model_name": model, "engine": "0"}
        self._slo = slo or Slo()
        self._pace = "tpot" if self._slo.tpot else "tbt"
        self._account = StallAccount(self._slo)
        self._lives: dict[str, _Life] = {}
        self._recent: deque[tuple[int, Counter[str], Counter[str]]] = deque(maxlen=WINDOW_S + 1)
        self._counts: Counter[str] = Counter()
        self._phases = Counter({"prefill": 0, "decode": 0})
        self._ended = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self._reasons: Counter[str] = Counter()
        self._stalls: Counter[tuple[str, str]] = Counter()
        self._stall_s: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._cases: Counter[str] = Counter()
        self._late: Counter[str] = Counter()
        self._step_s, self._step_tokens = _Histogram(STEP_S), _Histogram(TOKENS)
        self._ttft, self._tbt = _Histogram(REQUEST_S), _Histogram(STEP_S)
        self._times = {name: _Histogram(REQUEST_S) for name in ("queue", "prefill", "decode", "inference", "e2e")}
        self._prompts, self._outputs = _Histogram(TOKENS), _Histogram(TOKENS)
        self._last: dict[str, float] = {}

    def record(self, step: StepRecord) -> None:
        """Count one iteration. Called in the engine's thread, after each."""
        account, lives, counts = self._account, self._lives, self._counts
        for request in step.arrived:
            lives[request.id] = _Life(request, self._slo)
            counts["prompt"] += request.prompt_tokens
        stalls = account.record(step)
        prefill = sum(count for _, count in account.iteration.prefills)
        self._phases["prefill"] += prefill
        self._phases["decode"] += account.iteration.decodes
        self._step_s.add(account.iteration.seconds)
        self._step_tokens.add(prefill + account.iteration.decodes)
        for value, number in Counter(account.gaps).items():  # most of an iteration's tokens waited equally long
            self._tbt.add(value, number)
        for id, cached in step.cached:
            if id in lives and lives[id].scheduled is None:
                lives[id].scheduled = step.t_plan
                counts["queried"] += lives[id].prompt_tokens
                counts["cached"] += cached
        counts["preempted"] += len(step.preempted)
        counts["emitted"] += len(step.emitted)
        counts["errors"] += step.error is not None
        self._reasons[_reason(step)] += 1
        self._last = {"budget": step.budget, "limit": step.limit_s or 0.0, "margin": step.margin or 0.0, "slack": account.slack}
        cases, late = Counter[str](), Counter[str]()
        for stall in stalls:
            key = stall.kind, stall.cause
            self._stalls[key] += 1
            self._stall_s[key] += stall.late_s if stall.kind == "late" else account.iteration.seconds
            if stall.kind == "late":
                late[self._pace] += 1
                lives[stall.id].late += 1
        cases[self._pace] = account.judged
        for id in step.emitted:
            life = lives.get(id)
            if life is None:  # aborted requests' last tokens come after their end
                continue
            if life.first is None:
                life.first = step.t_end
                self._ttft.add(step.t_end - life.arrival)
                if life.slo.ttft is not None:
                    cases["ttft"] += 1
                    late["ttft"] += not life.in_time
            life.tokens += 1
        for id, reason, _ in step.finished:
            self._ended[reason] += 1
            if id in lives:
                self._end(lives.pop(id), reason, step.t_end)
        self._judge(int(step.t_end), cases, late)

    def expose(self, scheduler: Scheduler, now: float) -> bytes:
        """The text format, at `now` (s, the run's)."""
        registry = CollectorRegistry()
        registry.register(_Families([*self._own(scheduler, now), *self._aliases(scheduler)]))
        return generate_latest(registry)

    def _end(self, life: "_Life", reason: str, t: float) -> None:
        self._prompts.add(life.prompt_tokens)
        self._outputs.add(life.tokens)
        self._times["e2e"].add(t - life.arrival)
        if life.scheduled is not None:
            self._times["queue"].add(life.scheduled - life.arrival)
            self._times["inference"].add(t - life.scheduled)
            if life.first is not None:
                self._times["prefill"].add(life.first - life.scheduled)
                self._times["decode"].add(t - life.first)
        self._counts["good"] += reason in ("stop", "length") and life.good

    def _judge(self, second: int, cases: Counter[str], late: Counter[str]) -> None:
        self._cases.update(cases)
        self._late.update(late)
        if not self._recent or self._recent[-1][0] != second:
            self._recent.append((second, Counter(), Counter()))
        self._recent[-1][1].update(cases)
        self._recent[-1][2].update(late)

    def _own(self, scheduler: Scheduler, now: float) -> Iterable[Metric]:
        counts, last = self._counts, self._last
        yield _counter("stallfree_step_tokens", "Tokens computed, by phase.", "phase", self._phases)
        yield self._step_s.family("stallfree_step_seconds", "Time of an iteration on the executor.")
        yield _counter("stallfree_step_errors", "Iterations that failed.", "", {"": counts["errors"]})
        yield _counter("stallfree_preemptions", "Running requests whose KV was given to others.", "", {"": counts["preempted"]})
        yield self._ttft.family("stallfree_time_to_first_token_seconds", "From a request's arrival to its first token.")
        yield self._tbt.family("stallfree_inter_token_seconds", "Between consecutive tokens of a request.")
        yield _counter("stallfree_prompt_tokens", "Prompt tokens of the requests that arrived.", "", {"": counts["prompt"]})
        yield _counter("stallfree_cached_tokens", "Prompt tokens found in the prefix cache.", "", {"": counts["cached"]})
        yield _counter("stallfree_generation_tokens", "Tokens sampled.", "", {"": counts["emitted"]})
        yield _counter("stallfree_requests", "Requests that ended, by reason.", "reason", self._ended)
        yield _counter("stallfree_good_requests", "Requests that met all their targets.", "", {"": counts["good"]})
        stalls = CounterMetricFamily(
            "stallfree_decode_stalls",
            "Ready decodes left out of an iteration, and tokens that came late.",
            labels=("kind", "cause"),
        )
        seconds = CounterMetricFamily(
            "stallfree_decode_stall_seconds", "Seconds that those sat out, or came after they were due.", labels=("kind", "cause")
        )
        for key in list(self._stalls):
            stalls.add_metric(key, self._stalls[key])
            seconds.add_metric(key, self._stall_s[key])
        yield from (stalls, seconds)
        yield _counter("stallfree_slo_cases", "Tokens that had a target, by target.", "target", self._cases)
        yield _counter("stallfree_slo_late", "Those of them that missed it.", "target", self._late)
        yield _gauge("stallfree_slo_attainment", f"Share in time over the last {WINDOW_S} s.", "target", self._attained(now))
        targets = {n: t.seconds for n in ("ttft", "tbt", "tpot") if (t := getattr(self._slo, n)) is not None}
        yield _gauge("stallfree_slo_target_seconds", "The server's targets.", "target", targets)
        yield _counter("stallfree_steps", "Iterations, by what set their token budget.", "reason", self._reasons)
        yield _gauge("stallfree_budget_tokens", "Token budget of the latest iteration.", "", _present(last, "budget"))
        yield _gauge("stallfree_limit_seconds", "Time that the policy allowed it; 0 without a limit.", "", _present(last, "limit"))
        yield _gauge(
            "stallfree_margin", "What expected times are multiplied with; 0 without a limit.", "", _present(last, "margin")
        )
        slack = {"": last["slack"]} if last.get("slack", float("inf")) < float("inf") else {}
        yield _gauge("stallfree_slack_seconds", "Least time before it was due at which a token of it came.", "", slack)
        yield _gauge("stallfree_running_requests", "Requests admitted.", "", {"": len(scheduler.running)})
        yield _gauge("stallfree_waiting_requests", "Requests that wait for admission.", "", {"": len(scheduler.queue)})
        free = "KV blocks that are free, or hold only what the prefix cache can drop."
        yield _gauge("stallfree_free_kv_blocks", free, "", {"": scheduler.pool.num_free})
        yield _gauge("stallfree_kv_blocks", "KV blocks there are.", "", {"": scheduler.pool.num_blocks})

    def _aliases(self, scheduler: Scheduler) -> Iterable[Metric]:
        """vLLM's names, with its labels; docs/metrics.md has the table."""
        counts, label = self._counts, self._vllm
        used = 1 - scheduler.pool.num_free / scheduler.pool.num_blocks
        for name, text, value in (
            ("num_requests_running", "Requests in model execution batches.", float(len(scheduler.running))),
            ("num_requests_waiting", "Requests waiting to be processed.", float(len(scheduler.queue))),
            ("kv_cache_usage_perc", "KV-cache usage; 1 is all of it.", used),
            ("gpu_cache_usage_perc", "The older name of kv_cache_usage_perc.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=tuple(label))
            gauge.add_metric(tuple(label.values()), value)
            yield gauge
        for name, text, count in (
            ("num_preemptions", "Preemptions.", counts["preempted"]),
            ("prompt_tokens", "Prompt tokens.", counts["prompt"]),
            ("generation_tokens", "Tokens sampled.", counts["emitted"]),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", counts["queried"]),
            ("prefix_cache_hits", "Prompt tokens found there.", counts["cached"]),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=tuple(label))
            counter.add_metric(tuple(label.values()), count)
            yield counter
        success = CounterMetricFamily("vllm:request_success", "Requests that ended.", labels=(*label, "finished_reason"))
        for reason, count in self._ended.items():
            success.add_metric((*label.values(), reason), count)
        yield success
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token.", self._ttft),
            ("inter_token_latency_seconds", "Between consecutive tokens of a request.", self._tbt),
            ("time_per_output_token_seconds", "The older name of inter_token_latency_seconds.", self._tbt),
            ("e2e_request_latency_seconds", "Arrival to end.", self._times["e2e"]),
            ("request_queue_time_seconds", "Arrival to first scheduled.", self._times["queue"]),
            ("request_prefill_time_seconds", "First scheduled to first token.", self._times["prefill"]),
            ("request_decode_time_seconds", "First token to end.", self._times["decode"]),
            ("request_inference_time_seconds", "First scheduled to end.", self._times["inference"]),
            ("request_prompt_tokens", "Prompt tokens of a request.", self._prompts),
            ("request_generation_tokens", "Output tokens of a request.", self._outputs),
            ("iteration_tokens_total", "Tokens of an iteration.", self._step_tokens),
        ):
            yield histogram.family(f"vllm:{name}", text, label)

    def _attained(self, now: float) -> dict[str, float]:
        cases, late = Counter[str](), Counter[str]()
        for second, some, missed in list(self._recent):
            if now - WINDOW_S <= second:
                cases.update(some)
                late.update(missed)
        return {target: 1 - late[target] / count for target, count in cases.items() if count}


class _Life:
    """A request that has not ended, and what is needed of it at its end."""

    __slots__ = ("arrival", "first", "late", "prompt_tokens", "scheduled", "slo", "tokens")

    def __init__(self, request: Arrived, slo: Slo):
        self.arrival = request.arrival
        self.prompt_tokens = request.prompt_tokens
        self.slo = Slo.parse(request.slo).within(slo) if request.slo else slo
        self.scheduled: float | None = None
        self.first: float | None = None
        self.tokens = self.late = 0

    @property
    def in_time(self) -> bool:
        """Whether the first token was."""
        return self.slo.ttft is None or (self.first is not None and self.first - self.arrival <= self.slo.ttft.seconds)

    @property
    def good(self) -> bool:
        """Whether all targets were met, those of pace by the request's own tokens."""
        pace = self.slo.tbt or self.slo.tpot
        return self.in_time and (pace is None or self.late <= pace.late_share * max(0, self.tokens - 1) + 1e-9)


class _Histogram:
    """Values counted in buckets up to each of `bounds`; many at once, which prometheus_client's own cannot."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, number: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += number
        self._sum += value * number

    def family(self, name: str, text: str, labels: Labels | None = None) -> Metric:
        labels = labels or {}
        names = [*map(str, self._bounds), "+Inf"]
        made = HistogramMetricFamily(name, text, labels=tuple(labels))
        made.add_metric(tuple(labels.values()), list(zip(names, accumulate(self._counts), strict=True)), self._sum)
        return made


class _Families(Collector):
    """Metrics that were read already."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _reason(step: StepRecord) -> str:
    """What set the budget, as one of few words."""
    if step.limit_s is not None:
        return "deadline"
    words = step.reason.partition(":")[0]
    return words if words in ("nobody decodes", "fixed token budget", "the engine's limit") else "policy"


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    made = CounterMetricFamily(name, text, labels=(label,) if label else ())
    for key, value in list(values.items()):
        made.add_metric((key,) if label else (), value)
    return made


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    made = GaugeMetricFamily(name, text, labels=(label,) if label else ())
    for key, value in list(values.items()):
        made.add_metric((key,) if label else (), value)
    return made


def _present(values: Mapping[str, float], name: str) -> dict[str, float]:
    return {"": values[name]} if name in values else {}
