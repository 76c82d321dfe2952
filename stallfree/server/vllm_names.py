"""This server's metrics under vLLM's names for the same things, so that dashboards and load tools made for vLLM work here.

It counts nothing: it copies finished families under other names. Names, labels and bounds are those of vLLM's
`vllm/v1/metrics/loggers.py`. Where vLLM has renamed a metric, both of its names are here.
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

NAMES = {
    "running_requests": ("num_requests_running",),
    "waiting_requests": ("num_requests_waiting",),
    "kv_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "preemptions": ("num_preemptions",),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "draft_tokens": ("spec_decode_num_draft_tokens",),
    "accepted_draft_tokens": ("spec_decode_num_accepted_tokens",),
    "prefix_lookup_tokens": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "cached_tokens": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
    "tokens_per_step": ("iteration_tokens_total",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "request_tpot_seconds": ("request_time_per_output_token_seconds",),
    "request_seconds": ("e2e_request_latency_seconds",),
    "request_queue_seconds": ("request_queue_time_seconds",),
    "request_prefill_seconds": ("request_prefill_time_seconds",),
    "request_decode_seconds": ("request_decode_time_seconds",),
    "request_service_seconds": ("request_inference_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_output_tokens": ("request_generation_tokens",),
    "requests": ("request_success",),
}
"""This server's name -> vLLM's names, without `stallfree_`, `vllm:` and the `_total` of counters."""
LABELS = {"reason": "finished_reason"}


class Aliases:
    """Labels every series as vLLM does: with the served `model`, and with the engine's number, which is always 0."""

    def __init__(self, model: str):
        self._labels = {"model_name": model, "engine": "0"}

    def of(self, family: Metric) -> Iterator[Metric]:
        """`family`, once under each of its names in vLLM."""
        for name in NAMES.get(family.name.removeprefix("stallfree_"), ()):
            alias = Metric(f"vllm:{name}", f"{family.documentation} vLLM's name of {family.name}.", family.type)
            for sample in family.samples:
                labels = {LABELS.get(label, label): value for label, value in sample.labels.items()}
                renamed = alias.name + sample.name.removeprefix(family.name)
                alias.samples.append(Sample(renamed, self._labels | labels, sample.value))
            yield alias
