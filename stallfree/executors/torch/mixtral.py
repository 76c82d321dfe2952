"""Mixtral: a Llama whose FFN is a mixture of experts; each token passes through the best few (arXiv 2401.04088). Each rank has a
part of every expert. It knows nothing of KV.
"""

from typing import Any

import torch

from stallfree.executors.torch.attention import Cache
from stallfree.executors.torch.batch import Batch
from stallfree.executors.torch.fused import swiglu
from stallfree.executors.torch.llama import Llama
from stallfree.executors.torch.weights import Weights


class Mixtral(Llama):
    recordable = False  # which experts are launched depends on the tokens

    def feed_forward(self, weights: Weights, at: str) -> object:
        names = [f"{at}block_sparse_moe.experts.{number}." for number in range(self.config.experts)]
        whole = weights.tp
        experts = [(weights.outputs((f"{name}w1", whole), (f"{name}w3", whole)), weights.inputs(f"{name}w2")) for name in names]
        return weights.whole(f"{at}block_sparse_moe.gate"), experts

    def fed_forward(self, x: torch.Tensor, ffn: Any, batch: Batch, cache: Cache) -> torch.Tensor:
        router, experts = ffn
        share, chosen = router(x).float().softmax(-1).topk(self.config.active_experts, -1)
        share = (share / share.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for number, (up, down) in enumerate(experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                out.index_add_(0, token, down(swiglu(up(x[token]))) * share[token, place, None])
        return out
