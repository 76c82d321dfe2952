"""What vLLM's iterations cost: timed at start in vLLM's own process, before it serves, and remembered for the same machine, model
and options. Where that is not possible without side effects, the policy starts from guessed prices and learns from the first
iterations.
"""

import gc
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from itertools import count
from time import perf_counter
from typing import Any

from stallfree.checkpoint.fetch import cache_folder
from stallfree.core.plan import Capacity, Plan, Shape, StepResult
from stallfree.engine import calibrate
from stallfree.perf.fitted import Fitted, device_shapes
from stallfree.perf.padded import Padded
from stallfree.vllm import contract

log = logging.getLogger(__name__)

GUESS = tuple(price / 20 for price in Fitted().prices)
"""Prices to begin with if nothing can be timed: too low for nearly every machine, so that no target is refused by a guess. They are
right within some twenty iterations."""

SLOW_S = 0.03
"""An engine that takes longer for 256 tokens is taken for a processor."""


def prices(scheduler: Any) -> tuple[Fitted | Padded, str]:
    """A cost model for the engine of vLLM's `scheduler`, and where its prices come from, in words."""
    cost, source = _fitted(scheduler)
    sizes = _captured(scheduler.vllm_config.compilation_config)
    return (Padded(cost, sizes) if sizes else cost), source


def _fitted(scheduler: Any) -> tuple[Fitted, str]:
    config = scheduler.vllm_config
    obstacle = _obstacle(config)
    executor = None if obstacle else _executor(config)
    if executor is None:
        return Fitted(GUESS), f"learned from the first iterations ({obstacle or 'no executor in this process'})"
    key, folder = _key(config), cache_folder() / "calibration" / "vllm"
    cost = calibrate.remembered(key, folder)
    if cost is not None:
        return cost, f"as calibrated on {calibrate.calibrated_at(key, folder):%Y-%m-%d %H:%M}"
    log.info("stallfree: timing iterations of this engine, once")
    groups = scheduler.kv_cache_config.kv_cache_groups
    block_size = min(group.kv_cache_spec.block_size for group in groups)
    longest = config.model_config.max_model_len - 1  # one token is for what the iteration samples
    capacity = Capacity(block_size, config.cache_config.num_gpu_blocks, longest)
    engine = Timed(executor, capacity, len(groups))
    try:
        cost, errors = calibrate.calibrate(engine, wanted=_shapes(engine, scheduler))
    except Exception as error:  # a model may want of its requests what made-up ones lack; it can be served all the same
        log.warning("stallfree: iterations of this model cannot be timed before it serves: %s", error)
        return Fitted(GUESS), f"learned from the first iterations ({type(error).__name__})"
    finally:
        engine.close()
    calibrate.remember(cost, errors, key, folder, capacity)
    return cost, f"calibrated now; median error {errors.median:.1%}"


def _shapes(engine: "Timed", scheduler: Any) -> list[Shape]:
    """The shapes to time that vLLM's options allow. A processor would take minutes for those of a GPU."""
    most, seqs = scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs
    probe = [(0, min(256, most, engine.capacity.max_model_len))]
    slow = min(calibrate.timed(engine, probe) for _ in range(2)) > SLOW_S
    shapes = calibrate.processor_shapes(engine.capacity) if slow else device_shapes(engine.capacity.max_model_len)
    return [shape for shape in shapes if len(shape) <= seqs and sum(count for _, count in shape) <= most] or [probe]


def _obstacle(config: Any) -> str:
    """Why iterations cannot be timed before the engine serves, or ""."""
    model, parallel = config.model_config, config.parallel_config
    obstacles = {
        "KV connector": config.kv_transfer_config is not None or config.ec_transfer_config is not None,
        "speculative decoding": config.speculative_config is not None,
        "no text generation": model.runner_type != "generate" or model.is_encoder_decoder or model.is_diffusion,
        "state beside KV": model.is_hybrid or model.is_attention_free,
        "experts on several ranks": parallel.data_parallel_size > 1,
    }
    return ", ".join(name for name, there in obstacles.items() if there)


def _executor(config: Any) -> Any:
    """vLLM's executor of the engine with this `config`. vLLM does not give it to its scheduler, so it is looked for in memory; None
    if it is in another process."""
    from vllm.v1.executor.abstract import Executor

    for thing in gc.get_objects():
        if issubclass(type(thing), Executor) and getattr(thing, "vllm_config", None) is config:
            return thing
    return None


def _key(config: Any) -> Mapping[str, object]:
    """All that decides what iterations cost."""
    import torch

    model, parallel, compilation = config.model_config, config.parallel_config, config.compilation_config
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return calibrate.machine() | {
        "gpu": gpu,
        "engine": f"vllm {contract.installed()}",
        "model": [str(model.model), model.revision],
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv": str(config.cache_config.cache_dtype),
        "tp": parallel.tensor_parallel_size,
        "worker": parallel.worker_cls,
        "additional": repr(config.additional_config),
        "eager": model.enforce_eager,
        "graphs": [str(compilation.cudagraph_mode), _captured(compilation)],
        "lora": config.lora_config is not None,
    }


def _captured(compilation: Any) -> list[int]:
    """The numbers of tokens for which vLLM has CUDA graphs; it pads to the next of them."""
    mode = compilation.cudagraph_mode
    return sorted(compilation.cudagraph_capture_sizes or ()) if mode is not None and mode.value else []


class Timed:
    """vLLM's `executor` as an executor of this project, only for timing: each plan becomes an iteration of new requests, whose KV
    is whatever the blocks hold. `groups`: the number of vLLM's KV cache groups, which all get the same blocks."""

    def __init__(self, executor: Any, capacity: Capacity, groups: int):
        self.capacity = capacity
        self._executor, self._groups = executor, groups
        self._ids: set[str] = set()
        self._numbers = count()
        self._result: StepResult | None = None

    def submit(self, plan: Plan) -> None:
        output = self._output(plan)
        start = perf_counter()
        self._run(output)
        self._result = StepResult(plan.step, {}, perf_counter() - start)

    def collect(self) -> StepResult:
        result, self._result = self._result, None
        if result is None:
            raise ValueError("nothing was submitted")
        return result

    def close(self) -> None:
        """Let vLLM forget the last requests."""
        from vllm.v1.core.sched.output import SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.finished_req_ids = self._ids
        self._run(output)

    def _run(self, output: Any) -> None:
        """As vLLM's engine runs an iteration."""
        result = _done(self._executor.execute_model(output, non_block=True))
        if result is None and output.total_num_scheduled_tokens:
            _done(self._executor.sample_tokens(None, non_block=True))

    def _output(self, plan: Plan) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.finished_req_ids, self._ids = self._ids, set()
        for work in plan.work:
            id = f"stallfree-calibration-{next(self._numbers)}"
            self._ids.add(id)
            tokens = list(work.prompt)
            blocks = tuple(list(work.blocks) for _ in range(self._groups))
            sampling = SamplingParams(temperature=0.0, max_tokens=1)
            new = NewRequestData(id, tokens, [], sampling, None, blocks, work.start, None, prefill_token_ids=tokens)
            output.scheduled_new_reqs.append(new)
            output.num_scheduled_tokens[id] = work.count
            output.total_num_scheduled_tokens += work.count
        return output


def _done(result: Any) -> Any:
    return result.result() if isinstance(result, Future) else result
