"""Small models with random weights: written by `transformers` as a folder, or by `gguf` as a file. Nothing is downloaded."""

import json
import warnings
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType

import numpy as np

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.families import FAMILIES

TINY = {
    "vocab_size": 160,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def write_folder(folder: Path, family: str, **config: object) -> object:
    """Write a Hugging Face folder with random weights; return `transformers`' model of it, in float32."""
    with warnings.catch_warnings():
        # torch and transformers warn of deprecations of their own and of Python while they are imported.
        warnings.simplefilter("ignore")
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        tiny = {key: value for key, value in TINY.items() if family != "falcon" or key != "head_dim"}
        settings = AutoConfig.for_model(family, **{**tiny, **config})
        model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms and biases too: left at ones and zeros they would hide a mistake.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        model.save_pretrained(folder)
    return model


def reference(model: object, tokens: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] by `transformers`."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    kind: str = "F32",
    most_tensors: int = 0,
    kinds: Mapping[str, str] = MappingProxyType({}),
    **values: object,
) -> None:
    """Write the tensors of `checkpoint` as a GGUF file, with queries and keys in llama.cpp's order. `kind`: of the matrices, and
    `kinds` that of some modules. `values` are more metadata under the architecture's name (uint32, or their own type); None leaves
    one out. With at most `most_tensors` in each, several files are written, named after `path`."""
    import gguf

    config = checkpoint.config
    family = {"mistral": "llama"}.get(config.family) or FAMILIES[config.family].gguf
    row, read = FAMILIES[config.family], checkpoint.read
    if isinstance(read, partial):
        read = read.args[1]  # as it is in the file: what is folded then will be folded again
    writer = gguf.GGUFWriter(path, family, split_max_tensors=most_tensors)
    numbers = {
        "block_count": config.num_layers,
        "context_length": config.max_model_len,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotated,
        **values,
    }
    if mixture := row.experts:
        numbers = {"expert_count": config.experts, "expert_used_count": config.active_experts} | numbers
        if mixture.width != "intermediate_size":
            numbers = {"expert_feed_forward_length": config.ffn_size} | numbers
    for key, number in numbers.items():
        add = {str: writer.add_string, float: writer.add_float32}.get(type(number), writer.add_uint32)
        if number is not None:
            add(f"{family}.{key}", number)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config.norm_eps)
    if "rope.freq_base" not in values:
        writer.add_float32(f"{family}.rope.freq_base", 10000.0)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(config.vocab_size)])

    def add_tensor(name: str, data: np.ndarray, form: str) -> None:
        quantised = gguf.GGMLQuantizationType[form]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), quantised), raw_dtype=quantised)

    of_experts: set[str] = set()
    if mixture:
        ends = ("weight", "bias") if mixture.bias else ("weight",)
        for layer, (place, part), end in product(range(config.num_layers), enumerate(("gate", "up", "down")), ends):
            names = [f"model.layers.{layer}.{mixture.matrices(expert)[place]}.{end}" for expert in range(config.experts)]
            stack = np.stack([read(name) for name in names])
            add_tensor(f"blk.{layer}.ffn_{part}_exps.{end}", stack, kind if end == "weight" else "F32")
            of_experts.update(names)
    for name in config.tensors():
        if name in of_experts:
            continue
        if name.endswith("sinks"):
            add_tensor(f"blk.{name.split('.')[2]}.attn_sinks.weight", read(name), "F32")
            continue
        module = name.split(".")[-2]
        if row.fused and module in ("k_proj", "v_proj", "up_proj"):
            continue
        data = read(name)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module)
        if (row.halves or config.family == "mistral") and heads:
            data = data.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(data.shape)
        if row.shifted and "norm" in module:
            data = data + 1
        if row.fused and module in ("q_proj", "gate_proj"):
            others = ("k_proj", "v_proj") if module == "q_proj" else ("up_proj",)
            data = np.concatenate([data, *(read(name.replace(module, other)) for other in others)])
        stem, _, suffix = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        add_tensor(
            f"{prefix}{(SHORT | OWN_SHORT.get(family, {}))[stem]}.{suffix}",
            data,
            kinds.get(module, kind) if data.ndim == 2 else "F32",
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHORT = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of the tensors."""
OWN_SHORT = {
    "llama": {"block_sparse_moe.gate": "ffn_gate_inp"},
    "qwen3moe": {"mlp.gate": "ffn_gate_inp"},
    "gpt-oss": {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"},
    "phi3": {"self_attn.q_proj": "attn_qkv", "mlp.gate_proj": "ffn_up"},
    "olmo2": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
"""Those that other architectures have."""


def change_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
