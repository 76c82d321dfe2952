"""A model's sizes, from which its weights, KV and operations are counted. They come from the values of a Hugging Face config.json.

It knows nothing of files, tensors or devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from stallfree.checkpoint.families import FAMILIES


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the value and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """A model's sizes. `max_model_len`: tokens of its context. Of `experts` FFNs each token passes `active_experts`. `parallel`:
    attention and FFN read the same input. `name`: what the simulator's messages call the model.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_model_len: int
    tie_embeddings: bool = False
    parallel: bool = False
    experts: int = 1
    active_experts: int = 1
    name: str = field(default="", compare=False)

    @property
    def gated(self) -> bool:
        """Whether the FFN has two matrices up (SwiGLU)."""
        return FAMILIES[self.family].gated

    @property
    def unmet(self) -> float:
        """The share of a layer's experts that a token does not meet; 0 for a dense model."""
        return 1 - self.active_experts / self.experts

    @property
    def positions(self) -> int:
        """Rows of the learned position table; 0 where positions are rotary."""
        learned = FAMILIES[self.family].learned
        return 0 if learned is None else self.max_model_len + learned

    @property
    def parameters(self) -> int:
        """Weights of all matrices and norms. Biases are left out: they are under 0.1 %."""
        norms = 2 * self.hidden_size * self.num_layers + self.hidden_size
        router = self.hidden_size * self.experts * self.num_layers if self.experts > 1 else 0
        embeddings = ((1 if self.tie_embeddings else 2) * self.vocab_size + self.positions) * self.hidden_size
        return self.num_layers * (self._attention + self.experts * self._ffn) + router + norms + embeddings

    @property
    def flops_per_token(self) -> int:
        """Operations of the matrix products for one token, its logits included: two for each weight that it meets."""
        layer = self._attention + self.active_experts * self._ffn
        return 2 * (self.num_layers * layer + self.vocab_size * self.hidden_size)

    @property
    def flops_per_pair(self) -> int:
        """Operations of attention, in all layers, for one query and one key."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    @property
    def _attention(self) -> int:
        return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size

    @property
    def _ffn(self) -> int:
        return (3 if self.gated else 2) * self.hidden_size * self.ffn_size


def dimensions(values: Mapping[str, object], source: str, name: str = "") -> Dimensions:
    """The sizes in `values`, a config.json. Raises CheckpointError, naming `source`, for a value that is missing or makes no sense.

    Falcon and OPT have keys of their own, and defaults as in `transformers` (FalconConfig, OPTConfig).
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(f"{source}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    mixture = FAMILIES[family].experts
    hidden, num_heads = size(values, "hidden_size", source), size(values, "num_attention_heads", source)
    if values.get("head_dim") is None and hidden % num_heads:
        raise CheckpointError(f"{source}: a hidden size of {hidden} cannot be shared by {num_heads} heads evenly")
    if family == "falcon":
        grouped, queries = values.get("new_decoder_architecture", False), values.get("multi_query", True)
        num_kv_heads = size(values, "num_kv_heads", source, num_heads) if grouped else 1 if queries else num_heads
        ffn_size = size(values, "ffn_hidden_size", source, 4 * hidden)
    elif family == "opt":
        num_kv_heads, ffn_size = num_heads, size(values, "ffn_dim", source)
    else:
        num_kv_heads = size(values, "num_key_value_heads", source, num_heads)
        ffn_size = size(values, mixture.width if mixture else "intermediate_size", source)
    if mixture and (values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers")):
        raise CheckpointError(f"{source}: some layers have no experts; only models with experts in every layer are supported")
    experts = active = 1
    if mixture:
        # The newer name is second: transformers writes Qwen's so since version 5.
        key = "num_experts" if values.get("num_experts") is not None else "num_local_experts"
        experts, active = size(values, key, source), size(values, "num_experts_per_tok", source)
    check_heads(num_heads, num_kv_heads, source)
    check_experts(experts, active, source)
    return Dimensions(
        name=name,
        family=family,
        num_layers=size(values, "num_hidden_layers", source),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=size(values, "head_dim", source, hidden // num_heads),
        ffn_size=ffn_size,
        vocab_size=size(values, "vocab_size", source),
        max_model_len=size(values, "max_position_embeddings", source, 2048 if family == "falcon" else None),
        tie_embeddings=bool(values.get("tie_word_embeddings", FAMILIES[family].tied)),
        parallel=family == "falcon" and bool(values.get("parallel_attn", True)),
        experts=experts,
        active_experts=active,
    )


def check_heads(num_heads: int, num_kv_heads: int, source: str) -> None:
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{source}: {num_heads} attention heads cannot share {num_kv_heads} KV heads evenly")


def check_experts(experts: int, active: int, source: str) -> None:
    if active > experts:
        raise CheckpointError(f"{source}: a token cannot pass {active} of {experts} experts; one of these numbers is wrong")


def positive(values: Mapping[str, object], key: str, source: str, default: float | None = None) -> float:
    """The finite number above 0 under `key`. Raises CheckpointError that names `source` and `key` for anything else."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{source}: {key!r} is missing; the checkpoint is incomplete, fetch it again")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{source}: {key!r} is {value!r}, expected a number above 0")
    return value


def size(values: Mapping[str, object], key: str, source: str, default: int | None = None) -> int:
    """The whole number above 0 and below 2^31 under `key`. Raises CheckpointError that names `source` and `key` for anything
    else."""
    value = positive(values, key, source, default)
    if value != int(value) or value >= 2**31:
        raise CheckpointError(f"{source}: {key!r} is {value!r}, expected a whole number below 2^31")
    return int(value)
