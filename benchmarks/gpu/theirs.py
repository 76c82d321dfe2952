"""The iterations of `steps` with transformers, where it is installed. A prefill is timed as `generate` of one token, a decode as
the mean over 16 more tokens. transformers has no hybrid iterations.
"""

import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from gpu.facts import seconds
from gpu.made import Absent, need_cuda
from gpu.steps import SHAPES, Side

from stallfree.perf.shape import load

MORE = 16


def cases(device: str, quick: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    names = ("1 decode", "prefill 2,048", "32 decodes", "prefill 512", "prefill 8,192")
    return [(f"llama3-8b, bf16, {name}", partial(_step, device, *SHAPES[name])) for name in names]


@cache
def _model(name: str, device: str) -> Any:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        raise Absent(f"transformers is not there: {missing}") from None
    model = load(name)
    config = LlamaConfig(
        vocab_size=model.vocab_size, num_hidden_layers=model.num_layers, hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads, intermediate_size=model.ffn_size,
        max_position_embeddings=16384,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def _step(device: str, decodes: int, chunk: int) -> dict[str, Any]:
    need_cuda(device)
    model, vocab = _model("llama3-8b", device), load("llama3-8b").vocab_size
    context = Side(load("llama3-8b")).context

    def generate(more: int) -> None:
        ids = torch.randint(3, vocab, (decodes or 1, context if decodes else chunk), device=device)
        settings = {"do_sample": False, "min_new_tokens": more, "max_new_tokens": more, "pad_token_id": 0, "eos_token_id": None}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def median_s(more: int) -> float:
        return statistics.median(seconds(partial(generate, more), device, least=2, most=5))

    first = median_s(1)
    return {"ms": 1e3 * ((median_s(1 + MORE) - first) / MORE if decodes else first)}
