"""Falcon: attention and FFN read the same input (arXiv 2311.16867), with LayerNorm and GELU. Its file holds the queries, keys and
values of each KV head together; loading puts them in order. It knows nothing of ranks or KV.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, layer_norm

from stallfree.executors.torch.attention import Cache
from stallfree.executors.torch.batch import Batch
from stallfree.executors.torch.fused import Turns
from stallfree.executors.torch.model import Model
from stallfree.executors.torch.weights import Matrix, Weights

Norm = tuple[torch.Tensor, torch.Tensor]
"""Weight and bias of a LayerNorm."""


@dataclass(slots=True)
class Layer:
    """The weights of a layer. `norms`: before attention and before the FFN; twice the same if the model has only one."""

    norms: tuple[Norm, Norm]
    qkv: Matrix
    output: Matrix
    up: Matrix
    down: Matrix


class Falcon(Model):
    embedding = "transformer.word_embeddings.weight"

    def layer(self, weights: Weights, number: int) -> Layer:
        config, at = self.config, f"transformer.h.{number}."
        names = ("ln_attn", "ln_mlp") if config.own_norm else ("input_layernorm", "input_layernorm")
        norms = [self._norm_of(weights, f"{at}{name}") for name in names]
        bias = config.mlp_bias
        return Layer(
            (norms[0], norms[1]),
            weights.fused(f"{at}self_attention.query_key_value", config.num_heads, config.num_kv_heads, config.head_dim, bias=bias),
            weights.inputs(f"{at}self_attention.dense", bias=bias),
            weights.outputs((f"{at}mlp.dense_h_to_4h", weights.tp), bias=bias),
            weights.inputs(f"{at}mlp.dense_4h_to_h", bias=bias),
        )

    def block(
        self, layer: Layer, hidden: torch.Tensor, delta: torch.Tensor | None, batch: Batch, turns: Turns, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden if delta is None else hidden + delta
        attended = self.attention(layer.qkv(self.normed(hidden, layer.norms[0])), batch, turns, cache)
        fed = layer.down(gelu(layer.up(self.normed(hidden, layer.norms[1]))))
        return hidden, self.add(layer.output(attended) + fed)

    def norm(self, weights: Weights) -> Norm:
        return self._norm_of(weights, "transformer.ln_f")

    def normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return layer_norm(x, norm[0].shape, *norm, self.config.norm_eps)

    @staticmethod
    def _norm_of(weights: Weights, name: str) -> Norm:
        return weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")
