"""A model's configuration, beyond its dimensions: its tensors, by their Hugging Face names, and its rotary positions.

It does not know files: `safetensors.py` and `gguf.py` read them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stallfree.checkpoint.dimensions import CheckpointError, Dimensions, check_experts, check_heads, positive, size
from stallfree.checkpoint.families import FAMILIES, Experts

CLAMP = 1.702, 7.0
"""The slope and the limit of gpt-oss's activation, unless config.json has others. GGUF files do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Dimensions):
    """All that a model's graph needs: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Falcon has LayerNorm, and an FFN
    with GELU that reads the same input as attention.

    `inv_freq`: radians per position of each of the `head_dim / 2` rotary pairs, scaling applied, 0 for those that do not turn;
    `rope_scale`: what the cosines and sines of the others are multiplied by. `local_inv_freq`: the same for layers with a window,
    if they have their own. `unrotated`: the layers without positions. `max_model_len`: tokens of the longest sequence whose
    positions are exact. `windows`: per layer, how many tokens a token attends to, itself included; 0 for all. `bos_token_id` may be
    absent; `eos_token_ids` may be empty. `own_norm`: Falcon's FFN has a norm of its own. `factors`: what tensors are multiplied by
    when they are read, by the ends of their names; `norm_shift`: what is added to the weights of norms before that (`folding.py`).
    `shares_of_all`: the softmax that weighs a token's experts is over all experts; else over the chosen ones, so that the weights
    add up to 1. `clamp`: the slope and the limit of gpt-oss's activation (`Experts.clamped`).
    """

    norm_eps: float
    inv_freq: tuple[float, ...]
    windows: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    own_norm: bool = False
    rope_scale: float = 1.0
    local_inv_freq: tuple[float, ...] = ()
    unrotated: tuple[int, ...] = ()
    factors: tuple[tuple[str, float], ...] = ()
    norm_shift: float = 0.0
    shares_of_all: bool = False
    clamp: tuple[float, float] = CLAMP
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qk_norm(self) -> str:
        """Queries and keys are normalised: each "head", all of them as a "whole", or not ("")."""
        return FAMILIES[self.family].qk_norm

    @property
    def gelu(self) -> bool:
        """Whether the gate of the FFN is GELU (by tanh), not SiLU."""
        return FAMILIES[self.family].gelu

    @property
    def mixture(self) -> Experts | None:
        """The mixture of experts that the FFN is; None for a dense model."""
        return FAMILIES[self.family].experts

    @property
    def sinks(self) -> bool:
        """Whether each head of attention has a logit that no token belongs to."""
        return FAMILIES[self.family].sinks

    @property
    def rotated(self) -> int:
        """Dimensions of a head that positions turn."""
        return 2 * sum(1 for frequency in self.inv_freq if frequency)

    @property
    def norms(self) -> tuple[str, str, str, str]:
        """The names of a layer's norms: before and after attention, before and after the FFN; "" where there is none."""
        before, after = "input_layernorm", "post_attention_layernorm"
        return {
            "before": (before, "", after, ""),
            "after": ("", after, "", "post_feedforward_layernorm"),
            "both": (before, after, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        }[FAMILIES[self.family].norms]

    def turns(self, layer: int) -> tuple[tuple[float, ...], float]:
        """The frequencies of a layer's rotary pairs, and what their cosines and sines are multiplied by."""
        if layer in self.unrotated:
            return (0.0,) * (self.head_dim // 2), 1.0
        if self.local_inv_freq and self.windows[layer]:
            return self.local_inv_freq, 1.0
        return self.inv_freq, self.rope_scale

    def factor(self, name: str) -> float:
        """What tensor `name` is multiplied by when it is read."""
        return math.prod(factor for end, factor in self.factors if name.endswith((f"{end}.weight", f"{end}.bias")))

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
        if (mixture := self.mixture) is None:
            linears += [(f"mlp.{name}_proj", ffn, hidden, self.mlp_bias) for name in ("gate", "up")]
            linears += [("mlp.down_proj", hidden, ffn, self.mlp_bias)]
        else:
            linears += [(mixture.router, self.experts, hidden, mixture.bias)]
            for expert in range(self.experts):
                gate, up, down = mixture.matrices(expert)
                linears += [(gate, ffn, hidden, mixture.bias), (up, ffn, hidden, mixture.bias), (down, hidden, ffn, mixture.bias)]
        norms = [(name, hidden) for name in self.norms if name]
        if self.qk_norm:
            of_heads = (self.head_dim, self.head_dim) if self.qk_norm == "head" else (query, kv)
            norms += [(f"self_attn.{name}_norm", width) for name, width in zip("qk", of_heads, strict=True)]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, out, inner, bias in linears:
                shapes[f"{prefix}{name}.weight"] = (out, inner)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (out,)
            for name, width in norms:
                shapes[f"{prefix}{name}.weight"] = (width,)
            if self.sinks:
                shapes[f"{prefix}self_attn.sinks"] = (self.num_heads,)
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
"""Endings of the names of tensors that no executor reads: they repeat the configuration, or were read with it."""


def check_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError unless `shapes`, by the tensors' names, are those of `config`. A tensor that no executor reads would
    mean that the model computes something else.
    """
    wanted = config.tensors()
    if missing := [name for name in wanted if name not in shapes]:
        raise CheckpointError(f"{source}: tensors are missing: {_some(missing)}; it is incomplete, fetch it again")
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if extra := [name for name in shapes if name not in wanted and name not in tied and not name.endswith(HARMLESS)]:
        raise CheckpointError(
            f"{source}: tensors that a {config.family} model does not have: {_some(extra)}; it is of another kind"
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{source}: {name!r} has shape {shapes[name]}, the configuration says {shape}")


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


ROPE = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""Kinds of rotary scaling, as `transformers` computes them (modeling_rope_utils.py)."""


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, object], source: str, longest: int = 0
) -> tuple[float, ...]:
    """Radians per position of each rotary pair: theta^(-2i/head_dim), scaled as `scaling` (`rope_type`, `factor`, ...) says.
    `longest` is the configuration's own context, in tokens, for what depends on it.

    `linear` divides positions by the factor. `llama3` (Llama 3.1) divides wavelengths beyond the old context by the factor, keeps
    those well within it, and interpolates between. `yarn` (Peng et al. 2023, arXiv 2309.00071) does so along the pairs. `longrope`
    (Ding et al. 2024, arXiv 2402.13753) has a divisor for each pair. `longrope` and `dynamic` change the frequencies once a
    sequence is longer than the old context. Cached keys cannot follow that, so these are the frequencies up to there
    (`rotary_limit`).
    """
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind = rotary_kind(scaling, source)
    if kind == "dynamic":
        _factor(scaling, source, longest)
    if kind in ("default", "dynamic"):
        return tuple(frequencies)
    if kind == "longrope":
        divisors = scaling.get("short_factor")
        if not isinstance(divisors, list) or len(divisors) != len(frequencies):
            raise CheckpointError(f"{source}: rope scaling needs 'short_factor', a list of {len(frequencies)} numbers")
        return tuple(f / positive({"short_factor": d}, "short_factor", source) for f, d in zip(frequencies, divisors, strict=True))
    factor = _factor(scaling, source, longest)
    if kind == "linear":
        return tuple(f / factor for f in frequencies)
    original = _original(scaling, source, longest)
    keep = _yarn(head_dim, theta, scaling, source, original) if kind == "yarn" else _llama3(frequencies, scaling, source, original)
    return tuple(f * (k + (1 - k) / factor) for f, k in zip(frequencies, keep, strict=True))


def rotary_scale(scaling: Mapping[str, object], source: str, longest: int) -> float:
    """The factor on cosines and sines: `yarn` and `longrope` make attention a little sharper."""
    kind = rotary_kind(scaling, source)
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return positive(scaling, "attention_factor", source)
    factor = _factor(scaling, source, longest)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(_original(scaling, source, longest)))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        over, under = (0.1 * positive(scaling, name, source) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
        return over / under
    return 0.1 * math.log(factor) + 1


def rotary_limit(scaling: Mapping[str, object], source: str, longest: int) -> int:
    """Tokens of the longest sequence whose positions are exact. `yarn` reaches as far as its factor says, also if the
    configuration's own context, `longest`, is still the old one. `longrope` reaches as far as the old context."""
    kind = rotary_kind(scaling, source)
    if kind == "yarn":
        return max(longest, int(_factor(scaling, source, longest) * _original(scaling, source, longest)))
    return min(longest, _original(scaling, source, longest)) if kind == "longrope" else longest


def padded(frequencies: tuple[float, ...], head_dim: int) -> tuple[float, ...]:
    """The frequencies of all pairs of a head: those that do not turn have 0."""
    return (*frequencies, *(0.0,) * (head_dim // 2 - len(frequencies)))


def rotary_kind(scaling: Mapping[str, object], source: str) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE:
        raise CheckpointError(f"{source}: rope scaling {kind!r} is not supported; known are {', '.join(ROPE)}")
    return str(kind)


def _original(scaling: Mapping[str, object], source: str, longest: int) -> int:
    """Tokens of the context before it was extended."""
    return size(scaling, "original_max_position_embeddings", source, longest or None)


def _factor(scaling: Mapping[str, object], source: str, longest: int) -> float:
    if scaling.get("factor") is None and rotary_kind(scaling, source) in ("yarn", "longrope"):
        return longest / _original(scaling, source, longest)
    return positive(scaling, "factor", source)


def _llama3(frequencies: list[float], scaling: Mapping[str, object], source: str, original: int) -> list[float]:
    """The share of each frequency that is kept."""
    low, high = positive(scaling, "low_freq_factor", source), positive(scaling, "high_freq_factor", source)
    if high <= low:
        raise CheckpointError(f"{source}: rope scaling needs low_freq_factor {low} below high_freq_factor {high}")
    turns = [original * f / (2 * math.pi) for f in frequencies]
    return [min(1.0, max(0.0, (t - low) / (high - low))) for t in turns]


def _yarn(head_dim: int, theta: float, scaling: Mapping[str, object], source: str, original: int) -> list[float]:
    """The share of each frequency that is kept: 1 for those that turn `beta_fast` times within the old context, 0 for those that
    turn `beta_slow` times."""
    fast, slow = positive(scaling, "beta_fast", source, 32), positive(scaling, "beta_slow", source, 1)
    first, last = (head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return [1 - min(1.0, max(0.0, (i - first) / width)) for i in range(head_dim // 2)]


def check(config: ModelConfig, source: str) -> ModelConfig:
    """`config` itself, if its numbers fit together. Raises CheckpointError that names those that do not."""
    check_heads(config.num_heads, config.num_kv_heads, source)
    check_experts(config.experts, config.active_experts, source)
    if config.head_dim % 2:
        raise CheckpointError(f"{source}: head size {config.head_dim} is odd, rotary positions need pairs")
    for token in (*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,))):
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(f"{source}: special token {token} is outside the vocabulary of {config.vocab_size}")
    return config
