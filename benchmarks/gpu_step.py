"""One iteration on a GPU: decodes, prefills and both together, beside the roofline and beside transformers' own loop.

Random weights of a 7B (Llama-2-7B's shape) and an 8B model (Llama-3-8B's) in bfloat16, on one GPU; decodes stand at 2,048 tokens of
context. Medians of timed repetitions after a warm-up, both sides in one run. The roofline is from this GPU's own rates, measured
first: bytes over the bandwidth of a copy (weights once, the KV of every decode, the KV that chunks read), FLOPs over the rate of a
large product; of a hybrid iteration the sum of its decodes' and its chunk's.

To reach: decodes of 32 and more within 1.35 times the roofline; prefills at 65 % of the product's rate; 32 decodes and a chunk of
512 within 1.15 times the sum of their rooflines. Without a GPU the script says so and ends.

    python benchmarks/gpu_step.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import machine, parser, show

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.checkpoint.config import rotary_frequencies
from stallfree.core.plan import Work
from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.runner import BLOCK, Options, Runner

CONTEXT = 2048
LLAMA2 = ModelConfig(
    family="llama", vocab_size=32000, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128, ffn_size=11008,
    norm_eps=1e-5, inv_freq=rotary_frequencies(128, 10000.0, {}, "benchmark"), max_model_len=16384, windows=(0,) * 32,
    tie_embeddings=False,
)  # fmt: skip
MODELS = {
    "Llama-2-7B": LLAMA2,
    "Llama-3-8B": replace(LLAMA2, vocab_size=128256, num_kv_heads=8, ffn_size=14336),
}
SHAPES: dict[str, tuple[int, int]] = {
    "1 decode": (1, 0),
    "32 decodes": (32, 0),
    "128 decodes": (128, 0),
    "prefill 512": (0, 512),
    "prefill 2,048": (0, 2048),
    "prefill 8,192": (0, 8192),
    "32 decodes + 512": (32, 512),
}


def median_s(run: Callable[[], object], times: int) -> float:
    """Seconds of `run`, the GPU's work included."""
    run()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def rates(times: int) -> tuple[float, float]:
    """Bytes per second of a copy, read and written, and FLOP/s of a product in bfloat16."""
    block, into = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = 2 * len(block) / median_s(lambda: into.copy_(block), times)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return copy, 2 * 8192**3 / median_s(lambda: a @ b, times)


def parameters(config: ModelConfig, *, embedding: bool = False) -> int:
    """Weights that an iteration reads: all but the embedding's rows."""
    return sum(int(np.prod(shape)) for name, shape in config.tensors().items() if embedding or "embed" not in name)


def roofline(config: ModelConfig, decodes: int, chunk: int, copy: float, product: float) -> float:
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    linear = 2 * (parameters(config) - config.vocab_size * config.hidden_size)
    head = 2 * config.vocab_size * config.hidden_size
    seconds = 0.0
    if decodes:
        moved = 2 * parameters(config) + decodes * CONTEXT * kv
        seconds += max(moved / copy, decodes * (linear + head) / product)
    if chunk:
        attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * chunk * chunk / 2
        moved = 2 * parameters(config) if not decodes else 0
        seconds += max((moved + chunk * kv) / copy, (chunk * linear + head + attention) / product)
    return seconds


def work(config: ModelConfig, decodes: int, chunk: int) -> tuple[list[Work], list[int]]:
    """Pieces of an iteration, each in blocks of its own, and its sampled rows."""
    pieces, each = [], -(-(CONTEXT + 1) // BLOCK)
    for i in range(decodes):
        table = tuple(range(i * each, (i + 1) * each))
        pieces.append(Work(f"d{i}", CONTEXT, 1, True, True, (i % config.vocab_size,), table, None, "", (), ()))
    if chunk:
        table = tuple(range(decodes * each, decodes * each - (-chunk // BLOCK)))
        pieces.append(Work("p", 0, chunk, True, False, (1,) * chunk, table, None, "", (), ()))
    return pieces, [*range(decodes), *([decodes + chunk - 1] if chunk else [])]


def ours(config: ModelConfig, times: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    some = (rng.standard_normal(1 << 22) * 0.02).astype(np.float32)

    def read(name: str) -> np.ndarray:
        shape = config.tensors()[name]
        return np.resize(some, shape) if len(shape) == 2 else np.ones(shape, np.float32)

    options = Options("bf16", "bf16", device="cuda")
    runner = Runner(
        Checkpoint(Path("random"), config, read, None), options, Alone(), range(config.num_layers), torch.device("cuda")
    )
    runner.allocate(130 * (CONTEXT // BLOCK + 1) + 8192 // BLOCK)
    runner.record()
    found = {}
    for name, (decodes, chunk) in SHAPES.items():
        pieces, rows = work(config, decodes, chunk)
        found[name] = median_s(lambda pieces=pieces, rows=rows: runner.run(pieces, rows).argmax(-1).cpu(), times)
    runner.close()
    return found


def theirs(config: ModelConfig, times: int) -> dict[str, float]:
    """transformers: `generate` of one more token for prefills; for decodes, what each of 16 more takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    told = LlamaConfig(
        vocab_size=config.vocab_size, num_hidden_layers=config.num_layers, hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_model_len,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(told).eval()
        torch.set_default_dtype(torch.float32)

    def generate(batch: int, tokens: int, more: int) -> None:
        ids = torch.ones(batch, tokens, dtype=torch.int64, device="cuda")
        settings = {"do_sample": False, "min_new_tokens": more, "max_new_tokens": more, "pad_token_id": 0, "eos_token_id": None}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    found = {}
    for name, (decodes, chunk) in SHAPES.items():
        if decodes and chunk:
            continue  # it has no hybrid iterations
        batch, tokens = (decodes, CONTEXT) if decodes else (1, chunk)
        first = median_s(lambda b=batch, t=tokens: generate(b, t, 1), times)
        found[name] = first
        if decodes:
            found[name] = (median_s(lambda b=batch, t=tokens: generate(b, t, 17), times) - first) / 16
    return found


def main() -> None:
    args = parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_step.py needs a GPU, and torch finds none")
    times = 3 if args.quick else 10
    copy, product = rates(times)
    facts = machine() | {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy, GB/s": copy / 1e9,
        "product, TFLOP/s": product / 1e12,
    }
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for model, config in MODELS.items():
            measured = ours(config, times)
            torch.cuda.empty_cache()
            others = theirs(config, max(2, times // 3))
            torch.cuda.empty_cache()
            for name, (decodes, chunk) in SHAPES.items():
                least = roofline(config, decodes, chunk, copy, product)
                other = others.get(name)
                rows.append(
                    {"model": model, "iteration": name, "ms": 1e3 * measured[name], "roofline, ms": 1e3 * least}
                    | {"ms / roofline": measured[name] / least, "transformers, ms": other and 1e3 * other}
                    | {"transformers / ours": other and other / measured[name]}
                )
    show("One iteration", rows, facts, args.json)


if __name__ == "__main__":
    main()
