"""The Llama family and its relatives (Mistral, Qwen, Granite, SmolLM3, OLMo 2, Phi, Gemma 3): norms, attention and a gated FFN, one
after the other. Where they differ, the configuration says how. It knows the mathematics of a layer, and nothing of ranks or KV.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import rms_norm

from stallfree.executors.torch.attention import Cache
from stallfree.executors.torch.batch import Batch
from stallfree.executors.torch.fused import Turns, add_norm, gated
from stallfree.executors.torch.model import Model
from stallfree.executors.torch.weights import Matrix, Weights


@dataclass(slots=True)
class Layer:
    """The weights of a layer. `norms`: before and after attention, before and after the FFN; None where there is none. `heads`: the
    norms of queries and keys, if there are any. `ffn`: in the family's own form. `sinks`: see
    `attention.attend`; None where there are none."""

    norms: tuple[torch.Tensor | None, ...]
    heads: tuple[torch.Tensor, torch.Tensor] | None
    qkv: Matrix
    output: Matrix
    ffn: object
    window: int
    sinks: torch.Tensor | None


class Llama(Model):
    def layer(self, weights: Weights, number: int) -> Layer:
        config, at = self.config, f"model.layers.{number}."
        heads = (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads), ("v_proj", config.num_kv_heads))
        norms = [weights.vector(f"{at}{name}.weight") if name else None for name in config.norms]
        of_heads = [weights.vector(f"{at}self_attn.{name}_norm.weight") for name in "qk"] if config.qk_norm else None
        return Layer(
            tuple(norms),
            (of_heads[0], of_heads[1]) if of_heads else None,
            weights.outputs(*((f"{at}self_attn.{name}", parts) for name, parts in heads), bias=config.qkv_bias),
            weights.inputs(f"{at}self_attn.o_proj", bias=config.output_bias),
            self.feed_forward(weights, at),
            config.windows[number],
            weights.part(f"{at}self_attn.sinks", config.num_heads) if config.sinks else None,
        )

    def block(
        self, layer: Layer, hidden: torch.Tensor, delta: torch.Tensor | None, batch: Batch, turns: Turns, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before, after, before_ffn, after_ffn = layer.norms
        hidden, x = self.added(hidden, delta, before)
        qkv = self.adapted("qkv", x, layer.qkv(x), batch, cache)
        attended = self.attention(qkv, batch, turns, cache, layer.window, layer.heads, layer.sinks)
        output = self.adapted("output", attended, layer.output(attended), batch, cache)
        delta = self.add(output)
        hidden, x = self.added(hidden, delta if after is None else self.normed(delta, after), before_ffn)
        delta = self.add(self.fed_forward(x, layer.ffn, batch, cache))
        return hidden, delta if after_ffn is None else self.normed(delta, after_ffn)

    def added(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` + `delta`, and this sum normalised, if there is a norm."""
        if delta is not None and norm is not None:
            return add_norm(hidden, delta, norm, self.config.norm_eps)
        hidden = hidden if delta is None else hidden + delta
        return hidden, hidden if norm is None else self.normed(hidden, norm)

    def norm(self, weights: Weights) -> torch.Tensor:
        return weights.vector("model.norm.weight")

    def normed(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, norm.shape, norm, self.config.norm_eps)

    def feed_forward(self, weights: Weights, at: str) -> object:
        """The FFN of the layer whose tensor names begin with `at`, for `fed_forward`."""
        whole, bias = weights.tp, self.config.mlp_bias
        up = weights.outputs((f"{at}mlp.gate_proj", whole), (f"{at}mlp.up_proj", whole), bias=bias)
        return up, weights.inputs(f"{at}mlp.down_proj", bias=bias)

    def fed_forward(self, x: torch.Tensor, ffn: Any, batch: Batch, cache: Cache) -> torch.Tensor:
        """This rank's part of the FFN's output for `x` [tokens, hidden]."""
        up, down = ffn
        channels = gated(self.adapted("up", x, up(x), batch, cache), gelu=self.config.gelu)
        return self.adapted("down", channels, down(channels), batch, cache)
