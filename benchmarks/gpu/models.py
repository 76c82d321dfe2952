"""Does a whole model give the same on the device as on the processor, in every format and family? Does it give the same tokens in
batches, in chunks, with overlap and as CUDA graphs?

In float32 a token may differ only where two logits are a rounding apart. The error is the distance of the two logits at the first
token that differs, in standard deviations of all logits; 0 where all tokens are the same.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from gpu.made import SMALL, TINY, checkpoint, config_of, error, iteration, need_cuda, requests, served

from stallfree.checkpoint import ModelConfig
from stallfree.core.plan import Work
from stallfree.executors.sampling import GREEDY, Sampling
from stallfree.executors.torch import Options, TorchExecutor
from stallfree.executors.torch.llama import Llama

KV_BYTES = 64 << 20
FORMATS = {
    ("f32", "f32"): 1e-3, ("bf16", "bf16"): 0.06, ("fp16", "fp16"): 0.01, ("fp8", "bf16"): 0.06, ("int8", "bf16"): 0.06,
    ("int4", "bf16"): 0.06, ("bf16", "fp8"): 0.15,
}  # fmt: skip
"""(Weights, KV) -> largest error of a row of logits. The processor has the same weights and KV, and computes in float32."""
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3"},
    "windows": {"family": "mistral", "windows": None},
    "mixtral": {"family": "mixtral", "experts": 4, "active_experts": 2},
    "gpt_oss": {"family": "gpt_oss", "experts": 4, "active_experts": 2, "qkv_bias": True, "output_bias": True, "windows": None},
    "falcon": {"family": "falcon", "own_norm": True},
}
HYBRID = [(0, 200), (0, 1), (0, 33), (0, 64)]
LATER = [(200, 1), (1, 40), (33, 1), (64, 65)]
SAMPLINGS = [
    GREEDY, Sampling(temperature=1, seed=3), Sampling(temperature=0, repetition_penalty=1.3), Sampling(temperature=0, logprobs=2),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5), Sampling(temperature=0, logit_bias={7: 2.0}, presence_penalty=0.5),
]  # fmt: skip
TIE = {"f32": 1e-3, "bf16": 0.15}
"""Standard deviations between two logits that rounding may exchange."""

Case = tuple[str, Callable[[], dict[str, Any]]]


def cases(device: str, quick: bool) -> list[Case]:
    cases: list[Case] = [("logits, llama, f32, KV f32", partial(_logits, device, {}, "f32", "f32"))]
    ways: dict[str, dict[str, Any]] = {
        "batched": {},
        "chunks of 32": {"budget": 32},
        "overlap": {"overlap": True},
        "graphs": {"graphs": True},
        "graphs, overlap, chunks of 64": {"graphs": True, "overlap": True, "budget": 64},
    }
    cases += [(f"tokens, f32, {name}", partial(_ways, device, "f32", way)) for name, way in ways.items()]
    cases += [(f"tokens, sampled, {name}", partial(_sampled, device, ways[name])) for name in list(ways)[2:]]
    cases += [(f"tokens, bf16, {name}", partial(_ways, device, "bf16", way)) for name, way in ways.items() if device == "cuda"]
    formats = [pair for pair in FORMATS if pair != ("f32", "f32") and (device == "cuda" or pair[0] == "int8")]
    cases += [(f"logits, llama, {w}, KV {kv}", partial(_logits, device, {}, w, kv)) for w, kv in formats]
    families = {} if quick and device == "cuda" else FAMILIES
    return cases + [(f"logits, {name}, f32", partial(_logits, device, changes, "f32", "f32")) for name, changes in families.items()]


def small(device: str, changes: dict[str, Any] | None = None) -> ModelConfig:
    """A small llama, or what `changes` make of it."""
    config = config_of(SMALL if device == "cuda" else TINY, **(changes or {}))
    return config if config.windows else replace(config, windows=(0, 20) * (config.num_layers // 2))


def executor_of(device: str, changes: dict[str, Any], weights: str, kv: str, graphs: bool = True) -> TorchExecutor:
    options, model = Options(weights, kv, device=device, threads=1), checkpoint(small(device, changes))
    recordable, Llama.recordable = Llama.recordable, graphs
    try:
        return TorchExecutor(model, options, KV_BYTES, overlap=False)
    finally:
        Llama.recordable = recordable


def _logits(device: str, changes: dict[str, Any], weights: str, kv: str) -> dict[str, Any]:
    """The logits' error, for a batch of prompts and for a batch that continues them, some by one token."""
    both = []
    for executor in (executor_of(device, changes, weights, kv, graphs=False), _exact(device, changes, weights, kv)):
        whole, begun = (iteration(shape, small(device, changes).vocab_size)[0] for shape in (LATER, HYBRID))
        begun = [piece._replace(blocks=later.blocks) for piece, later in zip(begun, whole, strict=True)]
        both.append(np.concatenate([executor.logits(begun), executor.logits(whole)]))
        executor.close()
    return {"error": error(*(torch.from_numpy(logits) for logits in both)), "limit": FORMATS[weights, kv]}


def _exact(device: str, changes: dict[str, Any], weights: str, kv: str) -> TorchExecutor:
    """The same model on the processor, in float32 unless its weights have eight bits or fewer."""
    form = weights if weights in ("fp8", "int8", "int4") else "f32"
    model = checkpoint(small(device, changes))
    return TorchExecutor(model, Options(form, kv if kv == "fp8" else "f32", device="cpu", threads=1), KV_BYTES)


@cache
def held(device: str, dtype: str, graphs: bool) -> TorchExecutor:
    return executor_of(device, {}, dtype, dtype, graphs)


@cache
def prompts(device: str) -> tuple[tuple[int, ...], ...]:
    lengths = (3, 90, 40, 17, 1, 200, 16, 33) if device == "cpu" else (3, 90, 40, 17, 1, 200, 16, 33) * 4
    vocab = small(device).vocab_size
    return tuple(piece.tokens for piece in iteration([(0, length) for length in lengths], vocab)[0])


def _run(device: str, dtype: str, samplings: list[Sampling], way: dict[str, Any], at_once: int = 64) -> list[list[int]]:
    if way.get("graphs"):
        need_cuda(device)
    executor = held(device, dtype, way.get("graphs", False))
    overlap = way.get("overlap", False)
    executor.capacity = replace(executor.capacity, depth=1 + overlap, overlap=overlap)
    number = 8 if device == "cpu" else 48
    return served(executor, requests(prompts(device), number, samplings), way.get("budget", 2048), at_once)


@cache
def _expected(device: str, dtype: str) -> list[list[int]]:
    """One request at a time, each prompt whole."""
    return _run(device, dtype, [GREEDY], {}, at_once=1)


def _ways(device: str, dtype: str, way: dict[str, Any]) -> dict[str, Any]:
    results, expected = _run(device, dtype, [GREEDY], way), _expected(device, dtype)
    apart = [_apart(device, dtype, i, a, b) for i, (a, b) in enumerate(zip(results, expected, strict=True)) if a != b]
    counts = {"requests": len(results), "tokens": sum(map(len, expected)), "requests that differ": len(apart)}
    return counts | {"error": max(apart, default=0.0), "limit": TIE[dtype]}


def _apart(device: str, dtype: str, number: int, result: list[int], expected: list[int]) -> float:
    """The distance between the logits of the first two tokens that differ."""
    first = next((i for i, (a, b) in enumerate(zip(result, expected, strict=True)) if a != b))
    tokens = (*prompts(device)[number], *expected[:first])
    work = Work("apart", 0, len(tokens), True, False, tokens, tuple(range(-(-len(tokens) // 16))), None, "", (), ())
    logits = held(device, dtype, False).logits([work])[-1]
    return float(abs(logits[result[first]] - logits[expected[first]]) / logits.std())


def _sampled(device: str, way: dict[str, Any]) -> dict[str, Any]:
    """The share of requests, with various samplings, that get a different token than without overlap and graphs, because a
    rounding decided."""
    results, expected = _run(device, "f32", SAMPLINGS, way), _run(device, "f32", SAMPLINGS, {})
    differ = sum(a != b for a, b in zip(results, expected, strict=True))
    return {"requests": len(results), "requests that differ": differ, "error": differ / len(results), "limit": 0.1}
