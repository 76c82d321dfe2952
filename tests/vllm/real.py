"""vLLM's real schedulers without a model: a stub answers for the model runner."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK = 16
LONGEST = 4096
HIDDEN = 64
_hasher: list[Any] = []


def model_folder(path: Path, vocabulary: int = 50_000) -> Path:
    (path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": HIDDEN,
                "intermediate_size": HIDDEN,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "vocab_size": vocabulary,
                "max_position_embeddings": LONGEST,
            }
        )
    )
    return path


def scheduler(
    cls: Any,
    folder: Path,
    *,
    blocks: int = 2000,
    seqs: int = 64,
    tokens: int = 512,
    caching: bool = False,
    ahead: bool = False,
    threshold: int = 0,
    queue: str = "fcfs",
    chunked: bool = True,
    connector: bool = False,
    **parallel: Any,
) -> Any:
    """A scheduler of class `cls`, with `blocks` usable KV blocks; `ahead`: asynchronous scheduling; `connector`: with the one of
    connector.py."""
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=LONGEST)
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_model_len=LONGEST,
            is_encoder_decoder=False,
            long_prefill_token_threshold=threshold,
            policy=queue,
            enable_chunked_prefill=chunked,
        ),
        device_config=DeviceConfig("cpu"),
    )
    config.scheduler_config.async_scheduling = ahead  # vLLM switches it off on a processor
    if connector:
        config.kv_transfer_config = KVTransferConfig(
            kv_connector="Remote", kv_role="kv_both", kv_connector_module_path="tests.vllm.connector"
        )
        config.scheduler_config.disable_hybrid_kv_cache_manager = True  # vLLM asks for it with such a connector
    for name, value in parallel.items():
        setattr(config.parallel_config, name, value)
    config.cache_config.num_gpu_blocks = blocks + 1  # the first is never used
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
    kv = KVCacheConfig(num_blocks=blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return cls(
        vllm_config=config,
        kv_cache_config=kv,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def request(id: str, prompt: Sequence[int], tokens: int, *, arrival: float = 0.0, priority: int = 0, **extra: Any) -> Request:
    if not _hasher:
        init_none_hash(sha256)
        _hasher.append(get_request_block_hasher(BLOCK, sha256))
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, extra_args=extra or None)
    return Request(
        request_id=id,
        prompt_token_ids=list(prompt),
        sampling_params=sampling,
        pooling_params=None,
        arrival_time=arrival,
        priority=priority,
        block_hasher=_hasher[0],
    )


@dataclass
class Runner:
    """Answers for the model: every request that has all its tokens computed gets its position as the next token."""

    scheduler: Any
    seconds: Callable[[Sequence[tuple[int, int]]], float] = lambda shape: 0.01
    now: float = 0.0
    shapes: list[dict[str, int]] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    """Requests whose KV has come from elsewhere since the last iteration."""
    _waiting: list[tuple[Any, dict[str, int], float]] = field(default_factory=list)
    _free_at: float = 0.0

    def clock(self) -> float:
        return self.now

    @property
    def idle(self) -> bool:
        return not self.scheduler.requests and not any(output.num_scheduled_tokens for output, _, _ in self._waiting)

    def step(self) -> bool:
        """One iteration, from its schedule to its end; with asynchronous scheduling the next one is scheduled before the end.
        Returns whether anything was computed."""
        ahead = self.scheduler.scheduler_config.async_scheduling
        while len(self._waiting) < (2 if ahead else 1):
            self._waiting.append(self._scheduled())
        output, samples, shape_s = self._waiting.pop(0)
        self._free_at = self.now = max(self.now, self._free_at) + shape_s
        ids = list(output.num_scheduled_tokens)
        tokens = [[samples[id]] if id in samples else [] for id in ids]
        for id in samples:
            self.times.setdefault(id, []).append(self.now)
        result = ModelRunnerOutput(ids, {id: i for i, id in enumerate(ids)}, tokens)
        if self.received:
            result.kv_connector_output = KVConnectorOutput(finished_recving=self.received)
            self.received = set()
        self.scheduler.update_from_output(output, result)
        return bool(ids)

    def _scheduled(self) -> tuple[Any, dict[str, int], float]:
        output = self.scheduler.schedule()
        self.scheduler.get_grammar_bitmask(output)
        given = output.num_scheduled_tokens
        self.shapes.append(dict(given))
        requests = self.scheduler.requests
        shape = [(requests[id].num_computed_tokens - count, count) for id, count in given.items()]
        samples = {id: requests[id].num_computed_tokens for id in given if not requests[id].is_prefill_chunk}
        return output, samples, self.seconds(shape) if given else 0.0
