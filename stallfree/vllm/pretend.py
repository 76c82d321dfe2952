"""A device that is not there: a vLLM worker that computes nothing, takes as long as a model would on a GPU by `perf.roofline`, and
answers with made-up tokens. So vLLM's whole server and its real scheduler run at a GPU's speed on any machine.

Only the kernels' time is pretended. The host's part is real, and is this machine's. Unlike on a GPU, it does not overlap with the
kernels, because vLLM schedules a processor's iterations one after the other.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from stallfree.core.plan import Shape
from stallfree.perf import hardware as devices
from stallfree.perf import shape as models
from stallfree.perf.hardware import Hardware
from stallfree.perf.roofline import Roofline
from stallfree.sim.simulate import scattering

OPTION = "stallfree_pretend"
"""The name in vLLM's `--additional-config` under which `Pretended` is found."""

SPIN_S = 0.0003
"""The end of a wait that is not slept through, because a sleep may last that much longer."""

TOKENS = range(1000, 20000)
"""The tokens to answer with: of the middle of a vocabulary, where no control tokens are."""


class OneProcess(UniProcExecutor):
    """vLLM's executor for one GPU. On a processor vLLM would replace it by one with a process more."""


class PretendWorker(WorkerBase):
    """Takes `{"hardware": ..., "model": ..., "tp": ..., "scatter": [...]}` from `--additional-config` (see `OPTION`): names as in
    `stallfree list`, and factors of which each iteration's time is multiplied by one, as in the simulator.
    """

    def __init__(self, vllm_config: Any, local_rank: int, rank: int, distributed_init_method: str, is_driver_worker: bool = False):
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)
        wanted = vllm_config.additional_config[OPTION]
        device = devices.load(wanted["hardware"])
        sharded = models.Sharded(models.load(wanted["model"]), wanted.get("tp", 1))
        self._dimensions = sharded.model
        self._kv_bytes = int(sharded.kv_bytes_per_token)
        self._kv_tokens = sharded.kv_tokens(device.memory, self.cache_config.gpu_memory_utilization)
        self._prices = kernels(Roofline(device, sharded, "graph"))
        scatter = tuple(wanted.get("scatter", ()))
        self._scatter = scattering(scatter) if scatter else None
        self._known: dict[str, int] = {}
        self._result = EMPTY_MODEL_RUNNER_OUTPUT

    def init_device(self) -> None:
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """There is nothing to load."""

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBNHC"]

    def get_kv_cache_spec(self) -> dict[str, Any]:
        model, size = self._dimensions, self.cache_config.block_size
        spec = FullAttentionSpec(block_size=size, num_kv_heads=model.num_kv_heads, head_size=model.head_dim, dtype=torch.bfloat16)
        return {f"layers.{layer}": spec for layer in range(model.num_layers)}

    def determine_available_memory(self) -> int:
        return self._kv_tokens * self._kv_bytes

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """There is no KV to allocate."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(0.0, 0.0)

    def execute_dummy_batch(self) -> None:
        """There is no other rank to wait for."""

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        start = time.perf_counter()
        for id in scheduler_output.finished_req_ids:
            self._known.pop(id, None)
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        starts = self._starts(scheduler_output)
        ids = list(scheduler_output.num_scheduled_tokens)
        shape: Shape = [(starts[id], scheduler_output.num_scheduled_tokens[id]) for id in ids]
        tokens = [self._sample(id, begin + count) for id, (begin, count) in zip(ids, shape, strict=True)]
        self._result = ModelRunnerOutput(ids, {id: i for i, id in enumerate(ids)}, tokens)
        seconds = self._prices(shape)
        if self._scatter is not None:
            seconds *= self._scatter(start)
        _wait_until(start + seconds)
        return None

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        return self._result

    def _starts(self, output: Any) -> dict[str, int]:
        """The position at which each request's work begins. `_known` has the tokens that each request has so far."""
        starts = {}
        for new in output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            self._known[new.req_id] = len(new.prefill_token_ids or new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return starts

    def _sample(self, id: str, computed: int) -> list[int]:
        known = self._known[id]
        if computed < known:
            return []
        self._known[id] = known + 1
        return [TOKENS[hash((id, known)) % len(TOKENS)]]


def kernels(cost: Roofline) -> Callable[[Shape], float]:
    """The seconds of an iteration's kernels: the price of the roofline without the host's part, which vLLM really takes."""
    host = cost.engine.iteration_s

    def seconds(shape: Shape) -> float:
        return cost.seconds(shape) - host - cost.engine.sequence_s * len(shape)

    return seconds


def defaults(device: Hardware) -> tuple[int, int]:
    """`--max-num-batched-tokens` and `--max-num-seqs` of vLLM's server on `device` (vllm/engine/arg_utils.py of vLLM 0.32)."""
    memory = device.memory / 2**30
    if memory >= 160:
        return 16384, 1024
    return (8192, 1024) if memory >= 70 and "a100" not in device.name else (2048, 256)


def folder(model: str, tokenizer: Callable[[Path], None], path: Path) -> None:
    """Write what vLLM reads of a model to the folder `path`: the dimensions of `model` (a name as in `stallfree list models`), and
    a tokenizer, which `tokenizer` writes to tokenizer.json. There are no weights.
    """
    dimensions = models.load(model)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "vocab_size": dimensions.vocab_size,
        "hidden_size": dimensions.hidden_size,
        "intermediate_size": dimensions.ffn_size,
        "num_hidden_layers": dimensions.num_layers,
        "num_attention_heads": dimensions.num_heads,
        "num_key_value_heads": dimensions.num_kv_heads,
        "head_dim": dimensions.head_dim,
        "max_position_embeddings": dimensions.max_model_len,
    }
    (path / "config.json").write_text(json.dumps(values))
    tokenizer(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _wait_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        if left > SPIN_S:
            time.sleep(left - SPIN_S)
