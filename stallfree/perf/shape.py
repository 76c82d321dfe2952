"""A model's dimensions, and what of it lies on one device under tensor and pipeline parallelism: weights, KV, operations.

It reads the dimensions from `models.toml` beside this file or from a Hugging Face config.json, and knows nothing of devices or
time. Biases are left out: they are under 0.1 % of the weights. Bytes and operations are of the mathematics; kernels do worse.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from stallfree.core.nearest import nearest

WEIGHT_BYTES = {"fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128}
"""Bytes of a weight by precision; int4 has a 16-bit scale and a 4-bit zero for each group of 128 (AWQ, arXiv 2306.00978)."""

KV_BYTES = {"fp16": 2.0, "fp8": 1.0}
"""Bytes of a number in the KV cache by precision."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "falcon", "opt")
"""The `model_type` of a config.json that is understood."""


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder-only transformer. `gated`: the FFN has two matrices up (SwiGLU), otherwise one; `parallel`: attention and FFN
    read the same input (Falcon); `tied`: the embedding is the LM head too; `positions`: rows of a learned position table; of
    `experts` FFNs each token passes `active_experts`. `context` in tokens.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    gated: bool = True
    parallel: bool = False
    tied: bool = False
    positions: int = 0
    experts: int = 1
    active_experts: int = 1

    @property
    def parameters(self) -> int:
        norms = 2 * self.hidden * self.layers + self.hidden
        router = self.hidden * self.experts * self.layers if self.experts > 1 else 0
        return self.layers * (self._attention + self.experts * self._ffn) + router + norms + self._embeddings

    @property
    def flops_per_token(self) -> int:
        """Operations of the matrix products for one token, its logits included: two for each weight that it meets."""
        return 2 * (self.layers * (self._attention + self.active_experts * self._ffn) + self.vocab * self.hidden)

    @property
    def flops_per_pair(self) -> int:
        """Operations of attention, in all layers, for one query and one key."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def _attention(self) -> int:
        return (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden

    @property
    def _ffn(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def _embeddings(self) -> int:
        return ((1 if self.tied else 2) * self.vocab + self.positions) * self.hidden


@dataclass(frozen=True, slots=True)
class Matrix:
    """The part of a weight matrix that one device holds: `rows` outputs of `columns` inputs each, in a `precision` of
    `WEIGHT_BYTES`; and `copies` of it, of which a token meets `active`, for mixtures of experts.
    """

    name: str
    rows: int
    columns: int
    precision: str = "fp16"
    copies: int = 1
    active: int = 1

    @property
    def bytes(self) -> float:
        return self.copies * self.rows * self.columns * WEIGHT_BYTES[self.precision]


@dataclass(frozen=True, slots=True)
class Sharded:
    """A model on `tp * pp` devices: each layer split into `tp` parts, the layers dealt out to `pp` stages; weights and KV in the
    precisions `weights` (`WEIGHT_BYTES`) and `kv` (`KV_BYTES`). Embedding and LM head stay in fp16. Raises ValueError for a split
    that does not come out even.
    """

    model: Model
    tp: int = 1
    pp: int = 1
    weights: str = "fp16"
    kv: str = "fp16"

    def __post_init__(self) -> None:
        model = self.model
        for what, value, known in (("weights", self.weights, WEIGHT_BYTES), ("KV", self.kv, KV_BYTES)):
            if value not in known:
                raise ValueError(f"{what} in {value!r} are not known{nearest(value, known)}; known: {', '.join(known)}")
        if self.tp < 1 or self.pp < 1:
            raise ValueError(f"TP {self.tp} and PP {self.pp} are numbers of devices; give 1 or more of each")
        if self.pp > model.layers:
            raise ValueError(
                f"PP {self.pp} leaves stages without one of the {model.layers} layers of {model.name}; take fewer stages"
            )
        if not _divides(model, self.tp):
            even = [str(tp) for tp in range(1, 2 * self.tp) if _divides(model, tp)]
            parts = f"{model.heads} heads, {model.kv_heads} KV heads and {model.ffn} FFN channels"
            raise ValueError(f"TP {self.tp} does not divide the {parts} of {model.name}; it could be {', '.join(even)}")

    @property
    def heads(self) -> int:
        """Query heads on each device."""
        return self.model.heads // self.tp

    @property
    def kv_heads(self) -> int:
        """KV heads on each device; with more devices than KV heads, some hold the same."""
        return max(1, self.model.kv_heads // self.tp)

    @property
    def stages(self) -> list[int]:
        """The layers of each pipeline stage; the first stages have one more if they do not come out even."""
        each, more = divmod(self.model.layers, self.pp)
        return [each + (stage < more) for stage in range(self.pp)]

    def layer(self) -> list[Matrix]:
        """What each device holds of a layer's matrices, in the order of their use."""
        model, bits = self.model, self.weights
        ffn, experts = model.ffn // self.tp, (model.experts, model.active_experts)
        return [
            Matrix("qkv", (self.heads + 2 * self.kv_heads) * model.head_dim, model.hidden, bits),
            Matrix("output", model.hidden, self.heads * model.head_dim, bits),
            *([Matrix("router", model.experts, model.hidden)] if model.experts > 1 else []),
            Matrix("up", (2 if model.gated else 1) * ffn, model.hidden, bits, *experts),
            Matrix("down", model.hidden, ffn, bits, *experts),
        ]

    def head(self) -> Matrix:
        """What each device of the last stage holds of the LM head."""
        return Matrix("lm head", -(-self.model.vocab // self.tp), self.model.hidden)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on the device that holds most."""
        layer = sum(matrix.bytes for matrix in self.layer()) + 4 * self.model.hidden
        ends = self.head().bytes
        first, last = self.stages[0] * layer + ends + 2 * self.model.positions * self.model.hidden, self.stages[-1] * layer + ends
        if self.pp > 1:
            return max(first, last)
        return first if self.model.tied else first + ends

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV that a token has on each device of the longest stage."""
        return self.stages[0] * self.kv_bytes_per_layer

    @property
    def kv_bytes_per_layer(self) -> float:
        """Bytes of KV that a token has on each device, in one layer."""
        return 2 * self.kv_heads * self.model.head_dim * KV_BYTES[self.kv]

    def kv_tokens(self, memory: float, share: float = 0.9) -> int:
        """Tokens whose KV fits, beside the weights, into `share` of the `memory` bytes of each device; the rest of the memory is
        for activations. Raises ValueError if not one does, saying by how much and what would do.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share:g} of the memory cannot be; give one above 0 and at most 1")
        spare = memory * share - self.weight_bytes
        if spare >= self.kv_bytes_per_token:
            return int(spare // self.kv_bytes_per_token)
        need = self.weight_bytes + self.kv_bytes_per_token
        who = f"{self.model.name} in {self.weights} at TP {self.tp}, PP {self.pp}"
        room = f"{share:.0%} of the device's memory is {memory * share / 1e9:.1f} GB"
        raise ValueError(
            f"{who} needs {need / 1e9:.1f} GB on each device, and {room}: {(need - memory * share) / 1e9:.1f} GB too much; "
            f"{self._remedy(memory * share)}"
        )

    def _remedy(self, room: float) -> str:
        """What of this model would fit into `room` bytes: the fewest devices, and fewer bits on these."""

        def fits(sharded: Self) -> bool:
            return sharded.weight_bytes + sharded.kv_bytes_per_token <= room

        splits = (replace(self, tp=tp, pp=self.pp) for tp in range(self.tp + 1, 65) if _divides(self.model, tp))
        stages = (replace(self, pp=pp) for pp in range(self.pp + 1, self.model.layers + 1))
        more = [f"TP {s.tp}" for s in splits if fits(s)][:1] + [f"PP {s.pp}" for s in stages if fits(s)][:1]
        fewer = [
            f"{w} weights"
            for w in ("fp8", "int4")
            if WEIGHT_BYTES[w] < WEIGHT_BYTES[self.weights] and fits(replace(self, weights=w))
        ]
        would = [*more, *fewer[:1]]
        return f"{' or '.join(would)} would do" if would else "take devices with more memory"


def _divides(model: Model, tp: int) -> bool:
    return not (model.heads % tp or model.ffn % tp or (model.kv_heads % tp and tp % model.kv_heads))


@cache
def _built_in() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "models.toml").read_text())


def names() -> list[str]:
    """The built-in models."""
    return list(_built_in())


def repository(name: str) -> str:
    """Where the built-in model `name` is on the hub; another name as it is."""
    return str(_built_in()[name]["source"]) if name in _built_in() else name


def load(name: str) -> Model:
    """The built-in model `name`, which its repository's name means too, or the one of a config.json: that file, or the folder
    with it. Raises ValueError naming the nearest built-in, or what is wrong in the file.
    """
    for known, facts in _built_in().items():
        source = facts["source"]
        if name in (known, source, source.rpartition("/")[2]):
            dimensions = {key: value for key, value in facts.items() if key != "source"}
            return Model(name=known, head_dim=facts["hidden"] // facts["heads"], **dimensions)
    path = Path(name)
    if not path.exists():
        known = ", ".join(names())
        raise ValueError(f"unknown model {name!r}{nearest(name, names())}; known: {known}, or the path of a config.json")
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"the model {file} cannot be read: {error.strerror}; give a config.json or the folder with it") from None
    except ValueError as error:
        raise ValueError(f"the model {file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"the model {file} is {type(values).__name__}, expected a config.json of Hugging Face's")
    return _from_config(values, file)


def _from_config(values: Mapping[str, Any], file: Path) -> Model:
    """The dimensions in a config.json, whose keys differ from family to family."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{file}: model_type {family!r} is not understood; known: {', '.join(FAMILIES)}")

    def size(*keys: str, default: int | None = None) -> int:
        value = next((values[key] for key in keys if values.get(key) is not None), default)
        if value is None:
            raise ValueError(f"{file}: {keys[0]!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ValueError(f"{file}: {keys[0]!r} is {value!r}, expected a whole number above 0")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    falcon, opt = family == "falcon", family == "opt"
    if falcon:
        kv_heads = (
            size("num_kv_heads", default=heads)
            if values.get("new_decoder_architecture") or not values.get("multi_query", True)
            else 1
        )
        ffn = size("ffn_hidden_size", default=4 * hidden)
    else:
        kv_heads = heads if opt else size("num_key_value_heads", default=heads)
        ffn = size("ffn_dim") if opt else size("intermediate_size")
    context = size("max_position_embeddings", default=2048)
    if heads % kv_heads:
        raise ValueError(f"{file}: {heads} attention heads cannot share {kv_heads} KV heads evenly")
    if "head_dim" not in values and hidden % heads:
        raise ValueError(f"{file}: a hidden size of {hidden} cannot be shared by {heads} heads evenly")
    return Model(
        name=file.parent.name if file.name == "config.json" and file.parent.name else file.stem,
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", default=hidden // heads),
        ffn=ffn,
        vocab=size("vocab_size"),
        context=context,
        gated=not (falcon or opt),
        parallel=falcon and bool(values.get("parallel_attn", True)),
        tied=bool(values.get("tie_word_embeddings", falcon or opt)),
        positions=context + 2 if opt else 0,
        experts=size("num_local_experts", default=1) if family == "mixtral" else 1,
        active_experts=size("num_experts_per_tok", default=2) if family == "mixtral" else 1,
    )
