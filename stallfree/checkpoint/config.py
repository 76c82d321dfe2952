"""What a model is, in numbers: enough to build its graph, whatever file the numbers came from.

It knows nothing of files; the readers beside it do. Tensors have their Hugging Face names.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "falcon")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the value and the way out."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Falcon: LayerNorm, and an FFN with
    GELU that reads what attention reads.

    `inv_freq`: radians per position of each of the `head_dim / 2` rotary pairs, scaling applied. `windows`: per layer, how many
    tokens a token attends to, itself included; 0 for all. `bos_token_id` may be absent; `eos_token_ids` may be empty. Of `experts`
    FFNs each token passes `active_experts`. `own_norm`: Falcon's FFN has a norm of its own.
    """

    family: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    inv_freq: tuple[float, ...]
    max_model_len: int
    windows: tuple[int, ...]
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: int = 1
    active_experts: int = 1
    own_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model needs, by name, with its shape ([out, in] for matrices)."""
        if self.family == "falcon":
            return self._falcon()
        hidden, ffn = self.hidden_size, self.ffn_size
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        shapes["model.embed_tokens.weight"] = (self.vocab_size, hidden)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        linears = [
            ("self_attn.q_proj", query, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, query, self.output_bias),
        ]
        if self.experts == 1:
            linears += [(f"mlp.{name}_proj", ffn, hidden, self.mlp_bias) for name in ("gate", "up")]
            linears += [("mlp.down_proj", hidden, ffn, self.mlp_bias)]
        else:
            linears += [("block_sparse_moe.gate", self.experts, hidden, False)]
            for expert in range(self.experts):
                at = f"block_sparse_moe.experts.{expert}."
                linears += [(f"{at}w1", ffn, hidden, False), (f"{at}w3", ffn, hidden, False), (f"{at}w2", hidden, ffn, False)]
        norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
        if self.qk_norm:
            norms += [("self_attn.q_norm", self.head_dim), ("self_attn.k_norm", self.head_dim)]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, out, inner, bias in linears:
                shapes[f"{prefix}{name}.weight"] = (out, inner)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (out,)
            for name, size in norms:
                shapes[f"{prefix}{name}.weight"] = (size,)
        return shapes

    def _falcon(self) -> dict[str, tuple[int, ...]]:
        hidden, fused = self.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (self.vocab_size, hidden)}
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        linears = [
            ("self_attention.query_key_value", fused, hidden),
            ("self_attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", self.ffn_size, hidden),
            ("mlp.dense_4h_to_h", hidden, self.ffn_size),
        ]
        norms = ["transformer.ln_f"]
        for layer in range(self.num_layers):
            prefix = f"transformer.h.{layer}."
            for name, out, inner in linears:
                shapes[f"{prefix}{name}.weight"] = (out, inner)
                if self.mlp_bias:
                    shapes[f"{prefix}{name}.bias"] = (out,)
            norms += [f"{prefix}{name}" for name in (("ln_attn", "ln_mlp") if self.own_norm else ("input_layernorm",))]
        for name in norms:
            shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
        return shapes


HARMLESS = (".rotary_emb.inv_freq", "rope_freqs.weight")
"""How names of tensors end that repeat what the configuration says, or that were read with it."""


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError unless `found`, tensors' shapes by name, are those of `config`: one that nobody reads would be a model
    that computes something else.
    """
    wanted = config.tensors()
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{source}: tensors are missing: {_some(missing)}; it is incomplete, fetch it again")
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if extra := [name for name in found if name not in wanted and name not in tied and not name.endswith(HARMLESS)]:
        raise CheckpointError(
            f"{source}: tensors that a {config.family} model does not have: {_some(extra)}; it is of another kind"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(f"{source}: {name!r} has shape {found[name]}, the configuration says {shape}")


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def rotary_frequencies(head_dim: int, theta: float, scaling: Mapping[str, object], source: str) -> tuple[float, ...]:
    """Radians per position of each rotary pair: theta^(-2i/head_dim), scaled as `scaling` (`rope_type`, `factor`, ...) says.

    Knows `default`, `linear` (positions divided by the factor) and `llama3` (Llama 3.1: wavelengths beyond the old context divided
    by the factor, those well within it kept, those between interpolated).
    """
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return tuple(frequencies)
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{source}: rope scaling {kind!r} is not supported; known are default, linear and llama3")
    factor = positive(scaling, "factor", source)
    if kind == "linear":
        return tuple(f / factor for f in frequencies)
    low, high = positive(scaling, "low_freq_factor", source), positive(scaling, "high_freq_factor", source)
    original = positive(scaling, "original_max_position_embeddings", source)
    if high <= low:
        raise CheckpointError(f"{source}: rope scaling needs low_freq_factor {low} below high_freq_factor {high}")

    def scaled(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        return frequency * (keep + (1 - keep) / factor)

    return tuple(scaled(f) for f in frequencies)


def positive(values: Mapping[str, object], key: str, source: str, default: float | None = None) -> float:
    """The finite number above 0 under `key`; raises CheckpointError naming `source` and `key` otherwise."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{source}: {key!r} is missing; the checkpoint is incomplete, fetch it again")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{source}: {key!r} is {value!r}, expected a number above 0")
    return value


def size(values: Mapping[str, object], key: str, source: str, default: int | None = None) -> int:
    """The whole number above 0, and below 2^31, under `key`; raises CheckpointError naming `source` and `key` otherwise."""
    value = positive(values, key, source, default)
    if value != int(value) or value >= 2**31:
        raise CheckpointError(f"{source}: {key!r} is {value!r}, expected a whole number below 2^31")
    return int(value)


def check(config: ModelConfig, source: str) -> ModelConfig:
    """`config` itself, if its numbers fit together; raises CheckpointError naming what does not."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(f"{source}: {config.num_heads} attention heads cannot share {config.num_kv_heads} KV heads evenly")
    if config.head_dim % 2:
        raise CheckpointError(f"{source}: head size {config.head_dim} is odd, rotary positions need pairs")
    for token in (*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,))):
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(f"{source}: special token {token} is outside the vocabulary of {config.vocab_size}")
    return config
