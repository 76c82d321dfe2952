"""What of a model lies on one device under tensor and pipeline parallelism: matrices, bytes of weights and of KV.

The dimensions come from `models.toml` beside this file or from a Hugging Face config.json. It knows nothing of devices or time.
Biases are left out: they are under 0.1 % of the weights.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from stallfree.checkpoint.dimensions import Dimensions, dimensions
from stallfree.core.nearest import nearest

WEIGHT_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8-block": 1 + 4 / 128**2, "int8": 1.0, "int4": 0.5 + 2.5 / 128}
"""Bytes of a weight by precision. fp8-block has a 32-bit scale for each 128 x 128 of them; int4 has a 16-bit scale and a 4-bit zero
for each group of 128 (AWQ, arXiv 2306.00978). int8 and int4 are weights alone, which are multiplied in 16 bits."""

KV_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "u8": 1.0, "u4": 0.75}
"""Bytes of a number in the KV cache by precision, the mean of keys and values: with u4, keys have 8 bits and values 4."""

KV_SCALE_BYTES = {"u8": 8, "u4": 8}
"""Bytes of the scale and the zero point that a key or value of one head of a token has, as OpenVINO stores them."""


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

    def met(self, tokens: int) -> float:
        """The expected number of copies that at least one of `tokens` tokens meets, if each meets its own at random. Only these are
        read: 2, 5.5 and 7.9 of Mixtral's 8 experts by 1, 4 and 16 tokens.
        """
        return self.copies * (1 - (1 - self.active / self.copies) ** tokens)


@dataclass(frozen=True, slots=True)
class Sharded:
    """A model on `tp * pp` devices: each layer split into `tp` parts, the layers dealt out to `pp` stages; weights and KV in the
    precisions `weights` (`WEIGHT_BYTES`) and `kv` (`KV_BYTES`). Embedding and LM head stay in fp16. Raises ValueError for a split
    that does not come out even.
    """

    model: Dimensions
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
        if self.pp > model.num_layers:
            raise ValueError(
                f"PP {self.pp} leaves stages without one of the {model.num_layers} layers of {model.name}; take fewer stages"
            )
        if not _divides(model, self.tp):
            even = [str(tp) for tp in range(1, 2 * self.tp) if _divides(model, tp)]
            parts = f"{model.num_heads} heads, {model.num_kv_heads} KV heads and {model.ffn_size} FFN channels"
            raise ValueError(f"TP {self.tp} does not divide the {parts} of {model.name}; it could be {', '.join(even)}")

    @property
    def heads(self) -> int:
        """Query heads on each device."""
        return self.model.num_heads // self.tp

    @property
    def kv_heads(self) -> int:
        """KV heads on each device; with more devices than KV heads, some hold the same."""
        return max(1, self.model.num_kv_heads // self.tp)

    @property
    def stages(self) -> list[int]:
        """The layers of each pipeline stage; the first stages have one more if they do not come out even."""
        each, more = divmod(self.model.num_layers, self.pp)
        return [each + (stage < more) for stage in range(self.pp)]

    def layer(self) -> list[Matrix]:
        """What each device holds of a layer's matrices, in the order of their use."""
        model, bits = self.model, self.weights
        ffn, experts = model.ffn_size // self.tp, (model.experts, model.active_experts)
        return [
            Matrix("qkv", (self.heads + 2 * self.kv_heads) * model.head_dim, model.hidden_size, bits),
            Matrix("output", model.hidden_size, self.heads * model.head_dim, bits),
            *([Matrix("router", model.experts, model.hidden_size)] if model.experts > 1 else []),
            Matrix("up", (2 if model.gated else 1) * ffn, model.hidden_size, bits, *experts),
            Matrix("down", model.hidden_size, ffn, bits, *experts),
        ]

    def head(self) -> Matrix:
        """What each device of the last stage holds of the LM head."""
        return Matrix("lm head", -(-self.model.vocab_size // self.tp), self.model.hidden_size)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on the device that holds most."""
        layer = sum(matrix.bytes for matrix in self.layer()) + 4 * self.model.hidden_size
        ends, positions = self.head().bytes, 2 * self.model.positions * self.model.hidden_size
        first, last = self.stages[0] * layer + ends + positions, self.stages[-1] * layer + ends
        if self.pp > 1:
            return max(first, last)
        return first if self.model.tie_embeddings else first + ends

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV that a token has on each device of the longest stage."""
        return self.stages[0] * self.kv_bytes_per_layer

    @property
    def kv_bytes_per_layer(self) -> float:
        """Bytes of KV that a token has on each device, in one layer."""
        vector = self.model.head_dim * KV_BYTES[self.kv] + KV_SCALE_BYTES.get(self.kv, 0)
        return 2 * self.kv_heads * vector

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
        stages = (replace(self, pp=pp) for pp in range(self.pp + 1, self.model.num_layers + 1))
        more = [f"TP {s.tp}" for s in splits if fits(s)][:1] + [f"PP {s.pp}" for s in stages if fits(s)][:1]
        fewer = [
            f"{w} weights"
            for w in ("fp8", "int4")
            if WEIGHT_BYTES[w] < WEIGHT_BYTES[self.weights] and fits(replace(self, weights=w))
        ]
        would = [*more, *fewer[:1]]
        return f"{' or '.join(would)} would do" if would else "take devices with more memory"


def _divides(model: Dimensions, tp: int) -> bool:
    return not (model.num_heads % tp or model.ffn_size % tp or (model.num_kv_heads % tp and tp % model.num_kv_heads))


@cache
def _built_in() -> Mapping[str, Mapping[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "models.toml").read_text())


def names() -> list[str]:
    """The built-in models."""
    return list(_built_in())


def repository(name: str) -> str:
    """Where the built-in model `name` is on the hub; another name as it is."""
    return str(_built_in()[name]["source"]) if name in _built_in() else name


def load(name: str) -> Dimensions:
    """The built-in model `name`, which its repository's name means too, or the one of a config.json: that file, or the folder
    with it. Raises ValueError naming the nearest built-in, or what is wrong in the file.
    """
    for known, values in _built_in().items():
        source = values["source"]
        if name in (known, source, source.rpartition("/")[2]):
            return dimensions(values, known, known)
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
    return dimensions(values, str(file), file.parent.name if file.name == "config.json" and file.parent.name else file.stem)
