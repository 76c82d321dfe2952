"""Mixtures of experts: a Llama whose FFN is many, of which each token passes through the best few (Mixtral, arXiv 2401.04088). Each
rank has a part of every expert. It knows nothing of KV.
"""

from typing import Any

import torch

from stallfree.executors.torch.attention import Cache
from stallfree.executors.torch.batch import Batch
from stallfree.executors.torch.fused import clamped, swiglu
from stallfree.executors.torch.llama import Llama
from stallfree.executors.torch.weights import Weights


class Mixture(Llama):
    recordable = False  # which experts are launched depends on the tokens

    def feed_forward(self, weights: Weights, at: str) -> object:
        mixture, whole, experts = self.config.mixture, weights.tp, []
        if mixture is None:
            raise ValueError(f"{self.config.family} has no experts: its row in checkpoint/families.py needs `experts`")
        for number in range(self.config.experts):
            gate, up, down = (f"{at}{name}" for name in mixture.matrices(number))
            inward = weights.outputs((gate, whole), (up, whole), bias=mixture.bias)
            experts.append((inward, weights.inputs(down, bias=mixture.bias)))
        return weights.whole(f"{at}{mixture.router}", bias=mixture.bias), experts, mixture.clamped

    def fed_forward(self, x: torch.Tensor, ffn: Any, batch: Batch, cache: Cache) -> torch.Tensor:
        router, experts, clamp = ffn
        logits = router(x).float()
        best, chosen = logits.topk(self.config.active_experts, -1)
        share = logits.softmax(-1).gather(-1, chosen) if self.config.shares_of_all else best.softmax(-1)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)  # the tokens of the first expert, then those of the second, and so on
        counts = flat.bincount(minlength=len(experts)).tolist()
        tokens, shares = (order // chosen.shape[1]).split(counts), share.flatten()[order].to(x.dtype).split(counts)
        out = torch.zeros_like(x)
        for (up, down), token, weight in zip(experts, tokens, shares, strict=True):
            if len(token):
                inner = up(x[token])
                channels = clamped(inner, *self.config.clamp) if clamp else swiglu(inner)
                out.index_add_(0, token, down(channels) * weight[:, None])
        return out
